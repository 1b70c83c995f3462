"""Prepare a data set as a Ray job (docs/jobs.md).

ray job submit --address URL --runtime-env jobs/runtime_env.yaml -- python jobs/prepare.py RUN.toml
"""

import sys

from gpt2dist.cluster.entry import main

sys.exit(main(["prepare", *sys.argv[1:]]))
