from __future__ import annotations

import pytest

from tests.bench.memory import ratio


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_peak_memory_is_what_the_dry_run_predicts(stage: int) -> None:
    assert 0.9 < ratio("bf16", stage) < 1.1
