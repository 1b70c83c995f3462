"""Groups of commands that have files of their own; cli.py registers them."""
