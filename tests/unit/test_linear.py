"""Products in fp32 in place of 16-bit ones, and of few rows, against torch's own in fp64 and fp32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2dist.model import linear
from gpt2dist.model.attention import attention, keeps_probabilities, use_units
from gpt2dist.model.gpt2 import GPT2Config, build
from gpt2dist.model.linear import FEW_ROWS, Linear, product_dtype

IN, OUT = 200, 96
CPU = torch.device("cpu")


@pytest.fixture
def without_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without units for 16-bit types, whatever this one has."""
    monkeypatch.setattr(linear, "WITHOUT_UNITS", frozenset({torch.bfloat16, torch.float16}))


def operands(dtype: torch.dtype, *rows: int) -> tuple[Linear, Tensor]:
    torch.manual_seed(0)
    return Linear(IN, OUT).to(dtype), torch.randn(*rows, IN).to(dtype).requires_grad_()


def error(got: Tensor | None, exact: Tensor | None) -> float:
    """Largest, relative to the largest value."""
    assert got is not None
    assert exact is not None
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.usefixtures("without_units")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(1,), (2, 3), (5, 40)])
def test_16_bit_products_are_rounded_once(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    """Forward and all gradients lie within half a unit in the last place of fp64 ones of the same operands."""
    layer, x = operands(dtype, *rows)
    exact = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    upstream = torch.randn(*rows, OUT).to(dtype)
    out, expected = layer(x), F.linear(*exact)
    out.backward(upstream)
    expected.backward(upstream.double())
    assert out.dtype == dtype
    assert out.shape == expected.shape
    half = torch.finfo(dtype).eps / 2
    assert error(out, expected.detach()) <= half
    for mine, theirs in zip((x, layer.weight, layer.bias), exact, strict=True):
        assert mine.grad is not None
        assert mine.grad.dtype == dtype
        assert error(mine.grad, theirs.grad) <= half


@pytest.mark.usefixtures("without_units")
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_rounded_once(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 50, 16).bfloat16().requires_grad_() for _ in range(3))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    upstream = torch.randn(2, 3, 50, 16).bfloat16()
    out = attention(q, k, v, None, dropout=0.0, causal=causal)
    expected = F.scaled_dot_product_attention(*exact, is_causal=causal)
    out.backward(upstream)
    expected.backward(upstream.double())
    assert out.dtype == torch.bfloat16
    half = torch.finfo(torch.bfloat16).eps / 2
    assert error(out, expected.detach()) <= half
    for mine, theirs in zip((q, k, v), exact, strict=True):
        assert error(mine.grad, theirs.grad) <= half


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("length", [16, 50, 256])
def test_kept_probabilities_are_as_exact_as_torch(length: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences on CPUs with units for bf16: errors against fp64 like those of torch's kernel."""
    monkeypatch.setattr(linear, "WITHOUT_UNITS", frozenset())
    assert keeps_probabilities(length, torch.bfloat16, CPU)
    torch.manual_seed(0)
    qkv = [torch.randn(2, 3, length, 24).bfloat16() for _ in range(3)]
    upstream = torch.randn(2, 3, length, 24).bfloat16()

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in qkv]
        out = function(*inputs)
        out.backward(upstream.to(dtype))
        return [out.detach(), *(t.grad for t in inputs if t.grad is not None)]

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, None, dropout=0.0, causal=True)

    use_units(torch.bfloat16, CPU)
    try:
        mine = run(torch.compile(ours) if compiled else ours, torch.bfloat16)
    finally:
        use_units(torch.float32, CPU)
    exact, theirs = run(torchs, torch.float64), run(torchs, torch.bfloat16)
    for a, b, c in zip(mine, theirs, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert ((a - c).norm() / c.norm()).item() < max(1.5 * ((b - c).norm() / c.norm()).item(), 4e-3)


@pytest.mark.usefixtures("without_units")
def test_an_overflow_of_fp16_is_seen() -> None:
    """The loss scale falls only if a gradient becomes infinite."""
    layer, x = operands(torch.float16, 64)
    layer(x).backward(torch.full((64, OUT), 60000.0, dtype=torch.float16))
    assert layer.bias.grad is not None
    assert layer.bias.grad.isinf().all()


@torch.no_grad()
@pytest.mark.parametrize("out", [96, 97], ids=["in slices", "in one"])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (8, 1), (3, 5), (FEW_ROWS,), (FEW_ROWS + 1,)])
@pytest.mark.parametrize("intel", [True, False])
def test_few_rows(monkeypatch: pytest.MonkeyPatch, rows: tuple[int, ...], out: int, intel: bool) -> None:
    monkeypatch.setattr("gpt2dist.model.linear.INTEL", intel)
    torch.manual_seed(0)
    layer, x = Linear(IN, out), torch.randn(*rows, IN)
    got = layer(x)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert got.shape == expected.shape
    assert got.is_contiguous()  # as F.linear's
    assert error(got, expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("rows", [(1,), (1, 1), (8, 1), (3, 5), (FEW_ROWS,), (FEW_ROWS + 1,)])
def test_few_bf16_rows(monkeypatch: pytest.MonkeyPatch, rows: tuple[int, ...]) -> None:
    """On a CPU with units for bf16: rounded at most twice, with the bias and before it."""
    monkeypatch.setattr(linear, "WITHOUT_UNITS", frozenset())
    layer, x = operands(torch.bfloat16, *rows)
    layer.bias.normal_()
    got = layer(x)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert got.dtype == torch.bfloat16
    assert got.shape == expected.shape
    assert got.is_contiguous()
    assert error(got, expected) <= torch.finfo(torch.bfloat16).eps


def test_other_types_go_to_torch(without_units: None) -> None:
    layer, x = operands(torch.float32, 2, 30)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert product_dtype(torch.bfloat16, CPU) == torch.float32
    assert product_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    assert product_dtype(torch.float64, CPU) == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_follows_its_fp32_gradients(dtype: torch.dtype, without_units: None) -> None:
    """The loss and the direction of the gradient of 16-bit weights are those of the same weights in fp32."""
    config = GPT2Config(n_layer=2, n_head=2, n_embd=64, n_positions=32)
    low = build(config, 0).to(dtype)
    full = build(config, 0)
    full.load_state_dict({name: p.float() for name, p in low.state_dict().items()})
    tokens = torch.randint(0, 50257, (2, 33), generator=torch.Generator().manual_seed(1))
    losses = [model(tokens) for model in (low, full)]
    (losses[0] * 1024).backward()  # fp16 loses small gradients without a scale
    losses[1].backward()
    assert abs(losses[0].item() - losses[1].item()) < 0.02
    for (name, a), b in zip(low.named_parameters(), full.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        cosine = F.cosine_similarity(a.grad.float().flatten(), b.grad.flatten(), dim=0)
        assert cosine > 0.999, name
