"""`make bench`: every benchmark, each ratio measured in one run. Prints a table, writes build/bench.json.

python -m tests.bench [name ...] runs only those of that name or, where none has it, whose name contains the word.
"""

from __future__ import annotations

import json
import signal
import sys
from functools import partial

from rich.console import Console
from rich.table import Table

from tests.bench import checkpoints, failures, generation, memory, preparation, stream, training
from tests.bench.common import Row
from tests.conftest import ROOT

BENCHMARKS = {
    "prepare-speed": preparation.speed,
    "prepare-memory": preparation.memory,
    "stream": stream.alone,
    "data-wait": stream.wait,
    "peers": training.peers,
    "overhead": training.overhead,
    "scaling": training.scaling,
    "generation": generation.speed,
    "memory": memory.rows,
    "save-stall": checkpoints.stall,
    "load-stage-2": partial(checkpoints.load, 2),
    "load-stage-3": partial(checkpoints.load, 3),
    "save-overhead": checkpoints.overhead,
    "restart": checkpoints.restart,
    "failures": failures.rows,
}


def main() -> None:
    """All benchmarks, or those that the arguments name."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended too
    console = Console()
    words = sys.argv[1:] or list(BENCHMARKS)
    wanted = [n for n in BENCHMARKS if n in words or any(w in n for w in words if w not in BENCHMARKS)]
    if not wanted:
        sys.exit(f"no benchmark of that name; there are: {', '.join(BENCHMARKS)}")
    path = ROOT / "build" / "bench.json"
    path.parent.mkdir(exist_ok=True)
    rows: dict[str, Row] = {}
    for name in wanted:
        with console.status(f"{name} ({len(rows)} rows so far)"):
            for row in BENCHMARKS[name]():
                rows[row.name] = row
        path.write_text(json.dumps([row.to_json() for row in rows.values()], indent=1) + "\n")
    table = Table("what", "ratio", "spread", "bar", "")
    for row in rows.values():
        values = row.to_json()
        bar = f"{'≤' if row.at_most else '≥'} {row.bar:g}"
        spread = f"{values['low']:.3f} to {values['high']:.3f}"
        table.add_row(row.name, f"{values['ratio']:.3f}", spread, bar, "met" if row.met else "NOT met")
    console.print(table)


if __name__ == "__main__":
    main()
