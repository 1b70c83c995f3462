#!/usr/bin/env bash
# A run whose worker and driver are killed and one of whose two machines is drained, beside one that is left in peace.
# `make demo` calls this.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf runs/demo-undisturbed runs/demo-chaos runs/demo-chaos.png
step() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }
step gpt2dist prepare jobs/demo.toml
step gpt2dist chaos jobs/demo.toml --faults kill-worker,drain-node,kill-driver --seed 6
step gpt2dist audit runs/demo-chaos
