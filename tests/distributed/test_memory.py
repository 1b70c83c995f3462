from __future__ import annotations

from typing import Any

import pytest

from tests.bench.memory import DEEP, SHAPE, ratio

FEW_TOKENS = {**DEEP, "data": {"seq_len": 64}, "batch": {"micro_sequences": 1, "micro_batches": 4}}
"""Here the most is needed where gradients are reduced."""
DROPOUT = {**SHAPE, "model": {**SHAPE["model"], "n_layer": 8, "dropout": 0.1}, "data": {"seq_len": 512}}
"""A third of its memory is what attention with dropout keeps."""
MANY_HEADS: dict[str, Any] = {
    "model": {"n_layer": 2, "n_head": 24, "n_embd": 384, "dropout": 0.1},
    "data": {"seq_len": 1024},
    "batch": {"micro_sequences": 1, "micro_batches": 4},
    "train__activation_checkpointing": True,
}
"""The most is needed where attention of one block goes backward."""
CHECKPOINTING = {**DEEP, "train__activation_checkpointing": True}


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_peak_memory_is_what_the_dry_run_predicts(stage: int) -> None:
    assert 0.9 < ratio("bf16", stage) < 1.1


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("precision", "stage", "changes"),
    [
        ("fp32", 2, {**DEEP, "model__dropout": 0.1}),
        ("bf16", 3, DROPOUT),
        ("fp32", 2, MANY_HEADS),
    ],
    ids=["deep", "long", "checkpointing"],
)
def test_peak_memory_with_dropout(precision: str, stage: int, changes: dict[str, Any]) -> None:
    assert 0.9 < ratio(precision, stage, **changes) < 1.1


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (0, {}),
        (1, DEEP),
        (2, DEEP),
        (3, DEEP),
        (3, SHAPE),
        (3, FEW_TOKENS),
        (0, CHECKPOINTING),
        (1, CHECKPOINTING),
        (2, CHECKPOINTING),
        (3, CHECKPOINTING),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(map(str, value)) or "tiny",
)
def test_peak_memory_in_fp32_is_what_plan_says(stage: int, changes: dict[str, Any]) -> None:
    assert 0.9 < ratio("fp32", stage, **changes) < 1.1
