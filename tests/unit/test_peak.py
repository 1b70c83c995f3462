"""The peak that MFU is measured against."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from gpt2dist.model.linear import product_dtype
from gpt2dist.train.peak import DTYPES, peak_flops
from tests.conftest import tiny_run

pytestmark = pytest.mark.alone


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_larger_product_is_much_faster(precision: str, two_threads: None) -> None:
    """With 1024³ the second thread had nothing to do in bf16, and MFU came out nearly twice as high as it was."""
    device = torch.device("cpu")
    peak = peak_flops(tiny_run(train={"steps": 1, "precision": precision}), device)
    n = 2560
    a = torch.randn(n, n).to(product_dtype(DTYPES[precision], device))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    assert 2 * n**3 / min(seconds) < 1.3 * peak
