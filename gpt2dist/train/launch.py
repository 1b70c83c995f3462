"""From a run file to a running Ray Train job: checks, lock, start, stop, and the cause of a failure."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, ScalingConfig, UserCallback
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from upath import UPath

from gpt2dist.config import BatchSection, RunConfig, UserError
from gpt2dist.data.mixture import MixedSplit, Mixture
from gpt2dist.data.order import eval_ids
from gpt2dist.data.stream import ExactStream, placeholder
from gpt2dist.model import gpt2, hf
from gpt2dist.storage import StorageError, check_writable, is_local, location, publish, remove, remove_tree
from gpt2dist.train import checkpoint, rundir
from gpt2dist.train.worker import DATASET, WorkerFailed, root_cause, train_worker


class TrainingFailed(Exception):
    """A run that ended before its time; the message is the cause, in one line."""


@dataclass(frozen=True)
class Preflight:
    """What is known before anything starts."""

    resume_step: int
    """Step at which training goes on; 0 for a new run."""
    finished: bool
    """Nothing is left to do."""


def preflight(run: RunConfig, source: str) -> Preflight:
    """Check all that can be checked without a cluster; `source` names the run file in messages.

    Raises:
        UserError: data set missing, damaged or too short, storage not writable, or a checkpoint that does not fit.
    """
    try:
        data = Mixture.open(run)
    except UserError as e:
        raise UserError(f"{source}: {e}") from None
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
    if run.eval.every_steps and len(eval_ids(run, data)) == 0:
        sizes = ", ".join(f"{part.location}: {n}" for part, n in zip(val.parts, val.sizes, strict=True))
        raise UserError(
            f"samples of the validation split ({sizes}) do not make one micro-batch of "
            f"{run.batch.micro_sequences}; raise prepare.val_fraction or set eval.every_steps = 0"
        )
    check_writable(run.run_dir)
    found = checkpoint.newest(run.run_dir)
    if found is None:
        hf.check_init(run, source)
        return Preflight(0, finished=False)
    checkpoint.check_fits(found, gpt2.parameter_shapes(gpt2.GPT2Config.from_run(run)), source)
    if found.index.data_fingerprint != data.fingerprint and not run.data.allow_changed:
        raise UserError(
            f"{source}: data.path: the run was trained on data set {found.index.data_fingerprint[:16]}, "
            f"{data} is {data.fingerprint[:16]}; to go on all the same: --set data.allow_changed=true"
        )
    optimizer = found.index.config["optim"].get("name", "adamw")
    if optimizer != run.optim.name:
        raise UserError(
            f'{source}: optim.name = "{run.optim.name}", but the run was started with "{optimizer}", whose moments are '
            "of another kind; choose another name for a new run"
        )
    _check_same_order(run, found.index.config, source)
    return Preflight(found.index.step, finished=found.index.step >= run.stop_step)


def _check_same_order(run: RunConfig, saved: dict[str, Any], source: str) -> None:
    """The keys that map steps to samples must stay; changed, a resume would lose or repeat some."""
    now = run.model_dump(mode="json")
    saved = saved | {"batch": BatchSection().model_dump() | saved["batch"]}  # it had no warm-up once
    batch = [f"batch.{key}" for key in BatchSection.model_fields]
    for key in ("seed", "data.seq_len", "data.shuffle_window", *batch):
        before, after = (_get(table, key) for table in (saved, now))
        if before != after:
            raise UserError(
                f"{source}: {key} = {after}, but the run was started with {before}: other samples would follow; "
                "choose another name for a new run"
            )


def _get(table: dict[str, Any], key: str) -> Any:
    value: Any = table
    for part in key.split("."):
        value = value[part]
    return value


class TrainJob:
    """A run in progress. Ray must be initialized; training goes on in a thread of this process."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run.absolute()
        directory = location(self.run.run_dir)
        remove(directory / rundir.STOP_FILE)
        publish(directory / "config.toml", self.run.to_toml().encode())
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """Whether the run has ended."""
        return not self._thread.is_alive()

    def request_stop(self) -> None:
        """Save after the current step, and end."""
        publish(location(self.run.run_dir) / rundir.STOP_FILE, b"")

    def check(self) -> None:
        """After the end: raises `TrainingFailed` with the cause if there was a failure."""
        if self._error is not None:
            raise failed(self._error) from self._error
        last = rundir.events_log(self.run.run_dir).read()[-1]
        if last["event"] == "non_finite":
            raise TrainingFailed(last["cause"])

    def _fit(self) -> None:
        scratch = location(self.run.run_dir) / "ray"
        try:
            remove_tree(scratch)
            self._fit_with(scratch)
        except BaseException as e:  # handed to the main thread by check()
            self._error = e
        finally:
            with contextlib.suppress(StorageError):  # the storage is away: that is the error already
                remove_tree(scratch)
                remove(location(self.run.run_dir) / rundir.STOP_FILE)

    def _fit_with(self, scratch: UPath) -> None:
        run = self.run
        # Ray's own bookkeeping is used once and thrown away: resuming is ours.
        gpus = run.cluster.gpus_per_worker
        resources = {"CPU": run.cluster.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"run": run.model_dump_json()},
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=run.cluster.workers, use_gpu=gpus > 0, resources_per_worker=resources
            ),
            run_config=RayRunConfig(
                name=f"fit-{uuid.uuid4().hex[:8]}",
                **ray_storage(scratch),
                failure_config=FailureConfig(max_failures=run.cluster.max_failures),
                callbacks=[FailureLog(run.run_dir)],
            ),
            datasets={DATASET: placeholder},
            dataset_config=ExactStream(run, StartStep(run.run_dir)),
        )
        trainer.fit()


