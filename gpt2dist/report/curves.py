"""Two loss curves on one picture, with what happened to one of the runs."""

from __future__ import annotations

from pathlib import Path

from gpt2dist.train import rundir


def draw(path: Path, undisturbed: str, disturbed: str, faults: list[tuple[int, str]]) -> None:
    """Write a PNG: loss by step of two run directories, the faults as (step, name) at their places."""
    import matplotlib

    matplotlib.use("Agg")  # no screen
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5.5), layout="constrained")
    for run_dir, color, width, label in (
        (undisturbed, "#9ecae1", 6.0, "nothing happened to it"),
        (disturbed, "#08306b", 1.2, "with faults"),
    ):
        rows = rundir.metrics_log(run_dir).read()
        axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], color=color, linewidth=width, label=label)
    top = axes.get_ylim()[1]
    for step, fault in faults:
        axes.axvline(step, color="#d62728", linewidth=0.8, linestyle=":")
        axes.text(step, top, f" {fault}", rotation=90, va="top", ha="right", fontsize=8, color="#d62728")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats a token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
