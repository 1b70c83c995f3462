#!/usr/bin/env bash
# The whole line on two CPU workers, in runs/smoke: prepare, train, generate, audit. `make smoke` calls this.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf runs/smoke
step() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }
step gpt2dist prepare jobs/smoke.toml
step gpt2dist train jobs/smoke.toml
step gpt2dist generate runs/smoke --prompt "import " --max-tokens 40
step gpt2dist audit runs/smoke
python - <<'PYTHON'
import json
losses = [e["val_loss"] for e in map(json.loads, open("runs/smoke/events.jsonl")) if e["event"] == "eval"]
losses += [m["val_loss"] for m in map(json.loads, open("runs/smoke/metrics.jsonl")) if "val_loss" in m]
print(f"\nsmoke: validation loss {losses[0]:.2f} -> {losses[-1]:.2f}", "ok" if losses[-1] < 7.0 else "TOO HIGH: 7.0 or more")
raise SystemExit(losses[-1] >= 7.0)
PYTHON
