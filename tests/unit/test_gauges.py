"""Metrics for Prometheus, and the Grafana dashboard that shows them."""

from __future__ import annotations

import json
import re

from gpt2dist.report import gauges
from tests.conftest import ROOT

DASHBOARD = json.loads((ROOT / "jobs" / "grafana.json").read_text())

METRICS = {f"ray_{gauges.PREFIX}{name}" for name in (*gauges.OF_A_LINE, gauges.STEP_PART, *gauges.OF_THE_RUN)}
"""As they are scraped: Ray puts its own name before them."""


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    shown = {re.match(r'(\w+)\{run=~"\$run"\}$', e)[1] for e in expressions}  # type: ignore[index]
    assert shown == METRICS
    variables = [v["query"] for v in DASHBOARD["templating"]["list"]]
    (run,) = [v["query"] for v in variables if isinstance(v, dict)]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", run).groups()  # type: ignore[union-attr]
    assert metric in METRICS
    assert label == "run"
    legends = [target["legendFormat"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert {label for legend in legends for label in re.findall(r"\{\{(\w+)\}\}", legend)} == {"run", "part"}


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24  # columns of Grafana's grid
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
