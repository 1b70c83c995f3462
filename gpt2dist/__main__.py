"""`python -m gpt2dist` is the command gpt2dist."""

from gpt2dist.cli import main

main(prog_name="gpt2dist")
