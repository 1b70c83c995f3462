from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gpt2dist.model.loss import ROWS, linear_cross_entropy

VOCAB, PADDED, WIDTH = 70, 96, 24


@pytest.mark.parametrize("n", [1, ROWS["cpu"], 3 * ROWS["cpu"] + 5])
@pytest.mark.parametrize("weight_of_loss", [1.0, 0.0, 1e-4])
def test_loss_and_gradients_equal_the_plain_form(n: int, weight_of_loss: float) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(n, WIDTH, dtype=torch.float64), torch.randn(PADDED, WIDTH, dtype=torch.float64)
    targets = torch.randint(VOCAB, (n,))
    plain = [t.clone().requires_grad_() for t in (x, w)]
    expected = F.cross_entropy(F.linear(*plain)[:, :VOCAB], targets)
    (expected * weight_of_loss).backward()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        ours = [t.to(dtype).requires_grad_() for t in (x, w)]
        loss = linear_cross_entropy(ours[0], ours[1], targets, VOCAB)
        assert loss.dtype == torch.float32
        assert abs(loss.item() / expected.item() - 1) < tolerance
        (loss * weight_of_loss).backward()
        for a, b in zip(ours, plain, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            error = (a.grad.double() - b.grad).norm()
            assert error <= tolerance * b.grad.norm()
        assert ours[1].grad is not None
        assert not ours[1].grad[VOCAB:].any()  # padding rows of the table never move
        with torch.no_grad():
            again = linear_cross_entropy(ours[0], ours[1], targets, VOCAB)
        assert abs(again.item() / loss.item() - 1) < 1e-6


def test_extreme_logits_stay_finite() -> None:
    x = torch.full((2, WIDTH), 100.0).requires_grad_()
    w = torch.eye(PADDED, WIDTH).mul(1000).requires_grad_()
    loss = linear_cross_entropy(x, w, torch.tensor([3, VOCAB - 1]), VOCAB)
    loss.backward()
    assert torch.isfinite(loss)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
