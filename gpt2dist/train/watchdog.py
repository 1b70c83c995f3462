"""Hangs: a rank that finishes no step in time. The stacks of all ranks are written, then the process ends.

A rank that has stopped altogether (SIGSTOP, a dead disk) cannot help itself, so each rank also looks after its
neighbours on the same machine: it asks py-spy for their stacks, and ends them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2dist.config import RunConfig
from gpt2dist.storage import StorageError, location, publish
from gpt2dist.train import rundir

EXIT_CODE = 70
"""Of a process that its watchdog ended."""
GATHER_S = 5.0
"""All ranks notice a hang at about the same time; this long they leave each other to write their stacks."""
PY_SPY_S = 20.0


class Watchdog:
    """Ends this process if `beat` is not called for `cluster.hang_timeout_s`; begins with the first beat."""

    def __init__(self, run: RunConfig, rank: int, attempt: int, gather: Callable[[Any], list[Any]]) -> None:
        """`gather`: every rank's item, in order of rank; a collective."""
        self.run, self.rank, self.attempt = run, rank, attempt
        here = _machine()
        others = enumerate(gather((here, os.getpid())))
        self.neighbours = {other: pid for other, (host, pid) in others if host == here and other != rank}
        self.timeout = run.cluster.hang_timeout_s
        self.step = 0
        self._last: float | None = None
        self._closed = threading.Event()
        if self.timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """A step was done, or something else that takes long."""
        self.step, self._last = step, time.monotonic()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.timeout / 4)):
            if self._last is not None and time.monotonic() - self._last > self.timeout:
                self._end()

    def _end(self) -> None:
        """Stacks of this rank and of its neighbours, an event, the end; also where the storage never answers."""
        patience = GATHER_S + PY_SPY_S * (1 + len(self.neighbours))
        threading.Thread(target=self._leave, args=(patience,), name="watchdog-end", daemon=True).start()
        with contextlib.suppress(OSError, StorageError):  # the storage may be what hangs or is full
            self._write(self.rank, _own_stacks())
        with contextlib.suppress(OSError, StorageError):
            what = {"rank": self.rank, "attempt": self.attempt, "step": self.step, "seconds": self.timeout}
            rundir.events_log(self.run.run_dir).append({"time": time.time(), "event": "hang", **what})
        silent = {rank: pid for rank, pid in self.neighbours.items() if _stopped(pid)}
        for rank, pid in silent.items():  # the others write their own
            with contextlib.suppress(OSError, StorageError):
                self._write(rank, _stacks_of(pid))
        self._leave(GATHER_S)

    def _leave(self, after: float) -> None:
        time.sleep(after)
        for pid in self.neighbours.values():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        os._exit(EXIT_CODE)

    def _write(self, rank: int, text: str) -> None:
        name = f"attempt-{self.attempt}-rank-{rank:05d}.txt"
        publish(location(self.run.run_dir) / rundir.STACKS / name, text.encode())


def _machine() -> tuple[str, ...]:
    """What processes have in common whose ids mean the same: host names are not unique, containers have own ids."""
    boot, ids = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    with contextlib.suppress(OSError):
        return socket.gethostname(), boot.read_text(), os.readlink(ids)
    return (socket.gethostname(),)


def _own_stacks() -> str:
    with tempfile.TemporaryFile("w+") as f:
        faulthandler.dump_traceback(f, all_threads=True)
        f.seek(0)
        return f.read()


def _stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal, or waits in the kernel and cannot be woken."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in "TtD"


def _stacks_of(pid: int) -> str:
    """By py-spy, which needs the right to look into another process (ptrace)."""
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        return f"process {pid} does not run, and there is no py-spy to look into it"
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PY_SPY_S, check=False)
    except subprocess.TimeoutExpired:
        return f"process {pid}: py-spy found no end"
    return done.stdout or f"process {pid}: py-spy: {done.stderr}"
