"""A disk that fills up during a save, through the command line; and a run with nothing but damaged checkpoints."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2dist.train import checkpoint
from tests.conftest import tiny_run
from tests.disks import small_disk
from tests.ray.test_faults import undisturbed
from tests.ray.test_train import Run, assert_audit, events, logged, steps_done, training, wait_for, write
from tests.unit.test_checkpoint import flip

SMALL: dict[str, Any] = {
    "model__n_embd": 8,  # a checkpoint of 4.8 MB
    "eval__every_steps": 0,
    "checkpoint__every_steps": 20,
    "checkpoint__retry_minutes": 0.1,
    "train__steps": 100_000,
}


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_disk_that_fills_up(
    ranks: Callable[..., list[Any]], make_data: Callable[..., str], gpt2dist: Run, tmp_path: Path
) -> None:
    """20 MB, filled twice: the first time there is room again, the second time there is none until the end."""
    with small_disk(tmp_path / "disk", 20) as disk:
        run = tiny_run(storage=str(disk.path), data__path=make_data([30_000]), **SMALL)
        with training(write(run, tmp_path)) as process:
            wait_for(lambda: len(events(run, "commit")) >= 2)
            disk.fill(leave=3 << 20)  # less than a checkpoint: the save fills it
            wait_for(lambda: events(run, "save_failed"), 60)
            failed = events(run, "save_failed")[0]
            wait_for(lambda: steps_done(run) > failed["step"] + 10, 60)  # training goes on
            before = len(events(run, "commit"))
            disk.make_room()
            wait_for(lambda: len(events(run, "commit")) > before, 60)  # it was tried again
            disk.fill()
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=90)
        assert process.returncode == 1, output
        assert re.search(rf"step {failed['step']} could not be saved \(OSError: .*No space left on device", output)
        assert "trying again later" in output
        assert f"the disk of {run.run_dir} is full: training goes on" in output
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        told = re.search(
            r"error: training failed: the state of step (\d+) could not be saved: OSError: \[Errno 28\] No space "
            r"left on device; the newest checkpoint is that of step (\d+); log: ",
            line,
        )
        assert told, line
        assert "Traceback" not in output
        newest = checkpoint.newest(run.run_dir)
        assert newest is not None
        assert newest.index.step == int(told[2]) < int(told[1])
        checkpoint.verify(newest)
        assert len(events(run, "start")) == 1
        disk.make_room()
        stop_at = int(told[2]) + 10
        done = gpt2dist("train", f"{run.name}.toml", "--set", f"train.stop_at={stop_at}")
        assert done.returncode == 0, done.stderr
        assert [e["step"] for e in events(run, "start")] == [0, newest.index.step]
        assert_audit(gpt2dist, run, stop_at)
        shutil.copytree(run.run_dir, tmp_path / run.name)
    on_disk = run.model_copy(update={"storage": str(tmp_path)})
    assert logged(on_disk) == undisturbed(on_disk, ranks, 2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_damaged_checkpoints_through_the_command_line(
    make_data: Callable[..., str], gpt2dist: Run, tmp_path: Path
) -> None:
    """Of the newest: the one before is used, and it is said. Of all: the run does not begin again by itself."""
    run = tiny_run(storage=str(tmp_path), data__path=make_data([3000]), eval__every_steps=0, train__steps=16)
    run_file = str(write(run, tmp_path))
    assert gpt2dist("train", run_file, "--set", "train.stop_at=8").returncode == 0
    flip(Path(checkpoint.step_directory(run.run_dir, 8)) / "rank-00001.safetensors")
    done = gpt2dist("train", run_file, "--set", "train.stop_at=12")
    assert done.returncode == 0, done.stderr
    assert "checkpoint of step 8 is damaged and left out: " in done.stdout
    assert "step-00000008/rank-00001.safetensors: content differs from its sha256" in done.stdout
    assert [e["step"] for e in events(run, "start")] == [0, 4]
    assert_audit(gpt2dist, run, 12)

    for step in (8, 12):
        flip(next(Path(checkpoint.step_directory(run.run_dir, step)).glob("rank-00000*")))
    verified = gpt2dist("checkpoint", "verify", run.run_dir)
    assert verified.returncode == 1
    assert [line.split(":")[1] for line in verified.stdout.splitlines()] == [" DAMAGED", " DAMAGED"]
    refused = gpt2dist("train", run_file)
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert f"error: training failed: {run.run_dir}: no good checkpoint is left: " in line
    assert "step-00000012/rank-00000.2.safetensors: content differs" in line
    assert len(events(run, "start")) == 2
    assert steps_done(run) == 12

    for path in (Path(run.run_dir) / "checkpoints").glob("*/rank-00000*"):
        path.unlink()  # this is seen before anything starts
    refused = gpt2dist("train", run_file)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "rank-00000.2.safetensors: missing" in line
    assert line.endswith("to start anew choose another name, or delete the run's directory")
    assert gpt2dist("train", run_file, "--set", "name=anew", "--set", "train.stop_at=2").returncode == 0
