"""gpt2dist: GPT-2 pretraining on Ray, exact across preemption and resizing."""

import time

__version__ = "0.1.0"
STARTED = time.time()
"""Unix time at which this process imported the package: about when its command began."""
