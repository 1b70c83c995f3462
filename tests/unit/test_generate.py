"""Generation against transformers and against itself without a cache, and what reaches the terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2dist.data import tokenizer
from gpt2dist.model import generate, linear
from gpt2dist.model.generate import Generation, NotFinite, Sampling, TextStream, choose, continue_texts, uniforms
from gpt2dist.model.gpt2 import GPT2, GPT2Config, KVCache, build
from tests.conftest import ROOT, tiny_run
from tests.unit.runs import save_run
from tests.unit.test_cli import assert_one_line, cli
from tests.unit.test_model import CONFIG, random_model, transformers_twin

NO_STOP: frozenset[int] = frozenset()


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50257, (n,), generator=generator).tolist() for n in lengths]


def generated(model: GPT2, prompts: list[list[int]], seeds: list[int] | None = None, **options: Any) -> list[list[int]]:
    sampling = Sampling(**{"stop_tokens": NO_STOP, **options})
    out: list[list[int]] = [[] for _ in prompts]
    for step in Generation(model, prompts, seeds or list(range(len(prompts))), sampling):
        for row, token in step:
            out[row].append(token)
    return out


def test_logits_with_a_cache_equal_those_without() -> None:
    model = random_model()
    ids = torch.tensor(prompts_of(20, 20))
    with torch.no_grad():
        cache = KVCache(CONFIG, 20, torch.tensor([0, 0]), model.wte.weight)
        pieces = [ids[:, :5], ids[:, 5:6], ids[:, 6:7], ids[:, 7:15], ids[:, 15:]]  # also several tokens at once
        for end, piece in zip((5, 6, 7, 15, 20), pieces, strict=True):
            expected = model.logits(ids[:, :end])[:, -1, : CONFIG.vocab_size]
            assert (model.logits(piece, cache)[:, 0, : CONFIG.vocab_size] - expected).abs().max() <= 1e-5


def test_logits_of_a_padded_row_equal_those_of_the_row_alone() -> None:
    model = random_model()
    (ids,) = torch.tensor(prompts_of(9))
    with torch.no_grad():
        cache = KVCache(CONFIG, 16, torch.tensor([0, 7]), model.wte.weight)
        rows = torch.stack([torch.arange(15), torch.cat([torch.zeros(7, dtype=torch.int64), ids[:8]])])
        for new, end in ((rows, 8), (torch.stack([ids[8:], ids[8:]]), 9)):
            got = model.logits(new, cache)[1, 0, : CONFIG.vocab_size]
            assert (got - model.logits(ids[None, :end])[0, -1, : CONFIG.vocab_size]).abs().max() <= 1e-5


def test_greedy_equals_transformers_token_for_token() -> None:
    model = random_model()
    twin = transformers_twin(model)
    for length in (1, 7):
        prompts = prompts_of(length, length, length)
        theirs = twin.generate(
            torch.tensor(prompts), do_sample=False, max_new_tokens=32 - length, eos_token_id=None, pad_token_id=0
        )
        assert generated(model, prompts, max_tokens=32 - length, temperature=0) == theirs[:, length:].tolist()


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 40}, {"top_p": 0.7}, {"temperature": 0.5}])
def test_a_batch_of_different_lengths_equals_its_rows_alone(options: dict[str, Any]) -> None:
    model = random_model()
    prompts = prompts_of(1, 12, 5, 30, 45)  # the last two leave the context of 32, one at once
    batch = generated(model, prompts, max_tokens=12, **options)
    for i, prompt in enumerate(prompts):
        assert generated(model, [prompt], [i], max_tokens=12, **options) == [batch[i]]


def test_beyond_the_context_the_window_slides() -> None:
    model = random_model()
    (prompt,) = prompts_of(28)
    (out,) = generated(model, [prompt], max_tokens=10, temperature=0)
    ids = list(prompt)
    with torch.no_grad():
        for token in out:
            assert token == int(model.logits(torch.tensor([ids[-32:]]))[0, -1].argmax())
            ids.append(token)


def test_seeds() -> None:
    model = random_model()
    prompts = prompts_of(3) * 2
    a = generated(model, prompts, [4, 5], max_tokens=20)
    assert a == generated(model, prompts, [4, 5], max_tokens=20)
    assert a[0] != a[1]
    assert generated(model, prompts, [5, 4], max_tokens=30)[0][:20] == a[1]  # neither neighbours nor length matter


def test_random_numbers_drawn_in_parts_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = torch.stack([torch.rand(700, dtype=torch.float64, generator=seeded(seed)) for seed in (4, 5)])
    generators = [seeded(4), seeded(5)]
    assert torch.equal(torch.cat([uniforms(generators, n) for n in (256, 3, 1, 440)], 1), at_once)
    model = random_model()
    prompts = prompts_of(3, 9, 30)
    monkeypatch.setattr(generate, "BLOCK", 100)
    expected = generated(model, prompts, max_tokens=40)
    monkeypatch.setattr(generate, "BLOCK", 3)
    assert generated(model, prompts, max_tokens=40) == expected


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_room_for_tokens_grows_with_them() -> None:
    model = random_model()
    prompts = prompts_of(3)
    (full,) = generated(model, prompts, max_tokens=8, temperature=0)
    cut = generated(model, prompts, max_tokens=10**18, temperature=0, stop_tokens=frozenset({full[5]}))
    assert cut == [full[: full.index(full[5])]]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}, {}])
@pytest.mark.parametrize("values", [[0.0, torch.nan, 1.0], [0.0, torch.inf, 1.0], [-torch.inf] * 3])
def test_nothing_is_drawn_from_logits_that_are_not_finite(options: dict[str, Any], values: list[float]) -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], values])
    with pytest.raises(NotFinite):
        choose(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), Sampling(1, **options))


def test_stop_tokens_end_a_row_and_not_its_neighbours() -> None:
    model = random_model()
    prompts = prompts_of(3, 4)
    full = generated(model, prompts, max_tokens=8, temperature=0)
    cut = generated(model, prompts, max_tokens=8, temperature=0, stop_tokens=frozenset({full[0][2], 50256}))
    assert cut == [full[0][: full[0].index(full[0][2])], full[1]]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf])
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000

    def shares(**options: Any) -> torch.Tensor:
        tokens = choose(logits.expand(1000, -1), uniform, Sampling(1, **options))
        return torch.bincount(tokens, minlength=6) / 1000

    for temperature in (1.0, 0.5):
        p = torch.softmax(logits / temperature, -1)
        assert torch.allclose(shares(temperature=temperature), p, atol=2e-3)
        top = torch.where(torch.arange(6) < 2, p, 0)
        assert torch.allclose(shares(temperature=temperature, top_k=2), top / top.sum(), atol=2e-3)
    # 0.56, 0.21, 0.13, … : the fewest that have 0.7 together are two, and 0.5 has the first alone
    assert torch.allclose(shares(top_p=0.7), top_two := shares(top_k=2), atol=2e-3)
    assert top_two[0] < 1
    assert shares(top_p=0.5)[0] == 1
    assert shares(top_k=2, top_p=0.72)[0] == 1  # after top_k the first has 0.73
    assert shares(top_p=1.0)[5] == 0  # the padding of the vocabulary is never drawn


def test_top_p_over_a_flat_distribution_looks_beyond_the_first_guess() -> None:
    logits = torch.zeros(2, 50304)
    logits[:, 50257:] = -torch.inf
    uniform = torch.tensor([0.999999, 1 - 2**-53], dtype=torch.float64)
    tokens = choose(logits, uniform, Sampling(1, top_p=0.9))
    assert len(set(tokens.tolist())) <= 2
    assert (tokens < 50257).all()
    everything = torch.cat([choose(logits, torch.full((2,), u, dtype=torch.float64), Sampling(1)) for u in (0, 0.5)])
    assert everything.tolist() == [0, 0, 25128, 25128]


def stream(text: str, stop: list[str], cut: Callable[[str], list[int]]) -> list[str]:
    s = TextStream(tokenizer.load(), stop)
    return [s.add(token) for token in cut(text)] + [s.end()]


def test_text_streams_whole_characters() -> None:
    encoding = tokenizer.load()
    text = "naïve 🧪 日本語 🏳️‍🌈"

    def one_byte_each(text: str) -> list[int]:
        return [encoding.encode_single_token(bytes([b])) for b in text.encode()]

    for cut in (encoding.encode_ordinary, one_byte_each):
        pieces = stream(text, [], cut)
        assert "".join(pieces) == text
        assert "�" not in "".join(pieces)
        assert pieces[0]  # nothing is held back without a reason
    assert "".join(stream("🧪", [], lambda t: one_byte_each(t)[:-1])) == "�"


def test_stop_strings_are_never_shown() -> None:
    encode = tokenizer.load().encode_ordinary
    assert "".join(stream("def f():\n    pass\n\ndef g", ["\n\n", "pass"], encode)) == "def f():\n    "
    assert "".join(stream("one two thr", ["three"], encode)) == "one two thr"  # only the beginning of one
    assert "".join(stream("abcabd", ["abd"], lambda t: [t_ for c in t for t_ in encode(c)])) == "abc"
    pieces = stream("one two", ["three"], encode)
    assert pieces[0] == "one"


def test_texts_come_in_order_and_as_early_as_they_can() -> None:
    model = build(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64), 0).eval()
    encoding = tokenizer.load()
    prompts, seeds = ["a", "b", "c"], [0, 0, 7]
    options = Sampling(6, stop_tokens=NO_STOP)
    pieces = list(continue_texts(model, encoding, prompts, seeds, options, batch=2))
    assert [i for i, _ in pieces] == sorted(i for i, _ in pieces)
    assert {i for i, _ in pieces} == {0, 1, 2}
    assert len([i for i, _ in pieces if i == 0]) > 3  # the first of a batch streams
    texts = ["".join(p for i, p in pieces if i == n) for n in range(3)]
    for prompt, seed, text in zip(prompts, seeds, texts, strict=True):
        assert text == "".join(p for _, p in continue_texts(model, encoding, [prompt], [seed], options))


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    run = tiny_run(name="made")
    return save_run(run, build(GPT2Config.from_run(run), 0))


def test_command(run_dir: str, tmp_path: Path) -> None:
    options = ("--max-tokens", "5", "--seed", "3")
    result = cli("generate", run_dir, "--prompt", "import os", "--samples", "2", *options)
    assert result.exit_code == 0, result.output
    first, second = result.stdout.split("\n" + "-" * 40 + "\n")
    assert first.startswith("import os")
    assert second.startswith("import os")
    assert first != second.rstrip("\n")
    (tmp_path / "prompts.txt").write_text("import os\nclass\n")
    rows = json.loads(cli("generate", run_dir, "--prompt-file", "prompts.txt", "--json", *options).stdout)
    assert [(r["prompt"], r["seed"]) for r in rows["samples"]] == [("import os", 3), ("class", 3)]
    assert first == "import os" + rows["samples"][0]["text"]
    assert cli("generate", run_dir, "--max-tokens", "3", "--precision", "bf16").exit_code == 0
    assert_one_line(cli("generate", run_dir, "--prompt-file", "none"), "--prompt-file: none: cannot be read")
    assert_one_line(cli("generate", run_dir, "--prompt-file", ""), "--prompt-file: empty; name a file")
    Path("empty.txt").touch()
    assert_one_line(cli("generate", run_dir, "--prompt-file", "empty.txt"), "empty.txt: no prompts in it")
    Path("odd.txt").write_bytes("\ufefffirst\r\n\nsec\x0cond \u2028 third\n".encode())  # one line end of three is one
    rows = json.loads(cli("generate", run_dir, "--prompt-file", "odd.txt", "--json", *options).stdout)
    assert [row["prompt"] for row in rows["samples"]] == ["first", "", "sec\x0cond \u2028 third"]
    for option, value in (
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--temperature", "1e-40"),
        ("--stop", ""),
    ):
        refused = cli("generate", run_dir, option, value)
        assert refused.exit_code == 2
        assert f"Invalid value for '{option}'" in refused.stderr
    assert cli("generate", run_dir, "--temperature", "1e-6", "--max-tokens", "3").exit_code == 0


@pytest.mark.parametrize("options", [("--temperature", "0"), (), ("--top-k", "0"), ("--top-p", "0.9", "--json")])
def test_model_of_nan_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    run = tiny_run(name="nan")
    model = build(GPT2Config.from_run(run), 0)
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight.fill_(torch.nan)
    result = cli("generate", save_run(run, model), *options)
    assert_one_line(result, "runs/nan: the model's logits are not finite")
    assert result.stdout == ""


def test_output_that_does_not_fit_is_one_line(run_dir: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "gpt2dist", "generate", run_dir, "--max-tokens", "3"]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT)}, check=False
        )
    assert (done.returncode, done.stderr) == (2, "error: cannot write: No space left on device\n")


def test_a_batch_that_does_not_fit_is_one_line(run_dir: str) -> None:
    limit = f"ulimit -v 6000000; exec {sys.executable} -m gpt2dist generate"
    command = f"{limit} {run_dir} --samples 20000 --batch 20000 --max-tokens 1"
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stderr) == (2, "error: --batch 20000: does not fit into memory\n")


@pytest.mark.parametrize("prompt", [[tokenizer.EOT, 5, 7], [5, tokenizer.EOT], [5, tokenizer.EOT, 7]])
def test_with_a_document_mask_texts_go_on_as_they_were_trained(prompt: list[int]) -> None:
    model = random_model()
    model.config = replace(model.config, document_mask=True)
    neighbours = prompts_of(9, 2)
    out = generated(model, [prompt, *neighbours], max_tokens=6, temperature=0)
    for start, texts in zip((prompt, *neighbours), out, strict=True):
        ids = list(start)
        for token in texts:
            assert token == int(model.logits(torch.tensor([ids]))[0, -1].argmax())
            ids.append(token)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_p": 0.9}, {"top_k": 5}])
def test_tokens_equal_those_of_torchs_own_products(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    model = random_model()
    monkeypatch.setattr(linear, "INTEL", False)
    fast = generated(model, prompts_of(3, 9), max_tokens=12, **options)
    monkeypatch.setattr(linear, "INTEL", True)
    assert fast == generated(model, prompts_of(3, 9), max_tokens=12, **options)


@pytest.mark.parametrize("limits", [{}, {"top_k": 50}, {"top_p": 0.9}])
def test_large_logits_at_a_low_temperature(limits: dict[str, Any]) -> None:
    """Their quotient is more than a fp32 number can be."""
    logits = torch.zeros(2, 100)
    logits[0, 7], logits[1, 3] = 1e36, 3e38
    drawn = choose(logits, torch.tensor([0.5, 0.99], dtype=torch.float64), Sampling(1, temperature=1e-3, **limits))
    assert drawn.tolist() == [7, 3]
