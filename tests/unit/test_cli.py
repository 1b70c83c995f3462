"""A user's mistakes: one line that names the file and the key, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gpt2dist.cli import main
from gpt2dist.commands.common import to_json
from gpt2dist.config import load_run
from gpt2dist.data.shards import read_manifest
from gpt2dist.model.gpt2 import GPT2, GPT2Config
from tests.conftest import tiny_run
from tests.unit.runs import save_run
from tests.unit.test_checkpoint import save


def cli(*args: str) -> Result:
    return CliRunner().invoke(main, args)


@pytest.fixture
def run_file(tmp_path: Path, make_data: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    run = tiny_run(data__path=make_data([3000]), prepare__output="out")
    Path("run.toml").write_text(run.to_toml())
    return "run.toml"


def assert_one_line(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert result.stdout == ""
    assert not Path("runs/run/config.toml").exists()


@pytest.mark.parametrize("command", ["prepare", "train"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "run.toml: train.stepz: unknown key in [train]; did you mean steps?"),
        ("train.steps=ten", 'run.toml: train.steps: input should be a valid integer, got "ten"'),
        ("batch.micro_batches=1", "run.toml: cluster.workers = 2 is more than batch.micro_batches = 1"),
    ],
)
def test_bad_keys(run_file: str, command: str, override: str, message: str) -> None:
    assert_one_line(cli(command, run_file, "--set", override), message)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train run.toml --set storage=s3://", "run.toml: storage: s3:// names no place"),
        ("train run.toml --set data.path=s3:///x", "s3:///x: names no bucket"),
        ("train run.toml --set train.peak_tflops=1e300", "train.peak_tflops: input should be less than or equal to"),
        ("train run.toml --set train.bucket_mb=1e308", "train.bucket_mb: input should be less than or equal to"),
        ("prepare run.toml --set prepare.shard_mb=1e308", "prepare.shard_mb: input should be less than or equal to"),
    ],
)
def test_places_and_numbers_that_are_none(run_file: str, command: str, message: str) -> None:
    assert_one_line(cli(*command.split()), message)


def test_a_value_of_set_is_one_value(run_file: str) -> None:
    result = cli("train", run_file, "--set", "train.steps=3\nstop_at=1")
    assert_one_line(result, "--set train.steps: '3\\nstop_at=1' sets more than one key")


@pytest.mark.parametrize(
    "option",
    [
        "plan run.toml --mfu nan",
        "plan run.toml --preemptions-per-day inf",
        "plan run.toml --restart-seconds nan",
        "plan run.toml --storage-gb-per-s inf",
        "generate runs/run --top-p nan",
        f"generate runs/run --seed {2**64}",
        "cluster spot-watch --interval nan",
    ],
)
def test_options_are_finite_numbers(run_file: str, option: str) -> None:
    result = cli(*option.split())
    assert result.exit_code == 2
    assert "Error: Invalid value for '--" in result.stderr


def test_data_that_is_given_and_is_none(run_file: str) -> None:
    run = load_run(run_file)
    result = cli("evaluate", save_run(run, GPT2(GPT2Config.from_run(run))), "--data", "nope")
    assert result.exit_code == 2
    assert (
        result.stderr
        == "error: --data: nope: not a prepared data set (no manifest.json); gpt2dist prepare RUN.toml makes one\n"
    )


def test_a_terminal_without_utf8(run_file: str) -> None:
    """Dry-run prints × and ·."""
    done = subprocess.run(
        [sys.executable, "-m", "gpt2dist", "train", run_file, "--dry-run"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_missing_run_file() -> None:
    for command in ("prepare", "train"):
        assert_one_line(cli(command, "none.toml"), "none.toml: no such file")


def test_missing_or_bad_sources(run_file: str, tmp_path: Path) -> None:
    def prepare(sources: str) -> Result:
        return cli("prepare", run_file, "--set", f"prepare.sources={sources}")

    (tmp_path / "x.pdf").write_text("x")
    assert_one_line(prepare('["none/*.txt"]'), f"{run_file}: prepare.sources: none/*.txt: no such file")
    assert_one_line(prepare("[]"), "prepare.sources: empty")
    assert_one_line(prepare('["builtin:x"]'), "prepare.sources: builtin:x: unknown; did you mean builtin:stdlib?")
    assert_one_line(prepare('["x.pdf"]'), "x.pdf: unknown kind of file")
    assert_one_line(cli("audit", "a" * 300), "File name too long")
    assert_one_line(cli("audit", "http://[::1"), "http://[::1: cannot be opened: Invalid IPv6 URL")
    assert not Path("out").exists()


def test_json_has_no_infinity() -> None:
    value = {"a": [1.5, math.inf, {"b": math.nan}], "c": (-math.inf, 2), "d": "nan"}
    assert json.loads(to_json(value)) == {"a": [1.5, None, {"b": None}], "c": [None, 2], "d": "nan"}


def test_missing_data_set(run_file: str) -> None:
    result = cli("train", run_file, "--set", "data.path=nowhere")
    advice = "not a prepared data set (no manifest.json); gpt2dist prepare RUN.toml makes one"
    assert_one_line(result, f"{run_file}: data.path: nowhere: {advice}")


def test_data_set_shorter_than_a_global_batch(run_file: str, make_data: Callable[..., str]) -> None:
    short = make_data([100], name="short")
    result = cli("train", run_file, "--set", f"data.path={short}")
    assert_one_line(result, "6 samples of data.seq_len = 16 are less than one global batch of 8")


def test_empty_data_set(run_file: str, make_data: Callable[..., str]) -> None:
    empty = make_data([], name="empty")
    assert_one_line(cli("train", run_file, "--set", f"data.path={empty}"), "the data set is empty")


def test_no_validation_split(run_file: str, make_data: Callable[..., str]) -> None:
    data = make_data([3000], val=0, name="noval")
    result = cli("train", run_file, "--set", f"data.path={data}")
    assert_one_line(result, "raise prepare.val_fraction or set eval.every_steps = 0")


def test_damaged_data_set(run_file: str, tmp_path: Path) -> None:
    shard = tmp_path / "data" / "train-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert_one_line(cli("train", run_file), "train-00000.npy: shard has 6,126 bytes, the manifest says 6,128")
    shard.unlink()
    assert_one_line(cli("train", run_file), "train-00000.npy: shard is missing")


def test_an_altered_shard_is_found_where_the_hashes_are_verified(run_file: str, tmp_path: Path) -> None:
    for name in ("val-00000.npy", "train-00000.npy"):
        data = bytearray((tmp_path / "data" / name).read_bytes())
        data[-300] ^= 1
        (tmp_path / "data" / name).write_bytes(data)
        result = cli("train", run_file, "--set", "data.verify=true")
        assert_one_line(result, f"data/{name}: shard is altered: its sha256 is not the manifest's")
        assert f"DAMAGED: data/{name}: altered" in cli("data", "verify", "data").stdout


def test_storage_not_writable(run_file: str) -> None:
    Path("file").write_text("")
    result = cli("train", run_file, "--set", "storage=file")
    assert_one_line(result, "run.toml: storage: cannot write to file: ")


def test_checkpoint_that_does_not_fit(run_file: str) -> None:
    save(Path("runs/run"))
    result = cli("train", run_file, "--set", "data.allow_changed=true")
    assert_one_line(result, "run.toml: model: does not fit the checkpoint")


def test_initial_weights_that_are_not_there(run_file: str) -> None:
    result = cli("train", run_file, "--set", "model.init_from=not/a/model")
    assert_one_line(result, "run.toml: model.init_from = not/a/model: not/a/model: no such directory")
    assert not Path("runs").exists()


def test_no_cluster_at_the_address(run_file: str) -> None:
    result = cli("train", run_file, "--address", "127.0.0.1:1")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: address: 127.0.0.1:1: no Ray cluster answers there")


def test_run_directories_that_are_none(run_file: str) -> None:
    for command in (["generate", "x"], ["evaluate", "x"], ["export", "x", "--output", "y"]):
        assert_one_line(cli(*command), "x: no run directory (config.toml) and no Hugging Face model (config.json)")
    for command in (["audit", "x"], ["goodput", "x"], ["checkpoint", "ls", "x"], ["checkpoint", "verify", "x"]):
        assert_one_line(cli(*command), "x: no such run directory")
    Path("y").mkdir()
    for command in (["audit", "y"], ["goodput", "y"], ["checkpoint", "ls", "y"], ["checkpoint", "verify", "y"]):
        assert_one_line(cli(*command), "y/config.toml: no such file")


def test_dry_run_starts_nothing(run_file: str) -> None:
    result = cli("train", run_file, "--dry-run", "--set", "cluster.workers=3")
    assert result.exit_code == 0
    for text in ("zero_stage = 2", "parameters", "FLOPs per token", "2 micro-batches a step on each of 3, 2 padding"):
        assert text in result.stdout
    assert not Path("runs").exists()
    numbers = json.loads(cli("train", run_file, "--dry-run", "--json").stdout)
    assert numbers["config"]["optim"]["lr"] == 3e-3
    assert numbers["tokens_per_step"] == 4 * 2 * 16
    assert numbers["tokens"] == 12 * 4 * 2 * 16
    grows = ("--set", "batch.warmup_steps=8")
    assert json.loads(cli("train", run_file, "--dry-run", "--json", *grows).stdout)["tokens"] == (15 + 4 * 4) * 2 * 16
    assert "in the first 8 steps growing from 1 micro-batches" in cli("train", run_file, "--dry-run", *grows).stdout
    assert numbers["memory_bytes"]["Adam moments"] == 8 * numbers["parameters_padded"] // 2


def test_changed_run_file(run_file: str) -> None:
    """On a run that exists, the dry run says what each changed key means; what cannot go on is refused."""
    run = load_run(run_file).absolute()
    run_dir = save_run(run, GPT2(GPT2Config.from_run(run)))  # the data set of this checkpoint is another one
    Path(run_dir, "config.toml").unlink()
    fingerprint = read_manifest("data").fingerprint
    same = ["--set", "data.allow_changed=true"]
    shown = cli("train", run_file, "--dry-run", "--set", "optim.lr=0.001", *same)
    assert shown.exit_code == 0, shown.stderr
    assert "going on from step 4 with changes:" in shown.stdout
    assert "  optim.lr: 0.003 → 0.001 (safe)" in shown.stdout
    assert f'  content of data.path: "f" → "{fingerprint[:16]}" (changes the data order)' in shown.stdout
    refused = cli("train", run_file, "--dry-run", "--set", "seed=4")
    assert refused.exit_code == 2
    assert "  seed: 3 → 4 (changes the data order)" in refused.stdout
    assert "run.toml: seed: 3 → 4" in refused.stderr
    assert_one_line(
        cli("train", run_file, "--set", "model.n_head=4", *same), "run.toml: model.n_head: 2 → 4: the saved"
    )
    numbers = json.loads(cli("train", run_file, "--dry-run", "--json", "--set", "optim.lr=0.001", *same).stdout)
    assert numbers["resume"]["step"] == 4
    lr = {"key": "optim.lr", "before": 0.003, "now": 0.001, "effect": "safe", "reason": ""}
    assert lr in numbers["resume"]["changes"]


@pytest.mark.parametrize(
    "command",
    [
        "prepare",
        "train",
        "generate",
        "evaluate",
        "export",
        "audit",
        "checkpoint ls",
        "checkpoint verify",
        "goodput",
        "data",
        "checkpoint",
        "jobs",
        "cluster",
        "",
    ],
)
def test_help_has_an_example(command: str) -> None:
    result = cli(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Example:" in result.stdout
