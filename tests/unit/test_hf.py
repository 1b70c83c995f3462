"""Import and export of Hugging Face directories, against transformers and tiktoken themselves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from gpt2dist.config import UserError
from gpt2dist.data import tokenizer
from gpt2dist.model import gpt2, hf
from gpt2dist.model.gpt2 import GPT2
from gpt2dist.train.saved import open_model
from tests.conftest import ROOT, tiny_run
from tests.disks import small_disk
from tests.unit.runs import save_run
from tests.unit.test_cli import assert_one_line, cli
from tests.unit.test_model import CONFIG, random_model

MODEL = {"n_layer": 3, "n_head": 4, "n_embd": 48, "n_positions": 32}


@pytest.fixture
def model() -> GPT2:
    return random_model()


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: GPT2) -> str:
    monkeypatch.chdir(tmp_path)
    return save_run(tiny_run(name="made", model=MODEL), model)


@pytest.fixture
def exported(run_dir: str) -> Path:
    result = cli("export", run_dir, "--output", "out")
    assert result.exit_code == 0, result.output
    return Path("out")


def test_transformers_opens_an_export_and_answers_the_same(exported: Path, model: GPT2) -> None:
    twin, report = GPT2LMHeadModel.from_pretrained(exported, local_files_only=True, output_loading_info=True)
    assert not any(report.values())
    tokens = torch.randint(0, 50257, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model.logits(tokens)[..., :50257]
        assert (twin.eval()(tokens).logits - ours).abs().max() <= 1e-5
    assert twin.generation_config.eos_token_id == tokenizer.EOT


@pytest.fixture(scope="module")
def their_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    hf.export(str(directory), CONFIG, gpt2.build(CONFIG, 0).get_parameter)
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


@settings(deadline=None)
@given(st.text(max_size=200))
def test_their_tokenizer_gives_the_ids_of_tiktoken(their_tokenizer: Any, text: str) -> None:
    assert their_tokenizer(text)["input_ids"] == tokenizer.load().encode(text, allowed_special="all")


def test_their_tokenizer_on_real_text(their_tokenizer: Any) -> None:
    for path in sorted((ROOT / "gpt2dist").rglob("*.py")):
        text = path.read_text() + "<|endoftext|>"
        ids = tokenizer.load().encode(text, allowed_special="all")
        assert their_tokenizer(text)["input_ids"] == ids
        assert their_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert their_tokenizer.eos_token_id == their_tokenizer.bos_token_id == tokenizer.EOT
    assert len(their_tokenizer) == 50257


def test_export_import_export_is_byte_identical(exported: Path) -> None:
    result = cli("export", "out", "--output", "again", "--json")
    assert json.loads(result.stdout) == {"step": None, "output": "again"}
    names = sorted(path.name for path in exported.iterdir())
    assert names == sorted(path.name for path in Path("again").iterdir())
    for name in names:
        assert (exported / name).read_bytes() == Path("again", name).read_bytes(), name
    load_file(exported / "model.safetensors")  # by the library itself


def test_generate_reads_runs_and_exports_alike(run_dir: str, exported: Path) -> None:
    options = ("--prompt", "import", "--max-tokens", "8", "--json")
    rows = [json.loads(cli("generate", place, *options).stdout) for place in (run_dir, str(exported))]
    assert [row["step"] for row in rows] == [4, None]
    assert rows[0]["samples"] == rows[1]["samples"]


def test_export_of_a_step(run_dir: str, model: GPT2) -> None:
    with torch.no_grad():
        model.wpe.weight += 1
    save_run(tiny_run(name="made", model=MODEL), model, step=8)
    for step, output in ((4, "four"), (8, "eight")):
        assert cli("export", run_dir, "--output", output, "--step", str(step)).exit_code == 0
    assert cli("export", run_dir, "--output", "newest").exit_code == 0
    four, eight, newest = (Path(name, "model.safetensors").read_bytes() for name in ("four", "eight", "newest"))
    assert eight == newest != four


def test_export_needs_neither_ray_nor_deepspeed(run_dir: str) -> None:
    code = (
        "import sys; from gpt2dist.cli import main\n"
        f"try: main(['export', {run_dir!r}, '--output', 'out'])\n"
        "except SystemExit as e: assert not e.code\n"
        "print(sorted({'ray', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_export_to_an_object_store(run_dir: str, exported: Path) -> None:
    assert cli("export", run_dir, "--output", "memory://models/made").exit_code == 0
    from gpt2dist import storage

    for path in exported.iterdir():
        assert storage.read_bytes(storage.location("memory://models/made") / path.name) == path.read_bytes()


def test_a_failed_export_leaves_no_model(run_dir: str, model: GPT2) -> None:
    def weights(name: str) -> torch.Tensor:
        if name == "wpe.weight":  # the last but one
            raise OSError(28, "No space left on device")
        return dict(model.named_parameters())[name]

    with pytest.raises(UserError, match="out: cannot be written: No space left on device"):
        hf.export("out", CONFIG, weights)
    assert not list(Path("out").iterdir())
    assert cli("export", run_dir, "--output", "out").exit_code == 0  # it can be tried again


@pytest.mark.parametrize("kilobytes", [100, 600])
def test_an_export_onto_a_full_disk_says_so(run_dir: str, tmp_path: Path, kilobytes: int) -> None:
    """No room for the weights, or none for the vocabulary after them."""
    with small_disk(tmp_path / "disk", 40) as disk:
        weights = 4 * sum(p.numel() for p in random_model().parameters())
        disk.fill(leave=kilobytes * 1000 if kilobytes < 200 else weights + kilobytes * 1000)
        assert_one_line(cli("export", run_dir, "--output", "disk/out"), "disk/out: cannot be written: No space left on")
        assert not list((disk.path / "out").glob("*.safetensors"))
        disk.make_room()
        assert cli("export", run_dir, "--output", "disk/out").exit_code == 0


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "model.safetensors.index.json"])
def test_an_export_replaces_nothing(run_dir: str, file: str) -> None:
    """Not even without a config.json; transformers would take a tokenizer.json before what is exported."""
    Path("out").mkdir()
    (Path("out") / file).write_text("of another model")
    assert_one_line(cli("export", run_dir, "--output", "out"), f"out: holds a {file}; choose another directory")
    assert [path.name for path in Path("out").iterdir()] == [file]
    assert (Path("out") / file).read_text() == "of another model"


def test_a_checkpoint_is_read_as_it_was_trained(run_dir: str) -> None:
    """`train` with other switches writes config.toml before it has saved anything."""
    before = cli("generate", run_dir, "--prompt", "a<|endoftext|>b", "--temperature", "0")
    saved = open_model(run_dir).config
    changed = tiny_run(name="made", model=MODEL | {"document_mask": True, "dropout": 0.3})
    (Path(run_dir) / "config.toml").write_text(changed.to_toml())
    assert open_model(run_dir).config == saved
    assert cli("generate", run_dir, "--prompt", "a<|endoftext|>b", "--temperature", "0").stdout == before.stdout


def test_mistakes_in_export(run_dir: str, exported: Path) -> None:
    assert_one_line(cli("export", run_dir, "--output", "out"), "out: holds a model already; choose another directory")
    assert_one_line(cli("export", run_dir, "--output", ""), "--output: empty")
    assert_one_line(cli("export", run_dir, "--output", run_dir), f"{run_dir}: holds a run; choose another directory")
    result = cli("export", run_dir, "--output", "new", "--step", "5")
    assert_one_line(result, "made: no checkpoint of step 5; see: gpt2dist checkpoint ls")
    assert_one_line(cli("export", "out", "--output", "new", "--step", "5"), "not a run directory, it has no steps")
    file = next(Path(run_dir).rglob("rank-00001.safetensors"))
    data = bytearray(file.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # the first weight
    file.write_bytes(data)
    assert_one_line(
        cli("export", run_dir, "--output", "new"), "rank-00001.safetensors: content differs from its sha256"
    )
    assert not Path("new").exists()


# ---------------------------------------------------------------------- import


def weights_of(model: GPT2) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("shard", ["200KB", "1GB"])
def test_import_of_what_transformers_saves(exported: Path, model: GPT2, shard: str) -> None:
    twin = GPT2LMHeadModel.from_pretrained(exported)
    twin.save_pretrained("theirs", max_shard_size=shard)
    assert Path("theirs", hf.INDEX).exists() == (shard == "200KB")
    assert hf.read_config("theirs") == CONFIG
    read = hf.read_weights("theirs")
    for name, value in weights_of(model).items():
        expected = value.clone()
        expected[50257 if name == "wte.weight" else len(value) :] = 0  # the padding of the vocabulary
        assert read(name).dtype == torch.float32
        assert torch.equal(read(name), expected), name


def test_import_of_the_oldest_files(exported: Path, model: GPT2) -> None:
    """Those of the hub's gpt2: no prefix, the causal mask among the weights; here also in 16 bits."""
    tensors = load_file(exported / "model.safetensors")
    old = {key.removeprefix("transformer."): value.bfloat16() for key, value in tensors.items()}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(3)}
    save_file(old, exported / "model.safetensors")
    read = hf.read_weights(str(exported))
    for name, value in weights_of(model).items():
        rows = 50257 if name == "wte.weight" else None
        assert torch.equal(read(name)[:rows], value[:rows].bfloat16().float()), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"activation_function": "relu"},
            "activation_function: input should be 'gelu_new' or 'gelu_pytorch_tanh', got",
        ),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: input should be False, got true"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn: input should be False, got true"),
        ({"scale_attn_weights": False}, "scale_attn_weights: input should be True, got false"),
        ({"add_cross_attention": True}, "add_cross_attention: input should be False, got true"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: input should be True, got false"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon: input should be 1e-05, got 1e-06"),
        ({"n_inner": 100}, "n_inner: should be 4 × n_embd = 192, got 100"),
        ({"n_head": 5}, "n_embd = 48 is not divisible by n_head = 5"),
        ({"n_embd": 10**30}, "n_embd: input should be less than or equal to 1000000, got 10000"),
        ({"vocab_size": 32000}, "vocab_size: input should be 50257, got 32000"),
        ({"model_type": "llama"}, "model_type: input should be 'gpt2', got \"llama\""),
        ({"n_layer": 4}, "no tensor transformer.h.3.ln_1.weight"),
        ({"n_positions": 64}, "transformer.wpe.weight: shape [32, 48], config.json asks for [64, 48]"),
        ("{", "config.json: invalid JSON"),
    ],
)
def test_models_that_are_not_gpt2_are_refused(exported: Path, change: Any, message: str) -> None:
    path = exported / "config.json"
    text = json.dumps(json.loads(path.read_text()) | change) if isinstance(change, dict) else change
    path.write_text(text)
    assert_one_line(cli("export", "out", "--output", "again"), message)
    assert not Path("again").exists()


