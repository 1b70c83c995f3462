from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

from gpt2dist.data.tokenizer import EOT
from gpt2dist.model.gpt2 import (
    GPT2,
    PRESETS,
    GPT2Config,
    build,
    count_parameters,
    flops_per_token,
    parameter_shapes,
)

CONFIG = GPT2Config(n_layer=3, n_head=4, n_embd=48, n_positions=32)
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers' Conv1D holds [in, out]


def transformers_twin(model: GPT2) -> GPT2LMHeadModel:
    """transformers' GPT-2 with the same weights."""
    c = model.config
    config = HFConfig(
        vocab_size=c.vocab_size,
        n_positions=c.n_positions,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        attn_pdrop=c.dropout,
        embd_pdrop=c.dropout,
        resid_pdrop=c.dropout,
    )
    twin = GPT2LMHeadModel(config).eval()
    state = {}
    for name, value in model.state_dict().items():
        if name != "head.weight":
            value = value[: c.vocab_size] if name == "wte.weight" else value
            state[f"transformer.{name}"] = value.T if name.endswith(TRANSPOSED) else value
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    twin.tie_weights()
    return twin


def random_model(seed: int = 0, config: GPT2Config = CONFIG) -> GPT2:
    """Random everything, biases and LayerNorm too."""
    model = build(config, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty(p.shape).normal_(0, 0.1, generator=generator))
    return model


