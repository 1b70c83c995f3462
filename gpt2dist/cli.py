"""The commands. They parse, call, and print; a user's mistake is one line and exit code 2."""

from __future__ import annotations

import atexit
import gc
import io
import sys

import click

from gpt2dist import __version__
from gpt2dist.commands.chaos import chaos
from gpt2dist.commands.checkpoint import audit, checkpoint
from gpt2dist.commands.cluster import cluster
from gpt2dist.commands.data import data, prepare
from gpt2dist.commands.jobs import jobs, submit
from gpt2dist.commands.model import evaluate, export, generate
from gpt2dist.commands.plan import plan
from gpt2dist.commands.report import goodput, report
from gpt2dist.commands.train import train


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Pretrain GPT-2 on Ray.

    \b
    Example:
      gpt2dist prepare jobs/smoke.toml
      gpt2dist train jobs/smoke.toml
      gpt2dist generate runs/smoke --prompt "import os"
    """
    # What Ray and torch bring lives to the end: looking through it takes 0.5 s of a start and 0.7 of an end.
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":  # a terminal without UTF-8
            stream.reconfigure(errors="backslashreplace")


COMMANDS = (prepare, data, train, generate, evaluate, export, audit, checkpoint)
for subcommand in (*COMMANDS, goodput, report, plan, chaos, submit, jobs, cluster):
    main.add_command(subcommand)
