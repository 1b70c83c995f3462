"""Evaluate a run as a Ray job (docs/jobs.md).

ray job submit --address URL --runtime-env jobs/runtime_env.yaml -- python jobs/evaluate.py RUN_DIR --workers 2
"""

import sys

from gpt2dist.cluster.entry import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
