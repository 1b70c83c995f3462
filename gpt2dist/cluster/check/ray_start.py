"""`ray start` lines, read as Ray's own command line reads them."""

from __future__ import annotations

import re
import shlex
from typing import Any

import click

from gpt2dist.cluster.check.document import Document, Path, did_you_mean

OPEN_HOST_FIX = "--dashboard-host=127.0.0.1, and a tunnel: ray dashboard cluster.yaml"


def find_ray_start(commands: list[str]) -> tuple[int, list[str]] | None:
    """The command that starts Ray: its position, and the words after `ray start`."""
    for i, command in enumerate(commands):
        try:
            one = re.sub(r"\d*>&\d+|&>", " ", command)  # their & ends no command
            lexer = shlex.shlex(one, posix=True, punctuation_chars=";&|")
            lexer.whitespace_split = True
            words = list(lexer)
        except ValueError:  # quotes that do not end; the shell will say so
            continue
        for at in range(len(words) - 1):
            if words[at].rpartition("/")[2] == "ray" and words[at + 1] == "start":
                rest = words[at + 2 :]
                end = next((n for n, word in enumerate(rest) if set(word) <= set(";&|")), len(rest))
                return i, rest[:end]
    return None


def parse_ray_start(document: Document, path: Path, words: list[str]) -> dict[str, Any]:
    """The options, by their names in Python. An option that Ray does not know is an error."""
    from ray.scripts.scripts import start

    context = click.Context(start, info_name="ray start")
    try:
        options, _, _ = start.make_parser(context).parse_args(list(words))
    except click.NoSuchOption as e:
        known = [name for parameter in start.params for name in parameter.opts]
        document.error(
            "ray-start", path, f"ray start has no option {e.option_name}", did_you_mean(e.option_name, known)
        )
        return {}
    except click.UsageError as e:
        document.error("ray-start", path, f"ray start: {e.format_message()}", "see ray start --help")
        return {}
    return dict(options)


def check_dashboard(document: Document, path: Path, options: dict[str, Any]) -> None:
    """Whoever reaches the dashboard's port may run code."""
    host = options.get("dashboard_host")
    if host not in (None, "127.0.0.1", "localhost", "::1"):
        document.error("open-dashboard", path, f"the dashboard and the Jobs API listen on {host}", OPEN_HOST_FIX)
