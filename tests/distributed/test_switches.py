"""Switches of the model under ZeRO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import tiny_run
from tests.distributed import jobs
from tests.distributed.test_engine import logged


def test_activation_checkpointing_changes_no_bit(
    tmp_path: Path, make_data: Callable[..., str], ranks: Callable[..., list[Any]]
) -> None:
    data = make_data([3000])
    runs = [
        tiny_run(
            name=f"{stage}-{switch}",
            storage=str(tmp_path / "runs"),
            data__path=data,
            model__document_mask=True,
            train={
                "steps": 3,
                "precision": precision,
                "zero_stage": stage,
                "peak_tflops": 1.0,
                "activation_checkpointing": switch,
            },
            eval__every_steps=0,
        )
        for stage, precision in ((0, "fp32"), (2, "bf16"), (3, "bf16"))
        for switch in (False, True)
    ]
    ranks(jobs.train_runs, 2, runs)
    losses = [logged(run) for run in runs]
    for without, with_switch in zip(losses[::2], losses[1::2], strict=True):
        assert without == with_switch
