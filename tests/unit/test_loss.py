from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gpt2dist.model import linear, loss
from gpt2dist.model.loss import linear_cross_entropy

VOCAB, PADDED, WIDTH = 70, 96, 24


@pytest.mark.parametrize("units", [True, False], ids=["own products", "fp32 products"])
@pytest.mark.parametrize("n", [1, loss.ROWS["cpu"], 2 * loss.CHUNK, 2 * loss.CHUNK + 69])
@pytest.mark.parametrize("weight_of_loss", [1.0, 0.0, 1e-4])
def test_loss_and_gradients_equal_the_plain_form(
    monkeypatch: pytest.MonkeyPatch, n: int, weight_of_loss: float, units: bool
) -> None:
    monkeypatch.setattr(linear, "WITHOUT_UNITS", frozenset() if units else {torch.bfloat16})
    torch.manual_seed(0)
    x, w = torch.randn(n, WIDTH, dtype=torch.float64), torch.randn(PADDED, WIDTH, dtype=torch.float64)
    targets = torch.randint(VOCAB, (n,))
    plain = [t.clone().requires_grad_() for t in (x, w)]
    expected = F.cross_entropy(F.linear(*plain)[:, :VOCAB], targets)
    (expected * weight_of_loss).backward()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        ours = [t.to(dtype).requires_grad_() for t in (x, w)]
        result = linear_cross_entropy(ours[0], ours[1], targets, VOCAB)
        assert result.dtype == torch.float32
        assert abs(result.item() / expected.item() - 1) < tolerance
        (result * weight_of_loss).backward()
        for a, b in zip(ours, plain, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            error = (a.grad.double() - b.grad).norm()
            assert error <= tolerance * b.grad.norm()
        assert ours[1].grad is not None
        assert not ours[1].grad[VOCAB:].any()  # padding rows of the table never move
        with torch.no_grad():
            again = linear_cross_entropy(ours[0], ours[1], targets, VOCAB)
        assert abs(again.item() / result.item() - 1) < (1e-3 if units and dtype == torch.bfloat16 else 1e-6)


def test_extreme_logits_stay_finite() -> None:
    x = torch.full((2, WIDTH), 100.0).requires_grad_()
    w = torch.eye(PADDED, WIDTH).mul(1000).requires_grad_()
    result = linear_cross_entropy(x, w, torch.tensor([3, VOCAB - 1]), VOCAB)
    result.backward()
    assert torch.isfinite(result)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
