"""Imports go one way: a module may import from layers below its own, or from its own layer's package."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from tests.conftest import ROOT

# From the top down. A module belongs to the longest prefix that fits.
LAYERS = [
    ["gpt2dist.cli", "gpt2dist.__main__"],
    ["gpt2dist.commands"],
    ["gpt2dist.cluster", "gpt2dist.report", "gpt2dist.train.launch", "gpt2dist.train.evaluation"],
    ["gpt2dist.train.worker", "gpt2dist.train.preflight", "gpt2dist.train.reservation", "gpt2dist.data.prepare"],
    ["gpt2dist.train.trainer", "gpt2dist.train.saved", "gpt2dist.data.stream"],
    [
        "gpt2dist.train.divergence",
        "gpt2dist.train.restore",
        "gpt2dist.train.savetimes",
        "gpt2dist.train.watchdog",
    ],
    ["gpt2dist.train.saver"],
    ["gpt2dist.train.engine", "gpt2dist.train.checkpoint", "gpt2dist.train.ledger"],
    [
        "gpt2dist.train.allocator",
        "gpt2dist.train.interval",
        "gpt2dist.train.notice",
        "gpt2dist.train.optim",
        "gpt2dist.train.peak",
        "gpt2dist.train.profile",
        "gpt2dist.train.fragment",
        "gpt2dist.train.fragment_file",
        "gpt2dist.train.index",
        "gpt2dist.train.snapshot",
        "gpt2dist.train.interval",
        "gpt2dist.train.resume",
        "gpt2dist.train.rundir",
        "gpt2dist.train.spent",
        "gpt2dist.train.zero",
    ],
    ["gpt2dist.model"],
    ["gpt2dist.data"],
    ["gpt2dist.logs"],
    ["gpt2dist.storage"],
    ["gpt2dist.s3"],
    ["gpt2dist.config"],
    ["gpt2dist.urls"],
]
# Siblings of one layer that must not know each other.
APART = [("gpt2dist.train.engine", "gpt2dist.train.checkpoint"), ("gpt2dist.cluster", "gpt2dist.report")]


def layer(module: str) -> tuple[int, str]:
    fitting = [
        (len(prefix), depth, prefix)
        for depth, names in enumerate(LAYERS)
        for prefix in names
        if module == prefix or module.startswith(prefix + ".")
    ]
    assert fitting, f"{module} is in no layer"
    _, depth, prefix = max(fitting)
    return depth, prefix


@functools.cache
def imports() -> list[tuple[str, str]]:
    found = []
    for path in (ROOT / "gpt2dist").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    target = f"{node.module}.{alias.name}"
                    is_module = (ROOT / Path(*target.split("."))).with_suffix(".py").exists()
                    found.append((name, target if is_module else node.module))
            elif isinstance(node, ast.Import):
                found += [(name, alias.name) for alias in node.names]
    return found


def test_no_backward_imports() -> None:
    arrows = [(a, b) for a, b in imports() if b.startswith("gpt2dist.") and a != "gpt2dist"]
    assert len(arrows) > 40
    for source, target in arrows:
        (depth, own), (target_depth, other) = layer(source), layer(target)
        same_package = source.rsplit(".", 1)[0] == target.rsplit(".", 1)[0]
        assert target_depth > depth or (target_depth == depth and (own == other or same_package)), (
            f"{source} imports {target}: a backward arrow"
        )
        assert not any({own, other} == set(pair) for pair in APART), f"{source} imports {target}"


def test_two_modules_know_deepspeed_and_the_loop_knows_no_ray() -> None:
    engine = {"gpt2dist.train.engine", "gpt2dist.train.zero"}
    assert {a for a, b in imports() if b.split(".")[0] == "deepspeed"} == engine
    assert {a for a, b in imports() if b == "gpt2dist.train.zero"} == {"gpt2dist.train.engine"}
    users = {a for a, b in imports() if b.split(".")[0] == "ray"}
    reachable, todo = set(), ["gpt2dist.train.trainer"]
    while todo:  # nothing that the trainer imports, directly or not, imports ray
        module = todo.pop()
        if module not in reachable:
            reachable.add(module)
            todo += [b for a, b in imports() if a == module and b.startswith("gpt2dist")]
    assert "gpt2dist.train.engine" in reachable
    assert not users & reachable


def test_no_pickle_is_loaded() -> None:
    for path in (ROOT / "gpt2dist").rglob("*.py"):
        text = path.read_text()
        assert "pickle" not in {b.split(".")[0] for a, b in imports() if a.endswith(path.stem)}
        assert "torch.load" not in text
        assert "allow_pickle=True" not in text
