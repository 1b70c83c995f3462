"""Text from a model: batches of prompts through a KV cache, sampling, stop strings, text as it comes."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import tiktoken
import torch
from torch import Tensor

from gpt2dist.data.tokenizer import EOT
from gpt2dist.model.gpt2 import GPT2, KVCache

TOP_P_GUESS = 256
"""Tokens among which the likeliest top_p of the probability are first looked for."""
BLOCK = 256
"""Steps whose random numbers are drawn together, and for which there is room at first."""


class NotFinite(Exception):
    """The model has no next token: its logits are not finite."""


@dataclass(frozen=True)
class Sampling:
    """How texts go on."""

    max_tokens: int
    """Length, unless a stop comes before."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest tokens that have this probability together (Holtzman et al. 2019); after top_k."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these strings."""
    stop_tokens: frozenset[int] = frozenset({EOT})
    """A text ends before the first of these token ids."""


class Generation:
    """Continuations of a batch of prompts, token by token.

    Iterating runs the model; each item is one step's [(row, token), …] of the rows that are not done, without the
    token that stops a row. Who reads may set `done[row]`. A row depends on its own prompt and seed alone (up to
    rounding, which the shape of the batch can change).

    The context is the last n_positions tokens. Until it is full a token costs one position; from then on all
    positions move with every token, so the whole window is computed again.
    """

    def __init__(self, model: GPT2, prompts: Sequence[Sequence[int]], seeds: Sequence[int], s: Sampling) -> None:
        """model: in eval mode; prompts: token ids, each at least one."""
        if model.config.document_mask:  # a token does not see what was before its document
            starts = [max((i + 1 for i, token in enumerate(p[:-1]) if token == EOT), default=0) for p in prompts]
            prompts = [p[start:] for p, start in zip(prompts, starts, strict=True)]
        self.model, self.sampling = model, s
        self.done = [False] * len(prompts)
        device = model.wte.weight.device
        self._width = max(map(len, prompts))
        self._padding = torch.tensor([self._width - len(p) for p in prompts], device=device)
        room = min(s.max_tokens, BLOCK)  # grows
        self._ids = torch.zeros(len(prompts), self._width + room, dtype=torch.int64, device=device)
        for row, prompt in zip(self._ids, prompts, strict=True):
            row[self._width - len(prompt) : self._width] = torch.tensor(prompt)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Raises `NotFinite`."""
        model, ids = self.model, self._ids
        positions = model.config.n_positions
        capacity = min(self._width + self.sampling.max_tokens, positions)
        last = ids[:, self._width - 1].tolist()
        stale = True
        for step in range(self.sampling.max_tokens):
            end = self._width + step
            start = max(0, end - positions)
            if step % BLOCK == 0:
                uniform = uniforms(self._generators, BLOCK)
            if end == ids.shape[1]:
                ids = torch.cat([ids, torch.zeros_like(ids)], 1)
            if stale or start:
                cache = KVCache(model.config, capacity, (self._padding - start).clamp(min=0), model.wte.weight)
                x = model.hidden(ids[:, start:end], cache)
            else:
                x = model.hidden(ids[:, end - 1 : end], cache)
            tokens = choose(model.head(x)[:, -1].float().cpu(), uniform[:, step % BLOCK], self.sampling)
            ids[:, end] = tokens
            drawn = [(row, token) for row, token in enumerate(tokens.tolist()) if not self.done[row]]
            restarted = [row for row, _ in drawn if model.config.document_mask and last[row] == EOT]
            self._padding[restarted] = end
            stale, last = bool(restarted), tokens.tolist()
            for row, token in drawn:
                self.done[row] = token in self.sampling.stop_tokens
            yield [(row, token) for row, token in drawn if not self.done[row]]
            if all(self.done):
                return


def uniforms(generators: Sequence[torch.Generator], count: int) -> Tensor:
    """The next random numbers in [0, 1) of each generator, float64 [B, count]; in parts the same as at once."""
    return torch.stack([torch.rand(count, dtype=torch.float64, generator=g) for g in generators])


