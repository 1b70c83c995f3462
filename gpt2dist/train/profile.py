"""A window of steps under torch's profiler."""

from __future__ import annotations

import gzip
import logging
import tempfile
from pathlib import Path

import torch

from gpt2dist.config import RunConfig
from gpt2dist.storage import StorageError, location, publish

logger = logging.getLogger(__name__)


class Profile:
    """Profiles the steps of `train.profile_steps` on rank 0 and writes <run dir>/profile/steps-A-B.json.gz.

    The file opens in chrome://tracing and ui.perfetto.dev.
    """

    def __init__(self, run: RunConfig, rank: int) -> None:
        self.start, self.stop = (run.train.profile_steps or (-1, -1)) if rank == 0 else (-1, -1)
        self.directory = location(run.run_dir) / "profile"
        self.profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Call before every step, and once after the last."""
        if step == self.start:
            self.profiler = torch.profiler.profile()  # of the CPU, and of CUDA where there is one
            self.profiler.start()
        elif step == self.stop:
            self.close(step)

    def close(self, step: int) -> None:
        """Write what there is, if anything; `step` is the first that is not in it."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        path = self.directory / f"steps-{self.start}-{step}.json.gz"
        try:
            with tempfile.TemporaryDirectory() as name:
                trace = Path(name) / "trace.json"
                profiler.export_chrome_trace(str(trace))
                publish(path, gzip.compress(trace.read_bytes()))
        except (OSError, StorageError) as e:  # no reason to end a run
            logger.warning("%s: the profile could not be written: %s", path, e)
