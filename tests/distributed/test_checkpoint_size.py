from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2dist.cluster.plan import arithmetic
from gpt2dist.train import checkpoint
from tests.conftest import tiny_run
from tests.distributed import jobs


@pytest.mark.timeout(240)
def test_size_of_checkpoints_is_what_plan_says(
    ranks: Callable[..., list[Any]], make_data: Callable[..., str], tmp_path: Path
) -> None:
    """To 1%, with all files of the directory: at every stage, with Muon (one moment for matrices), with an average."""
    changes: dict[str, Any] = {"model": {"n_layer": 4, "n_head": 2, "n_embd": 128}, "train__stop_at": 1}
    changes |= {"storage": str(tmp_path), "data__path": make_data([3000]), "eval__every_steps": 0}
    runs = [tiny_run(name=f"stage-{s}", train__zero_stage=s, **changes) for s in (0, 1, 2, 3)]
    runs.append(tiny_run(name="muon", train__zero_stage=0, optim__name="muon", **changes))
    runs.append(tiny_run(name="average", optim__ema_decay=0.9, **changes))
    ranks(jobs.train_runs, 2, runs)
    for run in runs:
        found = checkpoint.newest(run.run_dir)
        assert found
        size = sum(path.stat().st_size for path in Path(str(found.path)).iterdir())
        assert size == pytest.approx(arithmetic(run)["checkpoint_bytes"], rel=0.01), run.name