def their_documents(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What transformers needs to be told for packed documents: positions and an additive mask, token by token."""
    B, T = ids.shape
    positions, mask = torch.zeros_like(ids), torch.full((B, 1, T, T), torch.finfo(torch.float32).min)
    for row in range(B):
        start = 0
        for t in range(T):
            start = t if t and ids[row, t - 1] == EOT else start
            positions[row, t] = t - start
            mask[row, 0, t, start : t + 1] = 0
    return {"position_ids": positions, "attention_mask": mask}


SWITCHES: list[dict[str, Any]] = [
    {},
    {"n_head": 1},
    {"n_layer": 1, "n_head": 12, "n_positions": 50},
    {"dropout": 0.3},
    {"activation_checkpointing": True},
    {"activation_checkpointing": True, "dropout": 0.3},
    {"document_mask": True},
    {"document_mask": True, "activation_checkpointing": True, "dropout": 0.3},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "+".join(s) or "plain")
def test_logits_loss_and_gradients_equal_transformers(switches: dict[str, Any]) -> None:
    model = random_model(config=replace(CONFIG, **switches))
    twin = transformers_twin(model)
    tokens = torch.randint(0, CONFIG.vocab_size, (3, 33), generator=torch.Generator().manual_seed(1))
    tokens[0, [0, 9, 10, 31]] = tokens[1, 17] = EOT
    inputs, labels = tokens[:, :-1], tokens[:, 1:].reshape(-1)
    extra = their_documents(inputs) if model.config.document_mask else {}
    ours, theirs = model.logits(inputs), twin(inputs, **extra).logits
    assert (ours[..., : CONFIG.vocab_size] - theirs).abs().max() <= 1e-4
    model.train()
    twin.train()
    torch.manual_seed(7)  # both draw the same masks, in the same order
    loss = model(tokens)
    torch.manual_seed(7)
    theirs = twin(inputs, **extra).logits
    reference = torch.nn.functional.cross_entropy(theirs.reshape(-1, CONFIG.vocab_size), labels)
    assert abs(loss.item() - reference.item()) <= 1e-5
    loss.backward()
    reference.backward()
    twins = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        expected = twins[f"transformer.{name}"].grad
        expected = expected.T if name.endswith(TRANSPOSED) else expected
        got = p.grad[: CONFIG.vocab_size] if name == "wte.weight" else p.grad
        assert (got - expected).norm() <= 1e-5 * expected.norm(), name


def test_twenty_steps_equal_transformers() -> None:
    model = build(CONFIG, 0)
    twin = transformers_twin(model).train()
    for m in (model, twin):
        m.optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for step in range(20):
        tokens = torch.randint(0, 500, (4, 33), generator=torch.Generator().manual_seed(step))
        theirs = twin(tokens[:, :-1]).logits.reshape(-1, CONFIG.vocab_size)
        losses = [model(tokens), torch.nn.functional.cross_entropy(theirs, tokens[:, 1:].reshape(-1))]
        assert abs(losses[0].item() - losses[1].item()) <= 1e-5, step
        for m, loss in zip((model, twin), losses, strict=True):
            m.optimizer.zero_grad()
            loss.backward()
            m.optimizer.step()
    assert losses[0] < 10.2  # from 10.8: it has learned that only 500 of 50257 tokens occur


def test_padded_vocabulary_is_inert() -> None:
    model = random_model()
    assert model.wte.weight.shape[0] == 50304
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    loss = model(tokens)
    loss.backward()
    assert model.wte.weight.grad[CONFIG.vocab_size :].abs().max() == 0
    with torch.no_grad():
        evaluated = model(tokens)
        model.wte.weight[CONFIG.vocab_size :] = 1e3  # whatever stands there
    assert model(tokens).item() == loss.item()
    with torch.no_grad():
        assert model(tokens).item() == evaluated.item()
        assert (model.logits(tokens)[..., CONFIG.vocab_size :] == -torch.inf).all()


def test_causal() -> None:
    model = random_model()
    tokens = torch.randint(0, CONFIG.vocab_size, (1, 20), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 12] = (tokens[0, 12] + 1) % CONFIG.vocab_size
    a, b = model.logits(tokens), model.logits(changed)
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.equal(a[:, 12:], b[:, 12:])


# Radford et al. 2019 round to 117M, 345M, 762M, 1542M; these are the counts of the released weights.
@pytest.mark.parametrize(
    ("preset", "count"),
    [("124M", 124_439_808), ("355M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)],
)
def test_published_sizes(preset: str, count: int) -> None:
    config = GPT2Config(*PRESETS[preset], n_positions=1024)
    assert count_parameters(config) == count


def test_flops_of_the_small_model() -> None:
    config = GPT2Config(*PRESETS["124M"], n_positions=1024)
    n = 124_439_808 - 1024 * 768
    assert flops_per_token(config, 1024) == 6 * n + 12 * 12 * 768 * 1024


def test_initialization_is_gpt2s() -> None:
    config = GPT2Config(n_layer=8, n_head=4, n_embd=128, n_positions=64)
    model = build(config, seed=5)
    state = model.state_dict()
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == parameter_shapes(config)
    for name, p in state.items():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.ndim == 1:
            assert (p == 1).all(), name
        else:
            p = p[: config.vocab_size] if p.shape[0] == config.padded_vocab_size else p
            std = 0.01 if name == "wpe.weight" else 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
    again, other = build(config, seed=5).state_dict(), build(config, seed=6).state_dict()
    assert all(torch.equal(state[n], again[n]) for n in state)
    assert not torch.equal(state["wpe.weight"], other["wpe.weight"])
    # a deeper model has the same first blocks: each parameter has a generator of its own
    deeper = build(GPT2Config(n_layer=9, n_head=4, n_embd=128, n_positions=64), seed=5).state_dict()
    assert torch.equal(state["h.0.attn.c_attn.weight"], deeper["h.0.attn.c_attn.weight"])


def test_dropout_acts_in_training_only() -> None:
    model = build(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=16, dropout=0.5), 0)
    tokens = torch.randint(0, 50257, (2, 17), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    a = model(tokens)
    torch.manual_seed(1)
    b = model(tokens)
    torch.manual_seed(2)
    c = model(tokens)
    assert a == b
    assert a != c
    model.eval()
    assert model(tokens) == model(tokens)


def packed_documents() -> tuple[torch.Tensor, list[list[int]]]:
    """A sequence of documents, one of them only <|endoftext|>, and its inputs cut at their ends."""
    tokens = torch.randint(0, EOT, (31,), generator=torch.Generator().manual_seed(1))
    tokens[[0, 6, 7, 20]] = EOT
    ids = tokens[:-1].tolist()
    return tokens, [ids[:1], ids[1:7], ids[7:8], ids[8:21], ids[21:]]


def test_packed_documents_equal_the_documents_one_by_one() -> None:
    plain = random_model()
    masked = GPT2(replace(CONFIG, document_mask=True))
    masked.load_state_dict(plain.state_dict())
    tokens, pieces = packed_documents()
    loss = masked(torch.stack([tokens, tokens]))
    total, end = torch.zeros(()), 0
    for piece in pieces:  # each with the token after it, the first of the next document, as its last target
        total = total + len(piece) * plain(tokens[None, end : end + len(piece) + 1])
        end += len(piece)
    assert abs(loss.item() - total.item() / end) <= 1e-5
    loss.backward()
    (total / end).backward()
    for (name, p), q in zip(masked.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm(), name
    assert abs(plain(tokens[None]).item() - loss.item()) > 1e-3  # without the mask it is another loss
    row = torch.cat([pieces_ids := torch.tensor(pieces[3]), pieces_ids[:1]])[None]
    assert masked(row).item() == pytest.approx(plain(row).item(), abs=1e-6)  # one document: nothing to mask


@pytest.mark.parametrize("document_mask", [False, True])
def test_activation_checkpointing_changes_no_bit_and_keeps_less(document_mask: bool) -> None:
    config = GPT2Config(n_layer=3, n_head=2, n_embd=32, n_positions=16, dropout=0.5, document_mask=document_mask)
    tokens = torch.randint(0, 50257, (2, 17), generator=torch.Generator().manual_seed(1))
    results = []
    for switch in (False, True):
        model = build(replace(config, activation_checkpointing=switch), 0)
        kept = 0

        def count(t: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += 1
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            torch.manual_seed(1)
            loss = model(tokens)
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()], kept))
    (loss, gradients, kept), (loss_again, gradients_again, kept_again) = results
    assert torch.equal(loss, loss_again)
    assert all(map(torch.equal, gradients, gradients_again))
    assert kept_again < kept / 2
