from __future__ import annotations

import pytest

from tests.bench.memory import ratios


@pytest.mark.timeout(240)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_peak_memory_is_what_the_dry_run_predicts(stage: int) -> None:
    found = ratios("bf16", stage)
    assert min(found) > 0.9, found
    assert max(found) < 1.1, found
