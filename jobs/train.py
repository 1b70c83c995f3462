"""Train as a Ray job, without gpt2dist on the machine that submits it (docs/jobs.md).

ray job submit --address URL --runtime-env jobs/runtime_env.yaml -- python jobs/train.py --retries 3 RUN.toml
"""

import sys

from gpt2dist.cluster.entry import main

sys.exit(main(["train", *sys.argv[1:]]))
