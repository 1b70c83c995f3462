"""The console that commands print on."""

from __future__ import annotations

import errno
import os
from typing import IO, Any

from rich.console import Console

PIPE_WIDTH = 1000
"""Columns where nobody looks: no line is broken."""


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        """The terminal wraps lines of text, so that paths and commands in them can be copied and found."""
        if all(isinstance(o, str) for o in objects):
            options.setdefault("soft_wrap", True)
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Who reads it has gone: an error like others, where rich would end the program."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))  # as click knows it


def make_console(file: IO[str] | None = None, *, stderr: bool = False) -> Console:
    """A console; on a pipe it breaks no line. Text is printed as it is, brackets and :names: too."""
    console = _Console(file=file, stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console
