"""`plan`: memory against DeepSpeed's estimators, fitting, speed, cost, and the command."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from gpt2dist.cli import main
from gpt2dist.cluster.machines import load_machines
from gpt2dist.cluster.nodes import node_types
from gpt2dist.cluster.plan import arithmetic
from gpt2dist.cluster.setups import (
    Assumptions,
    Candidate,
    Options,
    Planner,
    grouped,
    memory_row,
    memory_table,
    options_for,
    options_of,
    workers_per_machine,
)
from gpt2dist.config import RunConfig, UserError, load_run
from gpt2dist.model import gpt2
from gpt2dist.report import planned
from gpt2dist.storage import location
from gpt2dist.train import rundir
from tests.conftest import ROOT, tiny_run

SIZES = ["124M", "355M", "774M", "1558M"]
KNOWN = load_machines()


def gpu_run(**changes: Any) -> RunConfig:
    shape = {"model": {"preset": "124M"}, "data": {"seq_len": 1024}, "cluster": {"workers": 8, "gpus_per_worker": 1}}
    defaults = {"batch__micro_batches": 64, "train__precision": "bf16", "train__peak_tflops": None}
    return tiny_run(**{**shape, **defaults, **changes})


def states(run: RunConfig) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer on the device, and on the host."""
    row = memory_row(run)
    groups = grouped(row.parts)
    gathered = row.parts.get("gathered weights", 0)  # of those that a step uses, which are not states
    return groups["weights"] - gathered + groups["gradients"] + groups["moments"], row.host_bytes


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("size", SIZES)
def test_memory_is_what_deepspeed_estimates(size: str, nodes: int) -> None:
    """Stages 2 and 3, where DeepSpeed has estimators, with 8 GPUs a node; docs/plan.md explains the differences.

    Stage 2: DeepSpeed counts 16-bit gradients of a rank's part, 2·n/W; here they pass through a fp32 bucket, which is
    not among the states. Stage 3: it adds weights and gradients of the largest layer; here gathered weights and the
    gradients of the table are parts of their own.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    workers = 8 * nodes
    changes = {"model": {"preset": size}, "cluster__workers": workers}
    config = gpt2.GPT2Config.from_run(gpu_run(**changes))
    n, largest = gpt2.count_parameters(config, published=False), config.padded_vocab_size * config.n_embd
    place = {"num_gpus_per_node": 8, "num_nodes": nodes}

    def ours(stage: int, **options: bool) -> tuple[int, int]:
        more = {f"train__{name}": value for name, value in options.items()}
        return states(gpu_run(**changes, train__zero_stage=stage, **more))

    _, device = zero2(n, **place, cpu_offload=False)
    assert ours(2)[0] + 2 * n // workers == pytest.approx(device, rel=1e-6)
    host, device = zero2(n, **place, cpu_offload=True, additional_buffer_factor=1)
    # It forgets that gradients are summed on the device.
    assert ours(2, offload_optimizer=True)[0] == pytest.approx(device + 4 * n / workers, rel=1e-6)
    # It also counts a fp32 copy of the model in every process, which is how it is usually built; here nobody holds one.
    # What a save copies to the host is ours alone.
    snapshot = 8 * 12 * n / workers
    assert 8 * ours(2)[1] == pytest.approx(snapshot, rel=1e-6)
    assert 8 * ours(2, offload_optimizer=True)[1] == pytest.approx(16 * n / nodes + snapshot, rel=1e-6)
    assert host == n * max(4 * workers, 16)

    _, device, layer = zero3(n, largest, **place, cpu_offload=False)
    assert layer == 4 * largest
    assert ours(3)[0] == pytest.approx(device - layer, rel=1e-6)
    host, device, _ = zero3(n, largest, **place, cpu_offload=True, cpu_offload_params=False, additional_buffer_factor=1)
    assert ours(3, offload_optimizer=True)[0] == pytest.approx(device - layer, rel=1e-6)
    assert 8 * ours(3, offload_optimizer=True)[1] == pytest.approx(host + snapshot, rel=1e-6)
    host, device, _ = zero3(n, largest, **place, additional_buffer_factor=1)
    assert ours(3, offload_optimizer=True, offload_param=True)[0] == device - layer == 0
    assert 8 * ours(3, offload_optimizer=True, offload_param=True)[1] == pytest.approx(host + snapshot, rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_memory_of_stages_0_and_1_by_the_papers_formula(size: str) -> None:
    """Rajbhandari et al. 2020, section 5: 2Ψ + 2Ψ + 12Ψ/N at stage 1; here gradients are summed in fp32, 4Ψ.

    At stage 0 16Ψ; here that and 16-bit copies, since the fp32 gradients stand beside them.
    """
    run = gpu_run(model={"preset": size})
    n = arithmetic(run)["parameters_padded"]
    stage0, stage1 = (states(gpu_run(model={"preset": size}, train__zero_stage=stage))[0] for stage in (0, 1))
    assert stage0 == (4 + 2 + 4 + 8) * n
    assert stage1 == pytest.approx((2 + 4 + 12 / 8) * n, rel=1e-6)


def test_table_has_all_that_a_run_file_may_ask_for() -> None:
    rows = memory_table(gpu_run())
    assert len({row.options for row in rows}) == len(rows) == 13  # at stage 0 in bf16 neither checkpointing nor offload
    by = {row.options: row.total for row in rows}
    for stage in (1, 2, 3):
        plain = by[Options(stage)]
        assert by[Options(stage, activation_checkpointing=True)] < plain
        assert by[Options(stage, offload=True)] < plain
    cpu = memory_table(tiny_run())
    assert not any(row.options.offload for row in cpu)  # where it would change nothing


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"offload_optimizer": True}, "ZeRO-3, offload of optimizer only"),
        ({"offload_param": True}, "ZeRO-3, offload of weights only"),
        ({"offload_optimizer": True, "offload_param": True}, "ZeRO-3, offload"),
        ({"activation_checkpointing": True, "zero_stage": 1}, "ZeRO-1, checkpointing"),
    ],
)
def test_what_is_shown_as_the_runs_own_is_the_runs_own(options: dict[str, Any], name: str) -> None:
    train = {f"train__{key}": value for key, value in {"zero_stage": 3, **options}.items()}
    run = gpu_run(cluster__workers=[8, 64], **train)
    own = [row for row in memory_table(run) if row.options == options_of(run)]
    assert [str(row.options) for row in own] == [name]
    assert own[0] == memory_row(run)
    (few,) = planner(run).as_written([candidate("g6.2xlarge", 8)])  # fewer workers than its most
    assert (str(few.options), few.workers) == (name, 8)
    assert few.memory_bytes == memory_row(gpu_run(cluster__workers=8, **train)).total


def test_on_cpu_workers_offload_is_no_option_of_a_run() -> None:
    plain, offloading = tiny_run(train__zero_stage=2), tiny_run(train__zero_stage=2, train__offload_optimizer=True)
    assert memory_table(plain) == memory_table(offloading)
    assert options_of(offloading) in [row.options for row in memory_table(offloading)]


# ---------------------------------------------------------------------- fitting


def candidate(name: str, most: int | None = None) -> Candidate:
    return Candidate(name, name, KNOWN.machine(name), most)


def planner(run: RunConfig, **assumed: Any) -> Planner:
    return Planner(run, KNOWN, Assumptions(**assumed))


@pytest.mark.parametrize(
    ("run", "machine", "machines", "why"),
    [
        (gpu_run(), candidate("p4d.24xlarge"), 1, ""),
        (gpu_run(cluster__workers=9), candidate("p4d.24xlarge"), 2, ""),
        (gpu_run(cluster__workers=9), candidate("p4d.24xlarge", 1), 2, "2 machines needed, max_workers = 1"),
        (gpu_run(), candidate("m7i.4xlarge"), 8, "has no GPUs"),
        (gpu_run(cluster__accelerator="A100"), candidate("p4de.24xlarge"), 1, ""),
        (gpu_run(cluster__accelerator="H100"), candidate("p4d.24xlarge"), 1, "has A100-40, cluster.accelerator = H100"),
        (
            gpu_run(cluster__cpus_per_worker=4),
            candidate("g5.xlarge"),
            8,
            "4 vCPUs are too few for a worker of 4 and the",
        ),
        (
            gpu_run(model={"preset": "1558M"}, batch__micro_sequences=8),
            candidate("g6.48xlarge"),
            1,
            "needs 28.8 GB, 20.8 GB are safe to use",
        ),
        (gpu_run(model={"preset": "1558M"}, train__zero_stage=0), candidate("g6.48xlarge"), 1, "needs 34.0 GB"),
        (gpu_run(model={"preset": "1558M"}), candidate("p4de.24xlarge"), 1, ""),
    ],
)
def test_what_keeps_a_run_off_a_machine(run: RunConfig, machine: Candidate, machines: int, why: str) -> None:
    (setup,) = planner(run).as_written([machine])
    assert setup.machines == machines
    assert setup.problem.startswith(why)
    assert setup.fits == (why == "")


def test_elastic_run_takes_what_there_may_be() -> None:
    run = gpu_run(cluster__workers=[8, 32])
    assert planner(run).as_written([candidate("p4d.24xlarge")])[0].workers == 32
    (setup,) = planner(run).as_written([candidate("p4d.24xlarge", 3)])
    assert (setup.machines, setup.workers, setup.fits) == (3, 24, True)
    assert not planner(gpu_run(cluster__workers=[32, 64])).as_written([candidate("p4d.24xlarge", 3)])[0].fits


def test_offload_needs_host_memory() -> None:
    changes = {"model": {"preset": "1558M"}, "cluster__workers": 1, "train__offload_optimizer": True}
    (small,) = planner(gpu_run(**changes)).as_written([candidate("g6e.xlarge")])
    (large,) = planner(gpu_run(**changes)).as_written([candidate("g6e.4xlarge")])
    assert small.problem.startswith("needs 44 GB of host memory")
    assert large.fits


def test_workers_share_the_memory_of_a_machine_with_those_of_the_run_alone() -> None:
    """However many more there would be room for; the machine that Ray fills first has the most."""
    cpus = {"cluster": {"workers": 1, "cpus_per_worker": 1}, "batch__micro_batches": 64, "data": {"seq_len": 1024}}
    m7i = candidate("m7i.4xlarge")
    limits = []
    for workers in (1, 2, 15, 16):
        run = tiny_run(model={"preset": "124M"}, **{**cpus, "cluster__workers": workers})
        (setup,) = planner(run).as_written([m7i])
        limits.append((setup.machines, setup.memory_limit_bytes))
    whole = 0.7 * 64 * 2**30
    expected = [(m, (whole / n - 2**29) / 1.1) for m, n in ((1, 1), (1, 2), (1, 15), (2, 15))]
    assert [limit for _, limit in limits] == pytest.approx([limit for _, limit in expected])
    assert [machines for machines, _ in limits] == [machines for machines, _ in expected]

    run = gpu_run(model={"preset": "1558M"}, cluster__workers=1, train__zero_stage=3, train__offload_optimizer=True)
    (alone,) = planner(run).as_written([candidate("g6.12xlarge")])
    assert alone.fits, alone.problem  # 47 GB on the host, and room for four


def test_smallest_is_the_least_that_fits() -> None:
    """One machine less, or the next weaker options, and it does not fit."""
    run = load_run(ROOT / "jobs" / "gpt2_1558m.toml")
    g6 = candidate("g6.12xlarge")
    found = planner(run).smallest(g6)
    assert found
    assert found.fits
    assert not found.options.offload
    plain = [Options(stage).of(run, found.workers) for stage in (0, 1, 2, 3)]
    assert all(not planner(run).setup(g6, found.machines, p).fits for p in plain if p)
    assert planner(gpu_run(batch__micro_sequences=4096)).smallest(candidate("g6.xlarge")) is None


def one_by_one(run: RunConfig, machine: Candidate) -> tuple[int, Options] | None:
    """What `smallest` has to find, with all machines tried."""
    plans, each = planner(run), workers_per_machine(run, machine.machine)
    for machines in range(1, -(-run.batch.micro_batches // each) + 1):
        variants = (o.of(run, min(each * machines, run.batch.micro_batches)) for o in options_for(run))
        setups = [plans.setup(machine, machines, variant) for variant in variants if variant]
        fitting = [setup for setup in setups if setup.fits]
        if fitting:
            return machines, min(fitting, key=lambda s: (s.options.offload, s.step_s)).options
    return None


WIDE = {"n_layer": 16, "n_head": 64, "n_embd": 8192}


@pytest.mark.parametrize("micro_batches", [13, 200])
@pytest.mark.parametrize("micro_sequences", [1, 4, 64])
@pytest.mark.parametrize("machine", ["g6.xlarge", "g6.12xlarge", "m7i.4xlarge"])
def test_smallest_by_halving_is_what_trying_all_finds(machine: str, micro_sequences: int, micro_batches: int) -> None:
    gpus = 0 if machine.startswith("m") else 1
    changes = {"batch": {"micro_sequences": micro_sequences, "micro_batches": micro_batches}, "cluster__workers": 1}
    run = gpu_run(model=WIDE, cluster__gpus_per_worker=gpus, **changes)
    found = planner(run).smallest(candidate(machine))
    assert (found and (found.machines, found.options)) == one_by_one(run, candidate(machine))


def test_smallest_gives_up_soon_where_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    setup = Planner.setup
    monkeypatch.setattr(Planner, "setup", lambda self, c, n, run: tried.append(n) or setup(self, c, n, run))
    run = gpu_run(batch={"micro_sequences": 4096, "micro_batches": 4096})
    assert planner(run).smallest(candidate("g6.xlarge")) is None
    assert len(set(tried)) <= 5 + 13
    assert max(tried) == 4096
    assert planner(run).smallest(candidate("g6.xlarge", 0)) is None


# ---------------------------------------------------------------------- speed and cost


def test_speed_and_cost_by_hand() -> None:
    """124M on one p4d: FLOPs ÷ (8 · 312 TFLOP/s · MFU) seconds, times the price."""
    run = load_run(ROOT / "jobs" / "gpt2_124m.toml")
    numbers = arithmetic(run)
    (setup,) = planner(run, mfu=0.5, preemptions_per_day=0.0).as_written([candidate("p4d.24xlarge")])
    rate = 8 * 312e12 * 0.5
    assert setup.tokens_per_s == pytest.approx(rate / numbers["flops_per_token"])
    seconds = numbers["flops"] / rate
    assert setup.spot.hours == pytest.approx(seconds / 3600, rel=1e-5)  # never taken away: one save, at the end
    assert setup.spot.usd == pytest.approx(setup.spot.hours * 9.9, rel=1e-5)
    assert setup.on_demand.goodput == pytest.approx(1, abs=2e-3)
    assert setup.on_demand.usd == pytest.approx(setup.on_demand.hours * 21.957642)
    assert setup.write_s == pytest.approx(numbers["checkpoint_bytes"] / 1e9)
    assert setup.stall_s == pytest.approx(setup.write_s / 80)  # 8 workers copy 10 GB/s each to host memory
    (setup,) = planner(run, mfu=0.5, preemptions_per_day=2.0).as_written([candidate("p4d.24xlarge")])
    assert setup.spot.mtbf_s == 43200
    assert setup.spot.checkpoint_interval_s == pytest.approx(math.sqrt(2 * 43200 * setup.stall_s))
    blocking = planner(run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"background": False})}))
    (waiting,) = blocking.as_written([candidate("p4d.24xlarge")])
    assert waiting.stall_s == setup.write_s
    assert setup.spot.hours == pytest.approx(seconds / 3600 / setup.spot.goodput)


def test_padding_and_checkpointing_cost_time() -> None:
    p4d = candidate("p4d.24xlarge")
    even, padded = (planner(gpu_run(batch__micro_batches=m)).setup(p4d, 1) for m in (64, 65))
    assert padded.step_s == pytest.approx(even.step_s * 9 / 8)
    again = planner(gpu_run(train__activation_checkpointing=True)).setup(p4d, 1)
    assert 1.2 < again.step_s / even.step_s < 1 + 1 / 3  # the head is not computed again


def test_network_holds_up_small_machines_only() -> None:
    run = gpu_run(train__zero_stage=1)
    fast = planner(run).setup(candidate("p4d.24xlarge"), 1)
    slow = planner(run).setup(candidate("g5.xlarge"), 8)
    assert (fast.network_s, fast.network_bound) == (0.0, False)
    n = arithmetic(run)["parameters_padded"]
    assert slow.network_s == pytest.approx(7 / 8 * (8 * n + 2 * n) / 1.25e9)
    every_micro_batch = planner(gpu_run(train__zero_stage=2)).setup(candidate("g5.xlarge"), 8)
    assert every_micro_batch.network_s == pytest.approx(7 / 8 * (8 * 8 * n + 2 * n) / 1.25e9)
    assert every_micro_batch.network_bound


# ---------------------------------------------------------------------- the command


CLUSTER = """
max_workers: 6
head_node_type: head
available_node_types:
  head: {node_config: {InstanceType: m7i.xlarge}, resources: {CPU: 0}}
  gpu: {node_config: {InstanceType: p4d.24xlarge}, min_workers: 0, max_workers: 4}
  small: {node_config: {InstanceType: g5.12xlarge}, max_workers: 1}
  gcp: {node_config: {machineType: zones/x/machineTypes/a2-highgpu-8g}}
