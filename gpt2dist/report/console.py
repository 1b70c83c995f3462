"""The console that commands print on."""

from __future__ import annotations

from typing import IO

from rich.console import Console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Who reads it has gone: an error like others, where rich would end the program."""
        raise BrokenPipeError


def make_console(file: IO[str] | None = None, *, stderr: bool = False) -> Console:
    """A console; on a pipe it does not wrap lines at 80 columns. Text is printed as it is, brackets too."""
    console = _Console(file=file, stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    return console
