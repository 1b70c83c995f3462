"""What is checked before a run starts, without a cluster; and how a storage that is away is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from gpt2dist.config import RunConfig, UserError
from gpt2dist.data.mixture import MixedSplit, Mixture
from gpt2dist.data.order import eval_ids
from gpt2dist.model import gpt2, hf
from gpt2dist.storage import StorageError, check_writable, exists, is_local, location
from gpt2dist.train import checkpoint, resume
from gpt2dist.train.saved import changes

T = TypeVar("T")
LONGEST_LOOK_S = 10.0
"""Between two looks whether the storage is back."""


@dataclass(frozen=True)
class Preflight:
    """What is known before anything starts."""

    resume_step: int
    """Step at which training goes on; 0 for a new run."""
    finished: bool
    """Nothing is left to do."""
    changes: list[resume.Change]
    """What the run file has changed since the newest checkpoint."""
    short_validation: str
    """Why an evaluation has fewer micro-batches than `eval.batches`; empty where it has all of them."""


def preflight(run: RunConfig, source: str, away: Callable[[str], None] = lambda _: None) -> Preflight:
    """Check all that can be checked without a cluster; `source` names the run file in messages.

    away: see `when_there`.

    Raises:
        UserError: data set missing, damaged or too short, storage not writable, or a checkpoint that does not fit.
    """
    try:
        data, short_validation = _checked_data(run)
    except UserError as e:
        key = "data.path" if run.data.path or not run.data_paths else "prepare.output"
        raise UserError(f"{source}: {key}: {str(e).removeprefix(f'{key}: ')}") from None
    try:
        begun = exists(location(run.run_dir) / "config.toml")
        found = when_there(run, lambda: newest_of_begun(run), away) if begun else checkpoint.newest(run.run_dir)
    except checkpoint.NoneLeft as e:
        raise UserError(f"{e}; to start anew choose another name, or delete the run's directory") from None
    changed: list[resume.Change] = []
    if found is None:
        hf.check_init(run, source)
    else:
        changed = changes(run, found, data)
        if reason := resume.refusal(changed, run.data.allow_changed):
            raise UserError(f"{source}: {reason}")
        checkpoint.check_fits(found, gpt2.parameter_shapes(gpt2.GPT2Config.from_run(run)), source)
    new_here = not begun and is_local(location(run.run_dir))  # its directory is made when it starts
    check_writable(run.storage if new_here else run.run_dir)
    step = found.index.step if found else 0
    return Preflight(step, found is not None and step >= run.stop_step, changed, short_validation)


def _checked_data(run: RunConfig) -> tuple[Mixture, str]:
    """The data sets of a run, and `Preflight.short_validation`.

    Raises:
        UserError: they are missing, damaged, or too short for the run.
    """
    data = Mixture.open(run)
    train = MixedSplit(data, "train", run.data.seq_len)
    val = MixedSplit(data, "val", run.data.seq_len)
    train.check_sizes()
    val.check_sizes()
    for part in train.parts:
        if part.tokens == 0:
            raise UserError(f"{part.location}: the data set is empty")
        if len(train.parts) > 1 and part.num_samples(run.data.seq_len) == 0:
            raise UserError(f"{part.location}: shorter than one sample of data.seq_len = {run.data.seq_len}")
    if train.num_samples < run.global_batch:
        raise UserError(
            f"{data}: {train.num_samples:,} samples of data.seq_len = {run.data.seq_len} are less than one "
            f"global batch of {run.global_batch:,} (batch.micro_batches × batch.micro_sequences)"
        )
    if not run.eval.every_steps:
        return data, ""
    batches, micro = len(eval_ids(run, data)), run.batch.micro_sequences
    sizes = ", ".join(f"{part.location}: {n}" for part, n in zip(val.parts, val.sizes, strict=True))
    if batches == 0:
        raise UserError(
            f"samples of the validation split ({sizes}) do not make one micro-batch of "
            f"{micro}; raise prepare.val_fraction or set eval.every_steps = 0"
        )
    if batches < run.eval.batches:
        have = f"{batches} of the {run.eval.batches} micro-batches of {micro} samples (eval.batches)"
        return data, f"an evaluation reads {have}: the validation split gives no more ({sizes})"
    return data, ""


def newest_of_begun(run: RunConfig) -> checkpoint.Checkpoint | None:
    """The newest checkpoint of a run that has begun.

    Raises:
        NoneLeft: none is good.
        OSError, StorageError: the storage is away.
    """
    if not exists(location(run.run_dir) / "config.toml"):
        raise StorageError(f"{run.run_dir}: the run's directory is not there any more")
    return checkpoint.newest(run.run_dir)


def when_there(run: RunConfig, look: Callable[[], T], away: Callable[[str], None]) -> T:
    """What `look` returns; tried again while the run's storage is away.

    away: told what is wrong, again and again.

    Raises:
        OSError, StorageError: away for `checkpoint.retry_minutes`.
    """
    pause, give_up = 1.0, time.monotonic() + 60 * run.checkpoint.retry_minutes
    while True:
        try:
            return look()
        except (OSError, StorageError) as e:
            if time.monotonic() > give_up:
                raise
            away(str(e))
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_LOOK_S)
