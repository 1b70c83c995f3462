"""Checkpoints in the background: copied to host memory while the next step computes its gradients, then written.

    idle ── begin ──► copying ──► writing ── all ranks have written ──► committing ── index published ──► idle
                                     └────────────── a rank could not write ──────────────┴──► idle, not saved

The state changes only when the optimizer takes a step; `hold` waits for the copy, should it not be done by then.

All ranks call the same methods after the same steps. What moves them on travels with the all-reduce that every step
has anyway: how many ranks are still busy, and how many have failed. One save is in flight at a time; whoever wants
another one asks again later.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upath import UPath

from gpt2dist.config import UserError
from gpt2dist.train.fragment import Fragment
from gpt2dist.train.index import SavedFile, SavedFragment
from gpt2dist.train.snapshot import Snapshot

if TYPE_CHECKING:
    from gpt2dist.train.engine import Engine

GUESS_BYTES_PER_S = 100e6
"""Assumed speed of storage until a save was measured."""
FINISH_POLL_S = 1.0
"""Ranks that wait for the end of a save tell each other this often how far they are."""
RECENT = 5
"""Saves that an estimate looks at."""


@dataclass(frozen=True)
class Written:
    """What all ranks have written; rank 0 commits it."""

    directory: UPath
    files: list[SavedFile]
    fragments: list[SavedFragment]


@dataclass(frozen=True)
class Outcome:
    """The end of one save."""

    step: int
    seconds: float
    """From its beginning to the commit, as this rank saw it: between two steps."""
    work: float
    """Seconds that copying and writing took on the slowest rank, and the commit, on rank 0 alone."""
    stall: float
    """Seconds for which it has held up the loop."""
    bytes: int
    problem: str
    """Why it could not be saved; empty: it is committed."""


@dataclass
class _Save:
    step: int
    directory: UPath
    commit: Callable[[Written], None]
    start: float
    stall: float
    work: Future[Any]
    """Of the file and the seconds that it took, then of the seconds of the commit."""
    work_s: float = 0.0
    written: bool = False


class Saver:
    """Saves of one rank, one at a time."""

    def __init__(self, ranks: Engine, attempt: int, work_s: Iterable[float] = ()) -> None:
        """work_s: `Outcome.work` of the saves of earlier attempts, oldest first, for `estimate`."""
        self.ranks = ranks
        self._snapshot = Snapshot(ranks.rank, attempt)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._copied = threading.Event()
        self._tables: list[SavedFragment] | None = None
        self._save: _Save | None = None
        self._work_s: deque[float] = deque(work_s, maxlen=RECENT)

    @property
    def busy(self) -> bool:
        """Whether a save is in flight; the same on all ranks."""
        return self._save is not None

    @property
    def bytes(self) -> int:
        """What this rank saves."""
        return self._snapshot.bytes

    def prepare(self) -> None:
        """Allocate the host memory, so that the first save stalls no longer than others."""
        self._snapshot.take(self.ranks.fragments(owned=True))

    def begin(self, step: int, directory: UPath, commit: Callable[[Written], None]) -> None:
        """Save the state as it is now; `commit` is rank 0's last act. Before it changes, call `hold`."""
        start = time.monotonic()
        fragments = list(self.ranks.fragments(owned=True))
        self._copied.clear()
        work = self._thread.submit(self._copy_and_write, fragments, directory)
        self._save = _Save(step, directory, commit, start, time.monotonic() - start, work)

    def _copy_and_write(self, fragments: list[Fragment], directory: UPath) -> tuple[SavedFile, float]:
        start = time.monotonic()
        try:
            self._snapshot.take(fragments)
        finally:
            self._copied.set()
        return self._snapshot.write(directory), time.monotonic() - start

    def hold(self) -> float:
        """Wait until the save in flight has its copy of the state, which may then change; returns the seconds."""
        if self._save is None:
            return 0.0
        start = time.monotonic()
        self._copied.wait()
        seconds = time.monotonic() - start
        self._save.stall += seconds
        return seconds

    def status(self) -> list[float]:
        """[busy, failed] of this rank, to be summed over all for `advance`."""
        if self._save is None:
            return [0.0, 0.0]
        work = self._save.work
        return [float(not work.done()), float(work.done() and work.exception() is not None)]

    def advance(self, busy: float, failed: float) -> Outcome | None:
        """Move the save on, given the sums of `status`; its outcome when it has ended. A collective."""
        save = self._save
        if save is None or busy:
            return None
        start = time.monotonic()
        if failed:
            error = save.work.exception()
            if error is not None and not isinstance(error, (OSError, UserError)):
                raise error  # a defect of ours, not of the storage
            problems = self.ranks.gather_objects(_one_line(error))
            return self._end(save, next(p for p in problems if p))
        if not save.written:
            done = self.ranks.gather_objects(save.work.result())
            files, save.work_s = [file for file, _ in done], max(seconds for _, seconds in done)
            if self._tables is None:  # they stay what they are
                tables = self.ranks.gather_objects(self._snapshot.table)
                self._tables = [fragment for table in tables for fragment in table]
            save.written = True
            save.work = Future()
            if self.ranks.rank == 0:
                written = Written(save.directory, files, self._tables)
                save.work = self._thread.submit(_timed, save.commit, written)
            else:
                save.work.set_result(0.0)
            save.stall += time.monotonic() - start
            return None
        save.work_s += save.work.result()
        return self._end(save, "")

    def finish(self, progress: Callable[[], None]) -> Outcome | None:
        """Wait for the save in flight; `progress` is called while some rank's writing goes on. A collective."""
        written = -1
        while self._save is not None:
            save, start = self._save, time.monotonic()
            wait([save.work], FINISH_POLL_S)
            now = self._snapshot.written
            *status, moved = self.ranks.sum_over_ranks([*self.status(), float(now != written)])
            written = now
            if moved:
                progress()
            save.stall += time.monotonic() - start
            outcome = self.advance(*status)
            if outcome is not None:
                return outcome
        return None

    def estimate(self, size: int, of: Callable[[Iterable[float]], float] = max) -> float:
        """Seconds that a save is at work until its commit, on rank 0; before the first one a guess for `size` bytes.

        of: the last ones, the longest where all depends on it.
        """
        return of(self._work_s) if self._work_s else 2.0 + size / GUESS_BYTES_PER_S

    def close(self) -> None:
        """End the thread; a save in flight goes on to its end."""
        self._thread.shutdown(wait=True)

    def _end(self, save: _Save, problem: str) -> Outcome:
        self._save = None
        seconds = time.monotonic() - save.start
        if not problem:
            self._snapshot.kept()
            self._work_s.append(save.work_s)
        return Outcome(save.step, seconds, save.work_s, save.stall, self._snapshot.bytes, problem)


def _timed(commit: Callable[[Written], None], written: Written) -> float:
    start = time.monotonic()
    commit(written)
    return time.monotonic() - start


def _one_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0] if error is not None else ""
