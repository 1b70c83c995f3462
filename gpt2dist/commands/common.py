"""What all commands share: errors as one line, and options."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import click
import pydantic_core

from gpt2dist.config import RunConfig, UserError, parse_toml

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A file system takes no more."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turns the errors that a user can mend, and Ctrl-C, into one line."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except UserError as e:
            fail(str(e), 2)
        except OSError as e:  # a directory in place of a file, a name too long, a link to itself
            if isinstance(e.filename, (str, os.PathLike)):
                fail(f"{e.filename}: {e.strerror}", 2)
            if e.errno in FULL:  # mostly what the output was sent to; Python would try again when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                fail(f"cannot write: {e.strerror}", 2)
            raise
        except KeyboardInterrupt:
            interrupted()

    return run


def interrupted(hint: str = "") -> NoReturn:
    """End after Ctrl-C; hint: what to know of it."""
    click.echo("interrupted" + hint, err=True)
    sys.exit(128 + signal.SIGINT)


def fail(message: str, code: int) -> NoReturn:
    """End with one line on stderr."""
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


class FiniteRange(click.FloatRange):
    """A range without NaN, which compares with nothing."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number. Raises `click.BadParameter`."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


set_option = click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Change a key.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
address_option = click.option("--address", help="Ray cluster to join; by default RAY_ADDRESS, else a private one.")
run_dir_argument = click.argument("run_dir", type=click.Path())


def to_json(value: Any) -> str:
    """JSON has no infinity and no NaN; null takes their place."""
    return json.dumps(pydantic_core.to_jsonable_python(value, inf_nan_mode="null"), allow_nan=False)


def existing(run_dir: str) -> str:
    """The same. Raises `UserError` if there is no such directory."""
    from gpt2dist import storage

    path = storage.location(run_dir)
    if not (path.is_dir() if storage.is_local(path) else storage.children(path)):
        raise UserError(f"{run_dir}: no such run directory")
    return run_dir


def read_config(run_dir: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    """The configuration of a run directory: that of the last command. Raises `UserError`."""
    from gpt2dist.train import rundir

    config = f"{existing(run_dir).rstrip('/')}/config.toml"
    try:
        return parse_toml(rundir.config_text(run_dir), config, overrides)
    except FileNotFoundError:
        raise UserError(f"{config}: no such file") from None


@contextlib.contextmanager
def keys_of(run_file: str) -> Iterator[None]:
    """Mistakes that begin with a key name the file too."""
    try:
        yield
    except UserError as e:
        section = re.split(r"[.:]", str(e))[0]
        raise UserError(f"{run_file}: {e}" if section in RunConfig.model_fields else str(e)) from None


def check_in_a_job(run: RunConfig, run_file: str) -> None:
    """On a cluster: the places of RUN_FILE must be reachable from all nodes. Raises `UserError`."""
    from gpt2dist.cluster.jobs import IN_A_JOB, check_places

    if IN_A_JOB in os.environ:
        check_places(run, run_file)
