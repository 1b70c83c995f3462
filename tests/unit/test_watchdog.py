"""A worker that hangs ends itself, whatever the storage does; tests/ray has it in whole runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2dist.train import rundir
from gpt2dist.train.watchdog import EXIT_CODE
from tests.conftest import ROOT, tiny_run

HANGING = """
import sys, time
from gpt2dist.train import watchdog
from tests.conftest import tiny_run
watchdog.GATHER_S, watchdog.PY_SPY_S = 0.5, 1.0
watchdog.Watchdog(tiny_run(storage=sys.argv[1], cluster__hang_timeout_s=1.0), 0, 1, lambda x: [x]).beat(1)
time.sleep(600)
"""


@pytest.mark.parametrize("storage", ["answers", "hangs"])
def test_a_worker_that_hangs_ends(storage: str, tmp_path: Path) -> None:
    events = Path(tiny_run(storage=str(tmp_path)).run_dir) / "events.jsonl"
    events.parent.mkdir(parents=True)
    if storage == "hangs":
        os.mkfifo(events)  # whoever opens it waits for ever
    command = [sys.executable, "-c", HANGING, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == EXIT_CODE
    assert list((events.parent / rundir.STACKS).iterdir())
