"""The report: one page that loads nothing, and says what happened."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from gpt2dist.cli import main
from gpt2dist.config import RunConfig
from gpt2dist.data.mixture import Mixture
from gpt2dist.data.order import SampleOrder
from gpt2dist.model.gpt2 import GPT2, GPT2Config
from gpt2dist.report import page, plots
from gpt2dist.report.history import attempts, words
from gpt2dist.train import ledger, rundir
from gpt2dist.train.resume import order_id
from tests.conftest import tiny_run
from tests.unit.runs import save_run
from tests.unit.test_goodput import Log


def eventful_run(run: RunConfig, steps: int) -> str:
    """The directory of a run in which much went wrong, saved at its last step."""
    log = Log()
    log.launch(4)
    log.start(0, after=6)
    log.event("eval", after=1, seconds=1, step=0, val_loss=10.8)
    log.steps(0, 6)
    log.commit(4)
    log.event("failure", after=1, cause="worker 1: <b>its process died</b>")
    log.event("restart")
    log.start(4, after=6)
    log.steps(4, 7, val=1)
    log.finish(after=1, reason="resized")
    log.event("resize", workers=1)
    log.start(7, after=6, workers=1)
    log.steps(7, 9)
    log.now += 30
    log.launch(4)
    log.events[-1]["changes"] = [{"key": "optim.lr", "before": 0.003, "now": 0.001}]
    log.start(7, after=6, workers=2)
    log.steps(7, steps)
    log.finish(after=1)
    log.event("exit", after=1)
    for event in log.events:
        if event["event"] == "start":
            event["redone_steps"] = sum(spent["steps"] for spent in event["redone"])
    for line in log.metrics:
        line |= {"loss": 10.8 - 0.1 * line["step"], "tokens_per_s": 128.0, "mfu": 0.4}
        if "eval_s" in line:
            line["val_loss"] = line["loss"] + 0.05
    save_run(run, GPT2(GPT2Config.from_run(run)), step=steps)
    rundir.events_log(run.run_dir).append(*log.events)
    rundir.metrics_log(run.run_dir).append(*log.metrics)
    data = Mixture.open(run)
    order, name = SampleOrder(run, data), order_id(run.model_dump(mode="json"), data.fingerprint)
    rundir.ledger_log(run.run_dir).append(*(ledger.entry(run, s, order.step(s), 2, 1, name) for s in range(steps)))
    return run.run_dir


class Page(HTMLParser):
    """What a browser would load, and whether all tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href", "xlink:href") and v and v[0] != "#"]
        if tag in ("script", "link", "iframe", "img", "image"):
            self.loads.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def run(make_data: Callable[..., str], tmp_path: Path) -> RunConfig:
    return tiny_run(storage=str(tmp_path / "runs"), data__path=make_data([3000]), cluster__price_per_hour=3.6)


