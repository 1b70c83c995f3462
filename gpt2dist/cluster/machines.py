"""Machines and devices: what they hold, compute and cost. The figures are in machines.toml, with their sources."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from gpt2dist.config import Section, UserError, parse_table, read_file, validate

FILE = Path(__file__).with_name("machines.toml")
CPU = "CPU"
"""The device of machines without GPUs: one vCPU."""


class Device(Section):
    """One accelerator, or one vCPU."""

    bf16_tflops: float = Field(gt=0)
    """Dense peak in bf16 and fp16."""
    fp32_tflops: float = Field(gt=0)
    """Peak in fp32, without TF32."""
    memory_gib: float = Field(gt=0)
    """Memory of one."""
    bandwidth_gb_per_s: float | None = Field(default=None, gt=0)
    """Of its memory; not used."""
    source: str
    """Where the figures are from."""
    date: str
    """When they were read there."""

    def peak_flops(self, precision: str) -> float:
        """FLOP/s in a run's precision."""
        return (self.fp32_tflops if precision == "fp32" else self.bf16_tflops) * 1e12


class Machine(Section):
    """One instance type."""

    vcpus: int = Field(ge=1)
    """Logical processors."""
    memory_gib: float = Field(gt=0)
    """Host memory."""
    gpus: int = Field(default=0, ge=0)
    """Accelerators in it."""
    gpu: str = ""
    """Name of their device."""
    gpu_memory_gib: float = Field(default=0, ge=0)
    """Memory of each."""
    network_gbps: float | None = Field(default=None, gt=0)
    """Between machines, in 10^9 bits a second."""
    on_demand_usd_per_hour: float | None = Field(default=None, ge=0)
    """List price."""
    spot_usd_per_hour: float | None = Field(default=None, ge=0)
    """Price of a machine that may be taken away."""
    source: str
    """Where the figures are from."""
    date: str
    """When they were read there."""

    @model_validator(mode="after")
    def _gpus_described(self) -> Machine:
        if self.gpus and not (self.gpu and self.gpu_memory_gib):
            raise ValueError(f"gpus = {self.gpus} needs gpu (a name under [devices]) and gpu_memory_gib")
        if not self.gpus and (self.gpu or self.gpu_memory_gib):
            raise ValueError("gpu and gpu_memory_gib are of machines with gpus = 1 or more")
        return self

    @property
    def device(self) -> str:
        """Name of what computes in it."""
        return self.gpu if self.gpus else CPU


class Machines(Section):
    """All machines and devices that are known."""

    devices: dict[str, Device]
    """Name → device."""
    machines: dict[str, Machine]
    """Instance type → machine."""

    @model_validator(mode="after")
    def _devices_known(self) -> Machines:
        for name, machine in self.machines.items():
            if machine.device not in self.devices:
                raise ValueError(f"machines.{name}.gpu: {machine.device}: {_unknown(machine.device, self.devices)}")
        return self

    def machine(self, name: str) -> Machine:
        """One machine. Raises `UserError` on an unknown name."""
        if name not in self.machines:
            raise UserError(f"{name}: {_unknown(name, self.machines)}; add it in a file for --machines")
        return self.machines[name]

    def device_of(self, machine: Machine) -> Device:
        """What computes in a machine."""
        return self.devices[machine.device]


def _unknown(name: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return "unknown" + (f"; did you mean {near[0]}?" if near else "")


def load_machines(path: str | Path | None = None) -> Machines:
    """The table that comes with the package; a file's entries are added to it, or override single keys of it.

    Raises:
        UserError: the file is missing or not TOML, or a key is unknown, missing or of the wrong type.
    """
    table = parse_table(FILE.read_bytes(), str(FILE))
    if path is None:
        return validate(Machines, table, str(FILE))
    own = parse_table(read_file(path), str(path))
    for kind, entries in own.items():
        if not isinstance(entries, dict) or not isinstance(table.get(kind), dict):
            table[kind] = entries  # refused by `validate`, by name
            continue
        for name, entry in entries.items():
            both = isinstance(entry, dict) and name in table[kind]
            table[kind][name] = {**table[kind][name], **entry} if both else entry
    return validate(Machines, table, str(path))
