"""Loss, perplexity and next-token accuracy over a prepared data set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gpt2dist.data.mixture import MixedSplit
from gpt2dist.data.order import Ids
from gpt2dist.model.gpt2 import GPT2

LOGIT_ROWS = 1024
"""Tokens whose logits are in memory at a time: 200 MB in fp32, and as much again twice."""


@dataclass(frozen=True)
class Score:
    """Sums over predicted tokens; those of disjoint samples add up."""

    loss_sum: float = 0.0
    """−Σ log P(token | those before it), in nats."""
    correct: int = 0
    """Tokens that were the likeliest ones."""
    tokens: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.loss_sum + other.loss_sum, self.correct + other.correct, self.tokens + other.tokens)

    @property
    def loss(self) -> float:
        """Mean over the tokens, in nats."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is beyond a float, NaN where the loss is."""
        return math.inf if self.loss >= 709 else math.exp(self.loss)

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the likeliest ones."""
        return self.correct / self.tokens


@torch.inference_mode()
def evaluate(model: GPT2, split: MixedSplit, ids: Ids, batch: int) -> Iterator[Score]:
    """The scores of samples `ids`, `batch` at a time, the last batch as small as it is; their sum is the result.

    model: in eval mode. To share the work, give each rank a part of the ids and add up.
    """
    device = model.wte.weight.device
    for first in range(0, len(ids), batch):
        samples = split.samples(ids[first : first + batch])
        tokens = torch.from_numpy(samples).to(device, torch.int64)
        hidden, targets = model.hidden(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        score = Score()
        for x, target in zip(torch.split(hidden, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True):
            logits = model.head(x)
            losses = F.cross_entropy(logits.float(), target, reduction="none")
            correct = (logits.argmax(-1) == target).sum()
            score += Score(losses.double().sum().item(), int(correct), len(target))
        yield score
