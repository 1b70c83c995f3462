from __future__ import annotations

import pytest

from tests.bench.memory import rows


@pytest.mark.timeout(240)
def test_peak_memory_is_what_the_dry_run_predicts() -> None:
    for row in rows():
        assert row["low"] > 0.9, row
        assert row["high"] < 1.1, row
