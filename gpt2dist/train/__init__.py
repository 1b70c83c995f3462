"""Training: engine, loop, checkpoints, ledger, and their start on Ray Train."""
