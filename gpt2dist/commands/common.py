"""What all commands share: errors as one line, and options."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from gpt2dist.config import UserError


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turns the errors that a user can mend into one line."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except UserError as e:
            fail(str(e), 2)

    return run


def fail(message: str, code: int) -> NoReturn:
    """End with one line on stderr."""
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


set_option = click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Change a key.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
