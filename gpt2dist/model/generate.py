"""Sampling from a model."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2dist.model.gpt2 import GPT2


@torch.no_grad()
def sample(
    model: GPT2, prompt: Tensor, max_new_tokens: int, *, temperature: float, top_k: int, seed: int, stop: int
) -> Tensor:
    """Continue a prompt token by token.

    Args:
        model: in eval mode; its last n_positions tokens are the context.
        prompt: int64 [T], T ≥ 1.
        max_new_tokens: length of the continuation, unless `stop` is drawn before.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens; 0 among all.
        seed: of the draws.
        stop: token id that ends the text, and is left out.

    Returns:
        int64 [≤ max_new_tokens], the continuation.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = prompt[None]
    for _ in range(max_new_tokens):
        logits = model.logits(ids[:, -model.config.n_positions :])[0, -1].float().cpu()
        if temperature == 0:
            token = logits.argmax()[None]
        else:
            if top_k:
                logits[logits < logits.topk(min(top_k, model.config.vocab_size)).values[-1]] = -torch.inf
            token = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
        if int(token) == stop:
            break
        ids = torch.cat([ids, token.to(ids.device)[None]], dim=1)
    return ids[0, len(prompt) :]
