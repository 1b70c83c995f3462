"""The console that commands print on."""

from __future__ import annotations

from typing import IO

from rich.console import Console


def make_console(file: IO[str] | None = None, *, stderr: bool = False) -> Console:
    """A console; on a pipe it does not wrap lines at 80 columns."""
    console = Console(file=file, stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(file=file, stderr=stderr, highlight=False, width=160)