"""


def cli(*args: str) -> Result:
    return CliRunner().invoke(main, ["plan", *args])


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    return path


def test_node_types_of_a_cluster_file(cluster: Path) -> None:
    found, head = node_types(str(cluster), KNOWN)
    assert [(c.name, c.instance_type, c.max_machines) for c in found] == [
        ("gpu", "p4d.24xlarge", 4),
        ("small", "g5.12xlarge", 1),
        ("gcp", "a2-highgpu-8g", 6),
    ]
    assert head == KNOWN.machine("m7i.xlarge")


def test_command_says_which_node_types_fit_and_counts_the_head(cluster: Path) -> None:
    done = cli(
        str(ROOT / "jobs/gpt2_124m.toml"), "--cluster", str(cluster), "--set", "cluster.accelerator=''", "--json"
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    gpu, small, gcp = result["as_written"]
    assert (gpu["fits"], gcp["fits"]) == (True, True)
    assert (small["fits"], small["problem"]) == (False, "2 machines needed, max_workers = 1")
    assert gpu["on_demand"]["usd"] == pytest.approx(gpu["on_demand"]["hours"] * (21.957642 + 0.2016))
    assert gcp["spot"]["usd"] is None
    assert {row["zero_stage"] for row in result["memory"]} == {0, 1, 2, 3}
    too_small = cli(str(ROOT / "jobs/gpt2_124m.toml"), "--machine", "m7i.xlarge")
    assert too_small.exit_code == 1
    assert "does not fit: has no GPUs (8 × m7i.xlarge)" in too_small.stdout


def test_a_reader_that_goes_away_ends_it_without_a_traceback() -> None:
    command = f"{sys.executable} -m gpt2dist plan {ROOT / 'jobs/gpt2_124m.toml'} | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("gpt2-124m\n", "")


@pytest.mark.parametrize(("width", "shown", "not_shown"), [(80, "total", "moments"), (140, "moments", "…")])
def test_tables_fit_the_terminal(width: int, shown: str, not_shown: str) -> None:
    run_file = str(ROOT / "jobs/gpt2_124m.toml")
    console = Console(file=io.StringIO(), width=width)
    planned.show(console, load_run(run_file, ()), json.loads(cli(run_file, "--json").stdout))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "ZeRO-3, checkpointing, offload " in text
    assert shown in text
    assert not_shown not in text
    assert "…" not in text


def test_measured_mfu_is_the_median_without_the_start(tmp_path: Path) -> None:
    run = gpu_run(storage=str(tmp_path), name="trial")
    values = [0.01, 0.02, *([0.31] * 10), *([0.33] * 8)]
    rundir.metrics_log(run.run_dir).append(*({"step": i, "mfu": value} for i, value in enumerate(values)))
    file = tmp_path / "run.toml"
    file.write_text(run.to_toml())
    done = cli(str(file), "--measured", run.run_dir, "--machine", "p4d.24xlarge", "--json")
    assert done.exit_code == 0, done.output
    assumptions = json.loads(done.stdout)["assumptions"]
    assert assumptions["mfu"] == 0.31
    assert assumptions["mfu_source"] == f"measured by {run.run_dir}, 18 steps"
    assert location(run.run_dir).is_dir()


@pytest.mark.parametrize("run_file", sorted((ROOT / "jobs").glob("*.toml")), ids=lambda p: p.name)
def test_every_shipped_run_file_has_a_plan(run_file: Path) -> None:
    done = cli(str(run_file))
    assert done.exit_code == 0, done.output
    assert "the fewest machines with which it fits" in done.stdout
    assert "nan" not in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--machine", "p4d.24xlrge"], "p4d.24xlrge: unknown; did you mean p4d.24xlarge?"),
        (["--machine", "p4d.24xlarge", "--cluster", "x"], "give --cluster or --machine, not both"),
        (["--mfu", "0.5", "--measured", "x"], "give --mfu or --measured, not both"),
        (["--cluster", "missing.yaml"], "missing.yaml: no such file"),
        (["--machines", "missing.toml"], "missing.toml: no such file"),
        (["--measured", "nowhere"], "--measured nowhere: no metrics.jsonl with steps in it"),
    ],
)
def test_mistakes_are_one_line(args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(str(ROOT / "jobs/gpt2_124m.toml"), *args)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    assert message in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("p4d.24xlarge", "p4d.25xlarge"),
            "available_node_types.gpu: p4d.25xlarge: unknown; did you mean p4d.24xlarge?",
        ),
        (
            ("InstanceType: p4d.24xlarge", "x: 1"),
            "available_node_types.gpu.node_config: no InstanceType (machineType on GCP)",
        ),
        (
            ("max_workers: 4", "max_workers: many"),
            "available_node_types.gpu.max_workers: a number of machines, got 'many'",
        ),
        (("max_workers: 6", "max_workers: -1"), "max_workers: a number of machines, got -1"),
        (("available_node_types", "node_types"), "not a cluster file of `ray up`: no available_node_types"),
        (("max_workers: 6", "max_workers: [6"), "not valid YAML: "),
        ((CLUSTER[CLUSTER.index("  gpu:") :], ""), "available_node_types: no node type for workers"),
    ],
)
def test_mistakes_in_a_cluster_file(cluster: Path, change: tuple[str, str], message: str) -> None:
    cluster.write_text(CLUSTER.replace(*change))
    with pytest.raises(UserError) as caught:
        node_types(str(cluster), KNOWN)
    assert str(caught.value).startswith(f"{cluster}: {message}")
    assert "\n" not in str(caught.value)
