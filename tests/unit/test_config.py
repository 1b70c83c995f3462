from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpt2dist.cli import main
from gpt2dist.config import RunConfig, UserError, load_run, parse_toml, validate
from tests.conftest import ROOT, TINY, tiny_run

RUN_FILES = sorted((ROOT / "jobs").glob("*.toml"))


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda p: p.name)
def test_every_shipped_run_file_loads(path: Path) -> None:
    run = load_run(path)
    assert run.data_paths


@pytest.mark.parametrize("path", [p for p in RUN_FILES if p.name.startswith("gpt2_")], ids=lambda p: p.name)
def test_shipped_gpt2_runs_say_what_they_need(path: Path) -> None:
    """The figures in their comments are those of `--dry-run`, at 40% of an A100's 312 TFLOP/s."""
    done = CliRunner().invoke(main, ["train", str(path), "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    numbers = json.loads(done.output)
    days = numbers["flops"] / (0.4 * 312e12) / 86400
    assert (
        f"# Computed, not measured: {numbers['tokens'] / 1e9:.0f} B tokens, {numbers['flops']:.1e} FLOPs; "
        f"{days:,.0f} days of an A100 at an\n# assumed MFU of 40%, {days / numbers['workers']:.1f} days with these "
        f"{numbers['workers']} workers; {sum(numbers['memory_bytes'].values()) / 1e9:.0f} GB of memory on each.\n"
    ) in path.read_text()


def test_there_are_shipped_run_files() -> None:
    assert RUN_FILES


def test_resolved_config_is_a_run_file_of_the_same_run(tmp_path: Path) -> None:
    run = tiny_run(train__stop_at=5)
    (tmp_path / "config.toml").write_text(run.to_toml())
    assert load_run(tmp_path / "config.toml") == run
    assert RunConfig.model_validate_json(run.model_dump_json()) == run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train__zero_stagee": 1}, "train.zero_stagee: unknown key in [train]; did you mean zero_stage?"),
        ({"modle": {}}, "modle: unknown key at the top level; did you mean model?"),
        ({"train__steps": "many"}, 'train.steps: input should be a valid integer, got "many"'),
        ({"train__steps": 1.5}, "train.steps: input should be a valid integer, got 1.5"),
        ({"train__precision": "int8"}, "train.precision: input should be 'fp32', 'bf16' or 'fp16', got \"int8\""),
        ({"train__zero_stage": 4}, "train.zero_stage: input should be 0, 1, 2 or 3, got 4"),
        ({"train__zero_stage": True}, "train.zero_stage: input should be 0, 1, 2 or 3, got true"),
        ({"optim__betas": 0.9}, "optim.betas: input should be a list, got 0.9"),
        ({"optim__lr": -1.0}, "optim.lr: input should be greater than 0, got -1.0"),
        ({"optim__betas": [0.9, 1.5]}, "optim: betas = [0.9, 1.5] must lie in [0, 1)"),
        ({"model__n_head": 5}, "model: n_embd = 32 is not divisible by n_head = 5"),
        ({"model__preset": "124M"}, "model: give preset, or n_layer, n_head and n_embd, not both"),
        ({"batch__micro_batches": 0}, "batch.micro_batches: input should be greater than or equal to 1, got 0"),
        ({"batch__initial_micro_batches": 2}, "batch: initial_micro_batches = 2 needs warmup_steps"),
        (
            {"batch": {"micro_batches": 2, "initial_micro_batches": 3, "warmup_steps": 9}},
            "batch: initial_micro_batches = 3 is above micro_batches = 2",
        ),
        ({"cluster__workers": 5}, "cluster.workers = 5 is more than batch.micro_batches = 4"),
        ({"train__stop_at": 100}, "train: stop_at = 100 is after steps = 12"),
        ({"train__precision": "fp16", "train__zero_stage": 0}, "train: precision = fp16 needs zero_stage 1, 2 or 3"),
        (
            {"train__zero_stage": 0, "train__offload_optimizer": True},
            "train: offload_optimizer needs zero_stage 1, 2 or 3",
        ),
        ({"train__offload_param": True}, "train: offload_param needs zero_stage 3"),
        ({"checkpoint__every_minutes": "hourly"}, 'checkpoint.every_minutes: 0 or more minutes, or auto, got "hourly"'),
        ({"checkpoint__every_minutes": -1}, "checkpoint.every_minutes: 0 or more minutes, or auto, got -1"),
        (
            {"cluster__gpus_per_worker": 0.5},
            "cluster: gpus_per_worker = 0.5: 0 or 1, since NCCL wants a GPU for each worker",
        ),
        ({"prepare__sources": "https://u:pw@h/a.txt?sig=S"}, 'a valid list, got "https://h/a.txt"'),
        ({"train__spike": float("inf")}, "train.spike: input should be a finite number, got Infinity"),
        ({"optim__betas": [0.9, float("nan")]}, "optim.betas.1: input should be a finite number, got NaN"),
        ({"train__bucket_mb": 0}, "train.bucket_mb: input should be greater than or equal to 0.1, got 0"),
        ({"train__profile_steps": [12, 14]}, "train: profile_steps = [12, 14] begins after the last of 12 steps"),
        ({"train__nan_at": [3, 12]}, "train: nan_at = [3, 12]: step 12 is after the last of 12 steps"),
        (
            {"optim__schedule": "wsd", "optim__decay_steps": 1},
            "optim.decay_steps: input should be greater than or equal to 2, got 1",
        ),
        ({"data__path": {"d": 1, "x": 1, "./d": 2}}, "data.path: d and ./d are the same data set"),
        ({"data__path": {"s3://b/d": 1, "s3://b/d/": 2}}, "data.path: s3://b/d and s3://b/d/ are the same data set"),
        ({"data__path": {"a": 10**400}}, "data.path: the weight of a must be a number above 0, got 1000"),
        ({"checkpoint__every_minutes": 10**400}, "checkpoint.every_minutes: 0 or more minutes, or auto, got 1000"),
        ({"model": 5}, "model: input should be a table, got 5"),
        ({"train__profile_steps": [4, 4]}, "train: profile_steps = [4, 4]: give the first step and a later one"),
        (
            {"optim__name": "muon"},
            'optim.name = "muon" needs train.zero_stage = 0: at stage 2 a worker holds pieces ',
        ),
        ({"optim__eps": 1e-46}, "optim: eps = 1e-46 is below 1e-30"),
        (
            {"train__initial_loss_scale": 2**33},
            "train.initial_loss_scale: input should be less than or equal to 4294967296, got 8589934592",
        ),
        (
            {"data__shuffle_window": 2**31 + 1},
            "data.shuffle_window: input should be less than or equal to 2147483648, got 2147483649",
        ),
        ({"train__initial_loss_scale": 3}, "train: initial_loss_scale = 3 is not a power of two"),
        ({"optim__decay_steps": 3}, 'optim: decay_steps is of schedule = "wsd" only, not of "cosine"'),
        (
            {"optim__schedule": "wsd", "optim__decay_steps": 9},
            "optim.warmup_steps + optim.decay_steps = 13 is more than train.steps = 12",
        ),
        (
            {"train": {"precision": "bf16", "zero_stage": 0, "activation_checkpointing": True}},
            "train: activation_checkpointing in bf16 needs zero_stage 1, 2 or 3",
        ),
        ({"model__n_positions": 8}, "data.seq_len = 16 is longer than model.n_positions = 8"),
        ({"name": "../x"}, "name: use letters, digits"),
    ],
)
def test_mistakes_name_the_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        tiny_run(**change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_key_and_several_mistakes() -> None:
    with pytest.raises(UserError, match=r"run.toml: name: required, but missing \(and 1 more\)"):
        validate(RunConfig, {"model": {"preset": "tiny"}, "x": 1}, "run.toml")


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(validate(RunConfig, TINY, "t").to_toml())
    sets = ("optim.lr=1e-4", "name=other", 'prepare.sources=["a", "b"]', "cluster.workers=1", "train.precision=bf16")
    run = load_run(path, sets)
    assert (run.optim.lr, run.name, run.prepare.sources) == (1e-4, "other", ["a", "b"])
    assert (run.cluster.workers, run.train.precision) == (1, "bf16")
    for bad in ("optim.lr", "=3", "name.x=1", "optim.=1"):
        with pytest.raises(UserError, match="--set"):
            load_run(path, (bad,))


def test_what_is_too_much_for_a_parser_is_one_line() -> None:
    text = validate(RunConfig, TINY, "t").to_toml()
    for bad in ("9" * 5000, "[" * 5000):
        with pytest.raises(UserError, match=r"^run\.toml: a number has too many digits, or "):
            parse_toml(f"seed = {bad}\n".encode(), "run.toml")
        with pytest.raises(UserError, match=r"^--set train\.steps: a number has too many digits, or "):
            parse_toml(text.encode(), "run.toml", (f"train.steps={bad}",))
    for value in ("9" * 4000, "0x" + "f" * 5000):
        with pytest.raises(UserError, match=r"^run.toml: data.verify: input should be a valid boolean") as error:
            parse_toml(text.encode(), "run.toml", (f"data.verify={value}",))
        assert len(str(error.value)) < 400
    with pytest.raises(UserError, match=r"^run\.toml: train\.stop_at: "):
        parse_toml(text.encode(), "run.toml", (f"train.stop_at{'.x' * 5000}=1",))


def test_a_warm_up_as_long_as_the_run_is_said(tmp_path: Path) -> None:
    said = "optim.warmup_steps = 12 of train.steps = 12: the learning rate only rises"
    (tmp_path / "run.toml").write_text(tiny_run(storage=str(tmp_path)).to_toml())
    for warmup, is_said in ((11, False), (12, True)):
        dry = ["train", str(tmp_path / "run.toml"), "--dry-run", "--set", f"optim.warmup_steps={warmup}"]
        done = CliRunner().invoke(main, dry)
        assert (done.exit_code, said in done.stdout) == (0, is_said)
    assert not any(load_run(path).long_warmup for path in RUN_FILES)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.toml: no such file"):
        load_run(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(UserError, match=r"bad\.toml: not valid TOML: "):
        load_run(tmp_path / "bad.toml")
    (tmp_path / "mark.toml").write_bytes(b"\xef\xbb\xbf" + tiny_run().to_toml().replace("\n", "\r\n").encode())
    assert load_run(tmp_path / "mark.toml") == tiny_run()
    (tmp_path / "bin.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"bin\.toml: cannot be read"):
        load_run(tmp_path / "bin.toml")


def test_run_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        tiny_run().train.steps = 3  # type: ignore[misc]


def test_the_page_of_keys_is_current() -> None:
    import runpy

    render = runpy.run_path(str(ROOT / "docs" / "make_config.py"))["render"]
    assert (ROOT / "docs" / "config.md").read_text() == render(), "run: make docs"


def test_local_places_are_absolute_for_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"prepare__output": "data", "prepare__vocab_dir": "vocabulary", "data__path": "", "storage": "s3://b/runs"}
    run = tiny_run(**places).absolute()
    assert (run.prepare.output, run.prepare.vocab_dir) == (str(tmp_path / "data"), str(tmp_path / "vocabulary"))
    assert (run.data.path, run.storage) == (str(tmp_path / "data"), "s3://b/runs")
    assert tiny_run(prepare__vocab_dir="").absolute().prepare.vocab_dir == ""