def test_damaged_or_pickled_weights_are_refused(exported: Path) -> None:
    file = exported / "model.safetensors"
    whole = file.read_bytes()
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)
    assert_one_line(cli("export", "out", "--output", "again"), ": holds I8, not floating-point numbers")
    file.write_bytes(whole)
    file.write_bytes(file.read_bytes()[:-8])
    assert_one_line(cli("export", "out", "--output", "again"), "model.safetensors: damaged: ")
    file.rename(exported / "pytorch_model.bin")
    assert_one_line(cli("export", "out", "--output", "again"), "pytorch_model.bin is a pickle, which can run code")
    (exported / "pytorch_model.bin").unlink()
    assert_one_line(cli("export", "out", "--output", "again"), "out: no model.safetensors")
    for text, message in (
        ("[]", "not an index"),
        ('{"weight_map": [[1, "a.safetensors"]]}', "not an index"),
        ('{"weight_map": {"a": "../x"}}', "'../x' is not the name of"),
    ):
        (exported / hf.INDEX).write_text(text)
        assert_one_line(cli("export", "out", "--output", "again"), message)


def test_a_run_begins_with_the_weights_of_another_model(exported: Path, model: GPT2) -> None:
    imported = tiny_run(model=MODEL | {"init_from": "out"})
    assert torch.equal(hf.read_weights("out")("h.2.mlp.c_fc.weight"), model.h[2].mlp.c_fc.weight)
    assert Path(imported.absolute().model.init_from).is_absolute()
    hf.check_init(imported, "run.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"n_layer": None, "n_head": None, "n_embd": None, "preset": "tiny"},
            "set model.n_layer, n_head and n_embd in place of model.preset",
        ),
        ({"n_layer": 2}, "run.toml: model.init_from = out: its n_layer is 3, the run's 2: set model.n_layer"),
        ({"n_positions": 16}, "its n_positions is 32, the run's 16: set model.n_positions"),
        ({"init_from": "no/such/place"}, "model.init_from = no/such/place: no/such/place: no such directory"),
        ({"init_from": "some/model"}, "some/model: no such directory, and not to be had from the hub: "),
        ({"init_from": "s3://bucket/model"}, "imported from a local directory or the Hugging Face hub only"),
    ],
)
def test_initial_weights_that_do_not_fit(
    exported: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = tiny_run(model=MODEL | {"init_from": "out"} | change)
    with pytest.raises(UserError) as e:
        hf.check_init(run, "run.toml")
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_init_from_the_hub(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return shutil.copytree(exported, tmp_path / "cache", dirs_exist_ok=True)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    hf.check_init(tiny_run(model=MODEL | {"init_from": "someone/gpt2-tiny"}), "run.toml")
    wanted = ["config.json", "*.safetensors", "model.safetensors.index.json", "vocab.json", "tokenizer.json"]
    assert asked[0] == ("someone/gpt2-tiny", wanted)


@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
def test_a_model_with_another_vocabulary_is_refused(exported: Path, file: str) -> None:
    """A GPT-2 that was trained anew in another language has as many tokens."""
    AutoTokenizer.from_pretrained(exported).save_pretrained(exported)  # with a tokenizer.json, as transformers does
    assert cli("generate", str(exported), "--max-tokens", "1").exit_code == 0
    table = json.loads((exported / "vocab.json").read_bytes())
    other = {token: (number + 1) % len(table) for token, number in table.items()}
    (exported / "vocab.json").unlink()
    whole = json.loads((exported / "tokenizer.json").read_bytes())
    whole["model"]["vocab"] = other
    (exported / file).write_text(json.dumps(other if file == "vocab.json" else whole))
    result = cli("generate", str(exported), "--max-tokens", "1")
    assert_one_line(result, "not GPT-2's vocabulary: the same ids are other tokens")
    assert file in result.stderr


def test_one_file_wins_over_an_index_that_was_left_behind(exported: Path, model: GPT2) -> None:
    old = {name: torch.zeros_like(value) for name, value in load_file(exported / hf.WEIGHTS).items()}
    save_file(old, exported / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (exported / hf.INDEX).write_text(json.dumps(index))
    assert torch.equal(hf.read_weights(str(exported))("wpe.weight"), model.wpe.weight)
    twin = GPT2LMHeadModel.from_pretrained(exported, local_files_only=True)
    assert torch.equal(twin.transformer.wpe.weight, model.wpe.weight)  # as transformers has it


def test_a_head_of_its_own_is_refused(exported: Path) -> None:
    tensors = load_file(exported / hf.WEIGHTS)
    table = tensors["transformer.wte.weight"]
    save_file(tensors | {"lm_head.weight": table.clone()}, exported / hf.WEIGHTS)
    hf.read_weights(str(exported))
    save_file(tensors | {"lm_head.weight": table + 1}, exported / hf.WEIGHTS)
    with pytest.raises(UserError, match="lm_head.weight is not transformer.wte.weight"):
        hf.read_weights(str(exported))


def test_the_other_names_of_the_shape(exported: Path) -> None:
    config = json.loads((exported / hf.CONFIG).read_bytes())
    (exported / hf.CONFIG).write_text(json.dumps(config | {"num_attention_heads": 2}))
    assert hf.read_config(str(exported)).n_head == 2
    assert GPT2LMHeadModel.from_pretrained(exported, local_files_only=True).config.n_head == 2