def choose(logits: Tensor, uniform: Tensor, s: Sampling) -> Tensor:
    """The next token of each row: int64 [B].

    logits: fp32 [B, vocabulary], on the CPU; uniform: float64 [B] in [0, 1), what the draw depends on.

    Raises:
        NotFinite: a row has NaN or +inf, or nothing but -inf.
    """
    largest = logits.amax(-1, keepdim=True)
    if not bool(torch.isfinite(largest).all()):  # NaN wins over all numbers
        raise NotFinite
    if s.temperature == 0:
        return torch.from_numpy(logits.numpy().argmax(-1))  # over 20 times faster than torch's on the CPU
    logits = (logits - largest) / s.temperature  # at most 0: no overflow
    size = logits.shape[-1]
    if not s.top_k and s.top_p >= 1:
        return _draw(torch.softmax(logits, -1, dtype=torch.float64), uniform)
    k = min(s.top_k or TOP_P_GUESS, size)
    while True:
        top, tokens = logits.topk(k)
        total = (top if s.top_k else logits).logsumexp(-1, keepdim=True)
        p = (top - total).double().exp()
        before = p.cumsum(-1) - p
        if s.top_k or k == size or bool((before[:, -1] >= s.top_p).all()):
            break
        k = min(16 * k, size)
    if s.top_p < 1:
        p[before >= s.top_p] = 0  # the likeliest stays: nothing is before it
    tokens, order = tokens.sort(-1)  # by likelihood, rounding that swaps two of them would move every draw between
    return tokens.gather(-1, _draw(p.gather(-1, order), uniform)[:, None])[:, 0]


def _draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Index drawn in proportion to p, by inverting the cumulated sum. p: float64 [B, n]; result: int64 [B]."""
    cdf = p.cumsum(-1)
    total = cdf[:, -1]
    point = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, point[:, None], right=True)[:, 0]


class TextStream:
    """Text of one row as its tokens come.

    Held back: bytes of an unfinished character, and what may be the beginning of a stop string.
    """

    def __init__(self, encoding: tiktoken.Encoding, stop: Sequence[str]) -> None:
        self.stopped = False
        """Whether a stop string was met; nothing comes any more."""
        self._encoding, self._stop = encoding, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain now."""
        return self._advance(self._decoder.decode(self._encoding.decode_single_token_bytes(token)))

    def end(self) -> str:
        """What was held back, when no token follows."""
        text = self._advance(self._decoder.decode(b"", True)) + self._held
        self._held = ""
        return text

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def continue_texts(
    model: GPT2,
    encoding: tiktoken.Encoding,
    prompts: Sequence[str],
    seeds: Sequence[int],
    s: Sampling,
    batch: int = 16,
) -> Iterator[tuple[int, str]]:
    """Continue each prompt with its seed, `batch` at a time: (index, piece of its continuation), in order of the index.

    Pieces come as early as the order allows; each index has at least one, be it empty. A prompt is the start of a
    document: an <|endoftext|> goes before it.
    """
    for first in range(0, len(prompts), batch):
        ids = [[EOT, *encoding.encode_ordinary(prompt)] for prompt in prompts[first : first + batch]]
        generation = Generation(model, ids, seeds[first : first + batch], s)
        streams = [TextStream(encoding, s.stop) for _ in ids]
        pieces = [""] * len(ids)  # not yet handed out
        current = 0
        for drawn in generation:
            for row, token in drawn:
                pieces[row] += streams[row].add(token)
                generation.done[row] |= streams[row].stopped
            while current < len(ids) and generation.done[current]:
                yield first + current, pieces[current] + streams[current].end()
                current += 1
            if current < len(ids) and pieces[current]:
                yield first + current, pieces[current]
                pieces[current] = ""
        for row in range(current, len(ids)):
            yield first + row, pieces[row] + streams[row].end()
