"""gpt2dist: GPT-2 pretraining on Ray, exact across preemption and resizing."""

__version__ = "0.1.0"
