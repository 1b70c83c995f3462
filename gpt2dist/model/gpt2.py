"""GPT-2 in one file: architecture, presets, initialization, parameter and FLOP counts.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), and OpenAI's released code:
a stack of pre-LayerNorm blocks, GELU (tanh form), learned positions, output head tied to the token embedding.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2dist.config import RunConfig
from gpt2dist.data.tokenizer import EOT
from gpt2dist.model.attention import attention
from gpt2dist.model.linear import Linear, linear
from gpt2dist.model.loss import linear_cross_entropy

VOCAB_SIZE = 50257
VOCAB_MULTIPLE = 128
"""The embedding table is padded to a multiple of this: matrix units like round sizes."""

# (n_layer, n_head, n_embd)
PRESETS = {
    "tiny": (2, 2, 64),
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}


@dataclass(frozen=True)
class GPT2Config:
    """Shape of one model."""

    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    dropout: float = 0.0
    vocab_size: int = VOCAB_SIZE
    document_mask: bool = False
    """Attention stays inside documents, and each begins at position 0."""
    activation_checkpointing: bool = False
    """Of a block only the input is kept; backward computes the rest again (Chen et al. 2016)."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @classmethod
    def from_run(cls, run: RunConfig) -> GPT2Config:
        """The shape that a run file asks for."""
        m = run.model
        if m.preset:
            n_layer, n_head, n_embd = PRESETS[m.preset]
        else:
            n_layer, n_head, n_embd = m.n_layer or 0, m.n_head or 0, m.n_embd or 0  # config.py requires them
        return cls(
            n_layer,
            n_head,
            n_embd,
            m.n_positions or run.data.seq_len,
            m.dropout,
            document_mask=m.document_mask,
            activation_checkpointing=run.train.activation_checkpointing,
        )


