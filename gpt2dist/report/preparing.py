"""The progress of a preparation: documents, tokens, MB/s, ETA."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gpt2dist.data.prepare import Progress as State


class PrepareView:
    """A progress bar; on a pipe it stays silent, the table at the end says it all."""

    def __init__(self, console: Console) -> None:
        columns = (BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.description}"))
        self.progress = Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=console)
        self.progress.disable = not console.is_terminal
        self.task = self.progress.add_task("starting Ray", total=None)
        self.start = 0.0
        self.resumed_bytes = 0

    def __enter__(self) -> PrepareView:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def update(self, state: State) -> None:
        """Show a new state; the rate counts from the first one."""
        if not self.start:
            self.start, self.resumed_bytes = time.monotonic(), state.bytes
        rate = (state.bytes - self.resumed_bytes) / 1e6 / max(1e-9, time.monotonic() - self.start)
        skipped = f", {state.skipped:,} left out" if state.skipped else ""
        text = f"{state.documents:,} documents{skipped}, {state.tokens:,} tokens, {rate:.1f} MB/s"
        text += f", {state.step}" if state.step else ""
        self.progress.update(self.task, total=state.total_bytes, completed=state.bytes, description=text)
