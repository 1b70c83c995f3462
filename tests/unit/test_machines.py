from __future__ import annotations

from pathlib import Path

import pytest

from gpt2dist.cluster.machines import load_machines
from gpt2dist.config import UserError


def write(directory: Path, text: str) -> Path:
    path = directory / "machines.toml"
    path.write_text(text)
    return path


def test_shipped_table_is_complete() -> None:
    """What is sold has a price, a spot machine is not dearer, and the entries say where their figures are from."""
    known = load_machines()
    for name, machine in known.machines.items():
        assert machine.source, name
        assert machine.on_demand_usd_per_hour or name == "cpu", name
        assert (machine.spot_usd_per_hour or 0) < (machine.on_demand_usd_per_hour or 1), name
        assert machine.gpu_memory_gib <= known.device_of(machine).memory_gib, name


def test_own_file_adds_machines_and_overrides_single_keys(tmp_path: Path) -> None:
    text = """
        [machines."p4d.24xlarge"]
        spot_usd_per_hour = 7.5
        [devices.B200]
        bf16_tflops = 2250.0
        fp32_tflops = 75
        memory_gib = 179.0
        bandwidth_gb_per_s = 8000.0
        source = "x"
        date = "2026"
        [machines.ours]
        vcpus = 64
        memory_gib = 512.0
        gpus = 2
        gpu = "B200"
        gpu_memory_gib = 179.0
        source = "x"
        date = "2026"
    """
    known = load_machines(write(tmp_path, text))
    changed = known.machine("p4d.24xlarge")
    assert changed.spot_usd_per_hour == 7.5
    assert (changed.gpus, changed.on_demand_usd_per_hour) == (
        8,
        load_machines().machines["p4d.24xlarge"].on_demand_usd_per_hour,
    )
    ours = known.machine("ours")
    assert known.device_of(ours).peak_flops("bf16") == 2.25e15
    assert known.device_of(ours).peak_flops("fp32") == 7.5e13
    assert ours.on_demand_usd_per_hour is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[machines."p4d.24xlarge"]\ngpuss = 3',
            "machines.p4d.24xlarge.gpuss: unknown key in [machines.p4d.24xlarge]; did you mean gpus?",
        ),
        ("[machines.x]\nvcpus = 2", "machines.x.memory_gib: required, but missing (and 2 more)"),
        ("[machine]\n", "machine: unknown key at the top level; did you mean machines?"),
        ("machines = 3", "machines: input should be a table, got 3"),
        ('[machines."g6.xlarge"]\ngpu = "L40"', "machines.g6.xlarge.gpu: L40: unknown; did you mean L40S?"),
        (
            '[machines."m7i.large"]\ngpus = 1',
            "machines.m7i.large: gpus = 1 needs gpu (a name under [devices]) and gpu_memory_gib",
        ),
        ("[machines", "not valid TOML"),
    ],
)
def test_mistakes_are_one_line_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_machines(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_unknown_machine_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"p4d\.24xlrge: unknown; did you mean p4d\.24xlarge\?"):
        load_machines().machine("p4d.24xlrge")