def documents(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of packed documents, ids: int64 [B, T]: positions [B, T], and what each token attends to: bool [B, 1, T, T].

    <|endoftext|> belongs to the document that it ends; the token after it has position 0.
    """
    columns = torch.arange(ids.shape[1], device=ids.device)
    first = F.pad(ids == EOT, (1, -1))  # of a document
    start = torch.where(first, columns, 0).cummax(dim=1).values
    same = start[:, None, :, None] == start[:, None, None, :]
    return columns - start, same & (columns <= columns[:, None])


class LayerCache:
    """Keys and values of one layer, each [B, n_head, capacity, d_k], filled from the left."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store those of the next tokens, [B, n_head, T, d_k]; returns all so far."""
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class KVCache:
    """What attention needs of the tokens so far, so that the next one is computed alone.

    The rows of a batch end together: shorter ones begin with padding, which nobody attends to and no position counts.
    """

    def __init__(self, c: GPT2Config, capacity: int, padding: Tensor, like: Tensor) -> None:
        """capacity: tokens of a row, padding included; padding: int64 [B]; like: has the weights' dtype and device."""
        shape = (len(padding), c.n_head, capacity, c.n_embd // c.n_head)
        self.layers = [LayerCache(shape, like) for _ in range(c.n_layer)]
        columns = torch.arange(capacity, device=like.device)
        self._positions = (columns - padding[:, None]).clamp(min=0)
        self._real = columns >= padding[:, None]
        self._padded = bool(padding.any())

    def place(self, count: int) -> tuple[Tensor, Tensor | None]:
        """The next tokens' positions [B, count], and what they attend to: bool [B, 1, count, length] or all (None)."""
        start = self.layers[0].length
        end = start + count
        positions = self._positions[:, start:end]
        if not self._padded and (count == 1 or start == 0):
            return positions, None
        columns = torch.arange(end, device=positions.device)
        before = columns <= columns[start:, None]
        itself = columns == columns[start:, None]  # also padding must attend to something
        return positions, (before & (self._real[:, None, None, :end] | itself))


class Attention(nn.Module):
    """Causal multi-head attention: softmax(QKᵀ/√d_k)V (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, c: GPT2Config) -> None:
        super().__init__()
        self.n_head = c.n_head
        self.dropout = c.dropout
        self.c_attn = Linear(c.n_embd, 3 * c.n_embd)
        self.c_proj = Linear(c.n_embd, c.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """x, result: [B, T, n_embd]; mask: bool, what each token attends to, None: all before it."""
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            k, v = cache.append(k, v)
        p = self.dropout if self.training else 0.0
        y = attention(q, k, v, mask, dropout=p, causal=mask is None and T > 1)
        out: Tensor = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return out


class MLP(nn.Module):
    """Feed-forward: 4× wider, GELU in the tanh form of OpenAI's code."""

    def __init__(self, c: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Linear(c.n_embd, 4 * c.n_embd)
        self.c_proj = Linear(4 * c.n_embd, c.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x, result: [B, T, n_embd]."""
        out: Tensor = self.c_proj(gelu(self.c_fc(x)))
        return out


def gelu(x: Tensor) -> Tensor:
    """x/2·(1 + tanh u), u = √(2/π)·(x + 0.044715·x³) (Hendrycks & Gimpel 2016); x, result: any shape."""
    if torch.compiler.is_compiling():  # as x·σ(2u), since a compiled tanh takes three times as long as a sigmoid
        y = x.float()
        return (y * torch.sigmoid(math.sqrt(8 / math.pi) * (y + 0.044715 * y**3))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


class Block(nn.Module):
    """x + attention(LN(x)), then x + mlp(LN(x))."""

    def __init__(self, c: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.n_embd, eps=1e-5)
        self.attn = Attention(c)
        self.ln_2 = nn.LayerNorm(c.n_embd, eps=1e-5)
        self.mlp = MLP(c)
        self.dropout = c.dropout

    def drop(self, x: Tensor) -> Tensor:
        """Dropout in training; not called where it would do nothing, which counts when tokens come one by one."""
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """x, result: [B, T, n_embd]; mask, cache: see `Attention`."""
        x = x + self.drop(self.attn(self.ln_1(x), mask, cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class Embedding(nn.Embedding):
    """A table, as `nn.Embedding`."""

    def reset_parameters(self) -> None:
        """See `Linear.reset_parameters`."""
        if not self.weight.is_meta:
            super().reset_parameters()


class TokenEmbedding(Embedding):
    """Rows of the table; on the CPU its gradient are rows too, summed in fp32, to be added to the head's."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64 [B, T]; result: [B, T, n_embd]."""
        if ids.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(ids)
        out: Tensor = _Rows.apply(ids, self.weight)  # type: ignore[no-untyped-call]
        return out


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        rows, place = ids.flatten().unique(return_inverse=True)
        sums = torch.zeros(len(rows), grad.shape[-1]).index_add_(0, place, grad.flatten(0, -2).float())
        return None, torch.sparse_coo_tensor(
            rows[None], sums.to(grad.dtype), ctx.shape, is_coalesced=True, check_invariants=False
        )


class Head(nn.Module):
    """Logits by the tied embedding table, or the loss; no softmax ever sees the table's padding rows."""

    def __init__(self, c: GPT2Config, table: nn.Embedding) -> None:
        super().__init__()
        self.weight = table.weight
        self.vocab_size = c.vocab_size
        self.compiled = False  # the loss; see `linear_cross_entropy`
        bias = torch.zeros(c.padded_vocab_size, device="cpu")  # also where the parameters have no values yet
        bias[c.vocab_size :] = -torch.inf
        self.register_buffer("padding", bias, persistent=False)
        self.padding: Tensor

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x: [B, T, n_embd]; result: [B, T, padded vocabulary], the padding being -inf.

        With targets, int64 [B, T]: their mean cross-entropy, scalar fp32.
        """
        if targets is None:
            return linear(x, self.weight, self.padding.to(x.dtype))
        rows, wanted = x.flatten(0, 1), targets.flatten()
        return linear_cross_entropy(rows, self.weight, wanted, self.vocab_size, compiled=self.compiled)


class GPT2(nn.Module):
    """The language model. Parameter names follow OpenAI's variables (wte, wpe, h.N.attn.c_attn, …)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        c = self.config = config
        self.wte = TokenEmbedding(c.padded_vocab_size, c.n_embd)
        self.wpe = Embedding(c.n_positions, c.n_embd)
        self.dropout = nn.Dropout(c.dropout)
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd, eps=1e-5)
        self.head = Head(c, self.wte)

    def logits(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids: int64 [B, T], T ≤ n_positions; result: [B, T, padded vocabulary] in the weights' dtype.

        With a cache, `ids` go on where it ends, they enter it, and only what follows the last one is computed: T = 1;
        a row of it is one document.
        """
        out: Tensor = self.head(self.hidden(ids, cache))
        return out

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the head sees, [B, T, n_embd]; see `logits`."""
        mask = None
        if cache is not None:
            positions, mask = cache.place(ids.shape[1])
        elif self.config.document_mask:
            positions, mask = documents(ids)
        else:
            positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.dropout(self.wte(ids) + self.wpe(positions))
        for i, block in enumerate(self.h):
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False)  # with the same dropout: it restores the RNG
            else:
                x = block(x, mask, cache and cache.layers[i])
        out: Tensor = self.ln_f(x if cache is None else x[:, -1:])
        return out

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats of each token given those before it.

        tokens: int64 [B, T+1]; result: scalar fp32, −1/(B·T) Σ log P(w_i | w_<i).
        """
        loss: Tensor = self.head(self.hidden(tokens[:, :-1]), tokens[:, 1:])
        return loss


def initial_value(name: str, shape: tuple[int, ...], config: GPT2Config, seed: int) -> Tensor:
    """Initial fp32 values of one parameter, as in OpenAI's code; they depend on (seed, name, shape) alone.

    N(0, 0.02) for matrices and token embeddings, N(0, 0.01) for positions, residual projections scaled by
    1/√(2·n_layer), zero biases, unit LayerNorm; the padding rows of the embedding table are zero.
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = 0.01 if name == "wpe.weight" else 0.02
    if name.endswith("c_proj.weight"):
        std /= math.sqrt(2 * config.n_layer)
    digest = hashlib.sha256(f"init/{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value = torch.empty(shape).normal_(0.0, std, generator=generator)
    if name == "wte.weight":
        value[config.vocab_size :] = 0.0
    return value


def assemble(config: GPT2Config, value: Callable[[str], Tensor]) -> GPT2:
    """A model of the tensors that `value` returns for its parameters' names: taken over, not copied."""
    with torch.device("meta"):
        model = GPT2(config)
    state = {name: value(name) for name, _ in model.named_parameters()}
    model.load_state_dict(state, strict=False, assign=True)
    model.head.weight = model.wte.weight
    return model


def build(config: GPT2Config, seed: int) -> GPT2:
    """A new model with initial weights, fp32 on the CPU."""
    shapes = parameter_shapes(config)
    return assemble(config, lambda name: initial_value(name, shapes[name], config, seed))


@functools.cache
def parameter_shapes(config: GPT2Config) -> Mapping[str, tuple[int, ...]]:
    """Name → shape of every parameter, without allocating any."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT2(config).named_parameters()}


def count_parameters(config: GPT2Config, *, published: bool = True) -> int:
    """Number of parameters; `published` leaves out the padding rows of the embedding table."""
    total = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    return total - (config.padded_vocab_size - config.vocab_size) * config.n_embd if published else total


def flops_per_token(config: GPT2Config, seq_len: int) -> int:
    """Training FLOPs a token: 6·N + 12·L·C·T, N without the position table (Chowdhery et al. 2022, app. B)."""
    n = count_parameters(config) - config.n_positions * config.n_embd
    return 6 * n + 12 * config.n_layer * config.n_embd * seq_len