def failed(error: BaseException) -> TrainingFailed:
    """What ended a Ray Train job, as its cause in one line."""
    if isinstance(error, ray.train.WorkerGroupError):
        return TrainingFailed(first_cause(error.worker_failures))
    text = str(error.controller_failure) if isinstance(error, ray.train.ControllerError) else str(error)
    line = next((line for line in text.splitlines() if line.strip()), "")
    return TrainingFailed(f"{type(error).__name__}: {line}")


def ray_storage(scratch: UPath) -> dict[str, Any]:
    """Where Ray Train keeps its marks: all nodes must reach it, an object store in the way that we do."""
    if is_local(scratch):
        return {"storage_path": str(scratch)}
    return {"storage_path": scratch.path, "storage_filesystem": PyFileSystem(FSSpecHandler(scratch.fs))}


class StartStep:
    """The step at which the newest attempt starts, as its rank 0 has logged it."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir

    def __call__(self) -> int:
        """Reads events.jsonl."""
        return int([e for e in rundir.events_log(self.run_dir).read() if e["event"] == "start"][-1]["step"])


class FailureLog(UserCallback):  # type: ignore[misc]
    """Writes each failure of the worker group to events.jsonl, from Ray Train's controller."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train calls this before it decides whether to restart the group."""
        event = {"time": time.time(), "event": "failure", "cause": first_cause(worker_exceptions)}
        try:
            rundir.events_log(self.run_dir).append(event)
        except StorageError as e:  # an unwritten line must not end the run
            print(f"the failure could not be logged: {e}", flush=True)


def first_cause(failures: dict[int, Exception]) -> str:
    """One line for the failure that came first: a process that died, else the earliest exception."""

    causes = {rank: root_cause(failure) for rank, failure in failures.items()}
    rank, cause = min(causes.items(), key=lambda item: getattr(item[1], "when", 0.0))
    if isinstance(cause, WorkerFailed):
        rank, text = cause.rank, cause.cause
    elif isinstance(cause, ray.exceptions.RayActorError):
        text = "its process died"
    else:
        text = f"{type(cause).__name__}: {cause}"
    return f"worker {rank}: {text.splitlines()[0]}"
