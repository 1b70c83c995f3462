"""Another data set, or another order, for a run that goes on: refused, allowed, and what is known of it then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gpt2dist.cli import main
from gpt2dist.config import UserError
from gpt2dist.data.shards import read_manifest
from gpt2dist.train import checkpoint, rundir
from gpt2dist.train.preflight import preflight
from tests.conftest import tiny_run
from tests.distributed import jobs


def audit(run_dir: str, *args: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(main, ["audit", run_dir, "--json", *args])
    return result.exit_code, json.loads(result.stdout) if result.stdout else {}


@pytest.mark.slow
def test_another_data_set(ranks: Callable[..., list[Any]], make_data: Callable[..., str], tmp_path: Path) -> None:
    old, new, third = (make_data([3000 + 500 * i], name=f"data{i}") for i in range(3))
    changes: dict[str, Any] = {"storage": str(tmp_path), "eval__every_steps": 0}
    before = tiny_run(data__path=old, train__stop_at=5, **changes)
    ranks(jobs.train_runs, 2, [before])
    was, now = (read_manifest(path).fingerprint for path in (old, new))

    with pytest.raises(UserError) as refused:
        preflight(tiny_run(data__path=new, **changes), "run.toml")
    assert was[:16] in str(refused.value)
    assert now[:16] in str(refused.value)
    assert "--set data.allow_changed=true" in str(refused.value)

    changed = tiny_run(data__path=new, data__allow_changed=True, train__stop_at=9, **changes)
    assert preflight(changed, "run.toml").resume_step == 5
    ranks(jobs.train_runs, 2, [changed])
    after = tiny_run(data__path=new, **changes)
    assert preflight(after, "run.toml").resume_step == 9  # the newest checkpoint is of this data set
    ranks(jobs.train_runs, 2, [after])
    (Path(after.run_dir) / "config.toml").write_text(after.to_toml())
    (event,) = [e for e in rundir.events_log(after.run_dir).read() if e["event"] == "data_changed"]
    assert (event["step"], event["before"], event["now"]) == (5, was, now)
    assert [change["key"] for change in event["changes"]] == ["content of data.path"]
    newest = checkpoint.newest(after.run_dir)
    assert newest is not None
    assert (newest.index.step, newest.index.data_fingerprint) == (12, now)

    code, found = audit(after.run_dir)
    assert (code, found["samples"], found["unverifiable"]) == (1, 7 * 8, 5 * 8)
    assert (found["steps"], found["gaps"], found["duplicates"]) == (12, 0, 0)
    text = CliRunner().invoke(main, ["audit", after.run_dir]).stdout
    assert "NOT proven: 40 other samples were of another data set or order" in text
    assert audit(after.run_dir, "--set", f"data.path={old}")[1]["samples"] == 5 * 8
    assert audit(after.run_dir, "--set", f"data.path={third}") == (2, {})


def test_another_order(ranks: Callable[..., list[Any]], make_data: Callable[..., str], tmp_path: Path) -> None:
    """Another seed and another batch from step 5 on: each part is proven with its own configuration."""
    changes: dict[str, Any] = {"data__path": make_data([3000]), "storage": str(tmp_path), "eval__every_steps": 0}
    ranks(jobs.train_runs, 2, [tiny_run(train__stop_at=5, **changes)])
    other: dict[str, Any] = {"seed": 4, "batch__micro_batches": 6, **changes}
    with pytest.raises(UserError) as refused:
        preflight(tiny_run(**other), "run.toml")
    for part in ("run.toml: seed: 3 → 4", "batch.micro_batches: 4 → 6", "--set data.allow_changed=true"):
        assert part in str(refused.value)
    run = tiny_run(data__allow_changed=True, **other)
    assert [c.key for c in preflight(run, "run.toml").changes if c.effect == "order"] == ["seed", "batch.micro_batches"]
    ranks(jobs.train_runs, 2, [run])
    (Path(run.run_dir) / "config.toml").write_text(run.to_toml())
    (event,) = [e for e in rundir.events_log(run.run_dir).read() if e["event"] == "data_changed"]
    assert event["step"] == 5
    assert [(c["key"], c["before"], c["now"]) for c in event["changes"]] == [
        ("seed", 3, 4),
        ("batch.micro_batches", 4, 6),
    ]
    code, found = audit(run.run_dir)
    assert (code, found["samples"], found["unverifiable"], found["gaps"]) == (1, 7 * 12, 5 * 8, 0)
    code, found = audit(run.run_dir, "--set", "seed=3", "--set", "batch.micro_batches=4")
    assert (code, found["samples"], found["unverifiable"], found["gaps"]) == (1, 5 * 8, 7 * 12, 0)