def test_page(run: RunConfig) -> None:
    run_dir = eventful_run(run, 12)
    done = CliRunner().invoke(main, ["report", run_dir])
    assert (done.exit_code, done.stdout) == (0, f"{run_dir}/report.html\n")
    text = (Path(run_dir) / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert (page.loads, page.open) == ([], [])
    assert not re.search(r"url\((?!#)|@import", text)
    for part in (
        "12 of 12",
        "finished",
        "worker 1: &lt;b&gt;its process died&lt;/b&gt;",
        "attempt 2: 2 workers, from step 4, 2 steps to redo",
        "going on with 1 worker",
        "optim.lr: 0.003 → 0.001",
        "every sample exactly once",  # the checkpoint's fingerprint is made up, the ledger's is not
        "2 workers, ZeRO-2",
        "lost to failure",
        "Goodput ",
        "seq_len = 16",
    ):
        assert part in text, part
    for mark in ("failed", "resized, 1 worker", "killed, 2 workers", "done again"):
        assert f">{mark}" in text, mark
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:
        ElementTree.fromstring(picture)
    parts = [float(width) for width in re.findall(r'style="width: ([\d.]+)%', text)]
    assert sum(parts) == pytest.approx(100, abs=0.01)


def test_page_of_a_run_that_has_just_begun(run: RunConfig) -> None:
    Path(run.run_dir).mkdir(parents=True)
    (Path(run.run_dir) / "config.toml").write_text(run.to_toml())
    refused = CliRunner().invoke(main, ["report", run.run_dir])
    assert (refused.exit_code, refused.stderr) == (2, f"error: {run.run_dir}: no events yet\n")
    log = Log()
    log.launch(4)
    rundir.events_log(run.run_dir).append(*log.events)
    assert CliRunner().invoke(main, ["report", run.run_dir]).exit_code == 0
    text = (Path(run.run_dir) / "report.html").read_text(encoding="utf-8")
    for part in ("No step was done yet.", "nothing to audit", "None.", "not ended, last heard of"):
        assert part in text


def test_a_data_set_that_is_gone_is_said(run: RunConfig, tmp_path: Path) -> None:
    run_dir = eventful_run(run, 12)
    (tmp_path / "data" / "manifest.json").unlink()
    assert CliRunner().invoke(main, ["report", run_dir]).exit_code == 0
    assert "Not audited: " in (Path(run_dir) / "report.html").read_text(encoding="utf-8")


def test_damaged_and_missing_checkpoints_are_listed(run: RunConfig) -> None:
    run_dir = eventful_run(run, 12)
    index = Path(run_dir) / "checkpoints/step-00000012/index.json"
    index.write_bytes(index.read_bytes()[:100])
    assert CliRunner().invoke(main, ["report", run_dir]).exit_code == 0
    text = (Path(run_dir) / "report.html").read_text(encoding="utf-8")
    assert "Not audited: " in text
    assert re.search(r"damaged: [^<]*step-00000012/index.json: not a valid index", text)


def test_a_page_that_cannot_be_written_is_one_line(run: RunConfig) -> None:
    run_dir = eventful_run(run, 12)
    (Path(run_dir) / "report.html").mkdir()
    refused = CliRunner().invoke(main, ["report", run_dir])
    assert (refused.exit_code, refused.stderr) == (
        2,
        f"error: {run_dir}: report.html: cannot be written: Is a directory\n",
    )


def test_how_a_run_stands() -> None:
    def state(*kinds: str) -> str:
        return page._state([{"event": kind, "time": 0.0, "reason": "stopped"} for kind in kinds], [])

    assert state("launch", "start", "end", "exit") == "stopped"
    assert state("launch", "start", "end", "exit", "launch", "start", "failure", "exit") == "failed"
    assert state("launch", "start", "end", "exit", "launch", "exit") == "failed"
    assert state("launch", "start", "end") == "stopped"
    assert state("launch", "start", "end", "restart", "start").startswith("not ended")
    start, end = {"event": "start", "time": 60.0}, {"event": "end", "reason": "preempted", "time": 90.0}
    restart, left = {"event": "restart", "time": 91.0}, {"event": "exit", "stopped": True, "time": 99.0}
    assert page._state([start, end, restart, left], []) == "stopped"  # asked for while it waited for machines
    assert page._state([start, end, restart], []).startswith("not ended, last heard of 1970-01-01 00:01:31")
    assert page._state([start], [{"time": 120.0}]).startswith("not ended, last heard of 1970-01-01 00:02:00")


def test_page_of_a_copy_without_checkpoints(run: RunConfig) -> None:
    run_dir = eventful_run(run, 12)
    rundir.events_log(run_dir).append({"event": "commit", "step": 12, "time": 1e9, "seconds": 1.0, "stall_s": 0.0})
    shutil.rmtree(Path(run_dir) / "checkpoints")
    done = CliRunner().invoke(main, ["report", run_dir])
    assert done.exit_code == 0, done.stderr
    assert "checkpoints: not there, though step 12 was saved" in (Path(run_dir) / "report.html").read_text()


def test_what_is_not_finite_leaves_a_gap() -> None:
    values = np.array([3.0, 3.0, np.nan, 3.0, np.inf, 3.0, 3.0])
    assert np.array_equal(plots.rolling_mean(values, 2), [3, np.nan, np.nan, np.nan, np.nan, 3], equal_nan=True)


def test_a_long_line_keeps_its_peaks() -> None:
    steps = np.arange(100_000.0)
    values = np.sin(steps / 1e4)
    values[[12_345, 67_890]] = 5, -5
    values[500] = np.nan
    x, y = plots.thin(steps, values)
    assert len(x) <= plots.POINTS
    assert np.all(np.diff(x) > 0)
    assert (y.max(), y.min()) == (5, -5)
    assert np.all(y == values[x.astype(int)])


def test_a_long_run_makes_a_small_page() -> None:
    rows = [
        {"step": s, "loss": 3.0, "tokens_per_s": 1e5, "time": float(s), "attempt": 1 + s // 25_000}
        for s in range(100_000)
    ]
    rows[70_000]["loss"] = float("nan")
    size = sum(map(len, (plots.loss(rows, 10.8, []), plots.throughput(rows, []), plots.progress(rows, [], 0.0))))
    assert size < 500_000


def test_why_attempts_began() -> None:
    log = Log()
    ends: list[tuple[str, dict[str, Any]]] = [
        ("failure", {}),
        ("end", {"reason": "preempted"}),
        ("end", {"reason": "resized"}),
        ("rewind", {}),
        ("preemption", {}),
        ("end", {"reason": "stopped"}),
    ]
    log.launch()
    for kind, fields in ends:
        log.start(0, after=1)
        log.event(kind, after=1, **fields)
    log.event("exit")
    log.launch()
    log.start(0, after=1)
    log.launch()
    log.start(0, after=1)
    expected = ["command", "failed", "preempted", "resized", "rewound", "preempted", "command", "killed"]
    assert [attempt.cause for attempt in attempts(log.events)] == expected


def test_every_event_has_words() -> None:
    """Also one that is not known here."""
    assert words({"time": 0, "event": "new_thing", "step": 4}) == "new thing: step 4"
    assert words({"time": 0, "event": "commit", "step": 4, "seconds": 1, "stall_s": 0.1}) is None


def test_foreign_lines_are_left_out_or_said(run: RunConfig) -> None:
    run_dir = eventful_run(run, 12)
    events, metrics = (Path(run_dir) / f"{name}.jsonl" for name in ("events", "metrics"))
    before = metrics.read_text(), events.read_text()
    with metrics.open("a") as file:
        file.write('{"step": 99}\n{"step": 99, "loss": null, "tokens_per_s": 1.0, "mfu": 0.1}\n')
    with events.open("a") as file:
        file.write('{"event": 5, "time": 1.0}\n')
    done = CliRunner().invoke(main, ["report", run_dir])
    assert done.exit_code == 0, done.stderr
    assert "12 of 12" in (Path(run_dir) / "report.html").read_text(encoding="utf-8")
    rundir.events_log(run_dir).append({"event": "failure", "time": 1.8e9})
    done = CliRunner().invoke(main, ["report", run_dir])
    assert (done.exit_code, done.stderr) == (
        2,
        f"error: {run_dir}/events.jsonl: a line is not understood (no 'cause')\n",
    )
    metrics.write_text(before[0])
    events.write_text(before[1])
    rundir.events_log(run_dir).append({"event": "failure", "time": 1.8e9, "cause": "/data/caf\udce9.txt"})
    assert CliRunner().invoke(main, ["report", run_dir]).exit_code == 0
    assert "failed: /data/caf\\udce9.txt" in (Path(run_dir) / "report.html").read_text(encoding="utf-8")
    events.unlink()
    done = CliRunner().invoke(main, ["report", run_dir])
    assert (done.exit_code, "events.jsonl: missing" in done.stderr) == (2, True)
