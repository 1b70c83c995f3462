"""The entry point of a Ray job: `python -m gpt2dist.cluster.entry [--retries N] COMMAND[,COMMAND] ARGUMENTS`.

Runs `gpt2dist COMMAND ARGUMENTS` in a process of its own, and again when that dies: `train` goes on from its newest
checkpoint. The scripts in jobs/ call it too.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from typing import Any

from gpt2dist.cluster.scratch import end_with_parent

PAUSE_S = 5.0
"""Before the driver is started again; what is left of the old one has gone by then."""
USER_ERROR = 2
"""Exit code after a mistake of the user's: starting again would not help. What has started once was none: then the
storage or Ray's head is away."""


def main(arguments: list[str]) -> int:
    """Run the commands one after the other; the exit code of the first that fails for good, else 0."""
    parser = argparse.ArgumentParser(prog="gpt2dist.cluster.entry", description=__doc__, allow_abbrev=False)
    parser.add_argument("--retries", type=int, default=0, help="start a command again so often when it dies or fails")
    parser.add_argument("commands", help="of gpt2dist, comma-separated")
    known, rest = parser.parse_known_args(arguments)
    stop = _Stop()
    for command in known.commands.split(","):
        code = _run([sys.executable, "-m", "gpt2dist", command, *rest], known.retries, stop)
        if code or stop.asked:
            return code
    return 0


class _Stop:
    """Ray sends SIGTERM to the entry point and all below it at once: the child has it already, and saves."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True


def _run(command: list[str], retries: int, stop: _Stop) -> int:
    for left in range(retries, -1, -1):
        code = subprocess.Popen(command, preexec_fn=end_with_parent).wait()  # else it trains on, unseen
        if code == 0 or stop.asked or (code == USER_ERROR and left == retries):
            break
        what = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        print(f"the driver {what}; " + (f"{left} retries left" if left else "no retries left"), flush=True)
        if left:
            time.sleep(PAUSE_S)
        if stop.asked:
            break
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
