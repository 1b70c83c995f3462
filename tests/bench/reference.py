"""Peers of the training benchmark, one a process: python -m tests.bench.reference KIND STEPS WARM → median tokens/s.

plain: the usual public GPT-2 training code, fp32. fast: the same with torch.compile and fused AdamW. transformers:
Hugging Face's GPT2LMHeadModel with these two and SDPA. fast-bf16, transformers-bf16: under bf16 autocast as well.
On a machine with a GPU, there, at the 124M shape, and with TF32 for fp32 products, as such code does.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ON_GPU = torch.cuda.is_available()
LAYERS, HEADS, WIDTH, BATCH, T = (12, 12, 768, 32, 1024) if ON_GPU else (6, 6, 384, 8, 256)
MICRO_BATCHES = 4 if ON_GPU else 1
VOCAB = 50304


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.qkv(x).split(WIDTH, dim=2)
        q, k, v = (a.view(b, t, HEADS, c // HEADS).transpose(1, 2) for a in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).contiguous().view(b, t, c))
        return out


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = SelfAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU("tanh"), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        out: Tensor = x + self.mlp(self.norm_2(x))
        return out


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(T, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.tokens.weight
        self.apply(self._initialize)

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.size(1), device=ids.device))
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1))


class Transformers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=VOCAB, n_positions=T, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, attn_implementation="sdpa"
        )
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        config.use_cache = False
        self.model = GPT2LMHeadModel(config)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(ids).logits  # its own loss would shift the targets once more
        return F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1))


def main(kind: str, steps: int, warm: int) -> None:
    """Prints tokens/s of the median step after `warm` ones."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    device = torch.device("cuda" if ON_GPU else "cpu")
    if ON_GPU:
        torch.set_float32_matmul_precision("high")
    fast = kind != "plain"
    model: nn.Module = Transformers() if kind.startswith("transformers") else LanguageModel()
    model.to(device)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=fast or None)
    step_model = torch.compile(model) if fast else model
    precision = torch.autocast(device.type, dtype=torch.bfloat16, enabled=kind.endswith("bf16"))
    data = np.random.default_rng(0).integers(0, 50257, 200_000).astype(np.uint16)

    def batch() -> tuple[Tensor, ...]:
        at = torch.randint(len(data) - T - 1, (BATCH,)).tolist()
        pair = (torch.stack([torch.from_numpy(data[i + s : i + s + T].astype(np.int64)) for i in at]) for s in (0, 1))
        return tuple(t.pin_memory().to(device, non_blocking=True) if ON_GPU else t for t in pair)

    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        for _ in range(MICRO_BATCHES):
            ids, targets = batch()
            with precision:
                loss = step_model(ids, targets)
            (loss / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - start)
    print(MICRO_BATCHES * BATCH * T / statistics.median(seconds[warm:]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
