"""A run that diverges on some samples: back to a checkpoint before them, and on without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2dist.config import UserError
from gpt2dist.data.mixture import Mixture
from gpt2dist.data.order import SampleOrder
from gpt2dist.train import ledger, rundir
from gpt2dist.train.checkpoint import Checkpoint, committed, newest
from gpt2dist.train.preflight import preflight
from tests.conftest import tiny_run
from tests.distributed import jobs, saves
from tests.distributed.test_engine import logged

Ranks = Callable[..., list[Any]]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("keep", "stop"),
    [
        pytest.param(2, None, marks=pytest.mark.slow),
        pytest.param(1, None, marks=pytest.mark.slow),
        (1, 6),
    ],
)
def test_bad_samples_are_left_out_and_named(
    ranks: Ranks, make_data: Callable[..., str], tmp_path: Path, keep: int, stop: int | None
) -> None:
    """The run that went back equals one that left the samples out from the start, bit for bit.

    With keep = 1 a checkpoint of step 6, after the first bad step, would have taken the place of step 4's; where the
    run is stopped and resumed there it is saved, but step 4's stays.
    """
    changes = {"data__path": make_data([3000, 900]), "train__rewind": True, "checkpoint__every_steps": 2}
    changes["checkpoint__keep"] = keep
    changes["batch__warmup_steps"] = 9  # M = 1 1 1 2 2 2 3 3 3 4 4 4
    run = tiny_run(storage=str(tmp_path), **changes)
    bad = SampleOrder(run, Mixture.open(run)).samples(14, 30).tolist()
    if stop:
        part = tiny_run(storage=str(tmp_path), train__stop_at=stop, **changes)
        assert ranks(jobs.train_with_bad_samples, 2, part, bad)[0] == ["stopped"]
    (ends, _) = ranks(jobs.train_with_bad_samples, 2, run, bad)
    assert ends == ["rewound", "finished"]
    starts = [e["step"] for e in rundir.events_log(run.run_dir).read() if e["event"] == "start"]
    assert starts == ([0, stop, 4] if stop else [0, 4])
    (event,) = [e for e in rundir.events_log(run.run_dir).read() if e["event"] == "rewind"]
    assert (event["steps"], event["positions"], event["samples"]) == ([5, 8], [[14, 30]], bad)
    assert {Path(d["shard"]).name for d in event["documents"]} <= {"train-00000.npy", "train-00001.npy"}
    assert all(d["begins"] for d in event["documents"])

    clean = tiny_run(name="clean", storage=str(tmp_path), data__skip=[[14, 30]], **changes)
    ranks(jobs.train_runs, 2, [clean])
    assert logged(run) == logged(clean)
    resolved = rundir.with_rewinds(run, rundir.events_log(run.run_dir).read())
    assert ranks(jobs.is_outdated, 2, run) == [True, True]  # of a group that Ray has resized at that moment
    assert ranks(jobs.is_outdated, 2, resolved) == [False, False]
    found = newest(run.run_dir)
    assert found is not None
    audit = ledger.audit(resolved, Mixture.open(run), rundir.ledger_log(run.run_dir).read(), found.index.step)
    assert (audit.skipped, audit.samples, audit.duplicates, audit.gaps) == (16, 2 * 30, 0, 0)
    assert audit.clean
    with pytest.raises(UserError, match=r"data\.skip: .*: the samples from position 8 on were trained on already"):
        preflight(tiny_run(storage=str(tmp_path), data__skip=[[8, 16]], **changes), "run.toml")


@pytest.mark.timeout(180)
def test_too_large_a_loss_scale_is_no_divergence(ranks: Ranks, make_data: Callable[..., str], tmp_path: Path) -> None:
    """It is lowered by more steps in a row than make a divergence."""
    changes = {"train__rewind": True, "train__precision": "fp16", "train__initial_loss_scale": 2**28}
    run = tiny_run(storage=str(tmp_path), data__path=make_data([3000]), train__steps=24, **changes)
    assert ranks(jobs.train_with_bad_samples, 2, run, [])[0] == ["finished"]
    skipped = [line["step"] for line in rundir.metrics_log(run.run_dir).read() if "skipped" in line]
    assert skipped == list(range(len(skipped)))
    assert len(skipped) > run.train.rewind_after


@pytest.mark.timeout(180)
def test_a_run_that_diverges_everywhere_stops(ranks: Ranks, make_data: Callable[..., str], tmp_path: Path) -> None:
    changes = {"train__rewind": True, "train__max_rewinds": 1, "train__steps": 20}
    run = tiny_run(storage=str(tmp_path), data__path=make_data([3000]), **changes)
    (ends, _) = ranks(jobs.train_with_bad_samples, 2, run, list(range(1000)))
    message = "the loss diverged in steps 0 to 2, and 1 rewinds have not helped (their samples are in events.jsonl)"
    assert ends == ["rewound", message]
    (last,) = [e for e in rundir.events_log(run.run_dir).read() if e["event"] == "diverged"]
    assert (last["steps"], len(last["samples"])) == ([0, 3], 24)


@pytest.mark.timeout(180)
def test_a_rewind_that_leads_nowhere_deletes_nothing(
    ranks: Ranks, make_data: Callable[..., str], tmp_path: Path
) -> None:
    """Rewinds are switched on after the checkpoints of the good steps have gone."""
    changes = {"storage": str(tmp_path), "data__path": make_data([3000]), "train__steps": 20, "eval__every_steps": 0}
    changes["checkpoint__every_steps"] = 2
    run = tiny_run(train__stop_at=14, **changes)
    bad = SampleOrder(run, Mixture.open(run)).samples(8 * 8, 20 * 8).tolist()
    assert ranks(jobs.train_with_bad_samples, 1, run, bad)[0] == ["stopped"]
    again = tiny_run(train__rewind=True, **changes)
    for steps in ("8 to 14", "8 to 14"):  # the same command again comes to the same end
        (message,) = ranks(jobs.train_with_bad_samples, 1, again, bad)[0]
        assert message.startswith(f"the loss diverged in steps {steps}, and no checkpoint before them is left")
        assert [c.index.step for c in committed(run.run_dir) if isinstance(c, Checkpoint)] == [14, 12]


@pytest.mark.timeout(180)
def test_a_rewind_to_a_damaged_checkpoint_deletes_nothing(
    ranks: Ranks, make_data: Callable[..., str], tmp_path: Path
) -> None:
    """Only when an earlier one is loaded do the later ones go."""
    changes = {"storage": str(tmp_path), "data__path": make_data([3000]), "eval__every_steps": 0}
    changes |= {"train__rewind": True, "checkpoint__every_steps": 2, "checkpoint__keep": 1}
    run = tiny_run(train__stop_at=6, train__nan_at=[5], **changes)
    assert ranks(saves.train, 1, run)[0]["end"] == "stopped"
    (file,) = Path(run.run_dir).glob("checkpoints/step-00000004/*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    again = tiny_run(train__nan_at=[5, 6, 7], **changes)
    assert ranks(saves.train, 1, again)[0]["end"] == "rewound"
    skipping = rundir.with_rewinds(again, rundir.events_log(run.run_dir).read())
    assert "content differs from its sha256" in ranks(saves.train, 1, skipping)[0]["end"]
    assert [c.index.step for c in committed(run.run_dir) if isinstance(c, Checkpoint)] == [6, 4]
