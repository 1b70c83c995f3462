"""A running Ray Train job: its start, restarts and stop, and the cause of a failure."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
import ray.train
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray._private.state import state as ray_state
from ray._private.worker import global_worker
from ray.train import FailureConfig, ScalingConfig, UserCallback
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.controller.state import ResizingState, RunningState, SchedulingState
from upath import UPath

from gpt2dist.config import RunConfig, UserError
from gpt2dist.data.stream import ExactStream, placeholder
from gpt2dist.storage import StorageError, is_local, location, publish, remove_tree
from gpt2dist.train import reservation, resume, rundir
from gpt2dist.train.allocator import cpu_worker_environment
from gpt2dist.train.preflight import newest_of_begun, when_there
from gpt2dist.train.worker import DATASET, GIVEN_UP, WorkerFailed, root_cause, train_worker

T = TypeVar("T")
BACK_OFF_S, LONGEST_BACK_OFF_S = 5.0, 300.0
"""Wait before a restart: nothing after the first failure in a row, then 5 s, 15 s, 35 s and so on."""
ABANDON_S = 10.0
"""How long the end of Ray Train's controller is waited for."""
RESIZE_SAVE_S = 600.0
"""How long a group may take to save before it is resized."""


class TrainingFailed(Exception):
    """A run that ended before its time; the message is the cause, in one line."""


class TrainJob:
    """A run in progress. Ray must be initialized; training goes on in a thread of this process.

    One call of Ray Train is one worker group; when it ends, for whatever reason, it is decided here whether another
    one goes on.
    """

    def __init__(self, run: RunConfig, began: float, changes: Sequence[resume.Change] = ()) -> None:
        """began: Unix time at which the command began, from which start-up counts; changes: see `Preflight`."""
        self.run = run.absolute().for_record()
        self._events = rundir.events_log(self.run.run_dir)
        rundir.withdraw(self.run.run_dir)
        reservation.release(self.run.run_dir, self._events.read())
        self._resolve()
        changed = [change.to_json() for change in changes]
        self._events.append({"time": time.time(), "event": "launch", "began": began, "changes": changed})
        self.waits_for = ""
        """What keeps the next worker group from starting; nothing: not this process."""
        self._stop = threading.Event()
        self._abandoned = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """Whether the run has ended."""
        return not self._thread.is_alive()

    def request_stop(self) -> None:
        """Save after the current step, and end. Tried again while the storage is away."""
        self._stop.set()
        threading.Thread(target=self._ask_to_stop, daemon=True).start()

    def _ask_to_stop(self) -> None:
        while not self.done():
            with contextlib.suppress(OSError, StorageError):
                rundir.request(self.run.run_dir, rundir.STOP)
                return
            time.sleep(1.0)

    @property
    def stopping(self) -> bool:
        """Whether the end was asked for."""
        return self._stop.is_set()

    def _requested(self) -> str:
        """Nothing while the storage is away."""
        with contextlib.suppress(OSError, StorageError):
            return rundir.requested(self.run.run_dir)
        return ""

    def abandon(self) -> None:
        """End what still runs or waits for room, and the thread: Ray, shut down under a thread's call, may crash."""
        self._abandoned.set()
        give_up = time.monotonic() + ABANDON_S
        while self._thread.is_alive() and time.monotonic() < give_up:
            _end_controllers()
            self._thread.join(1.0)

    def left(self) -> None:
        """Log that the command has ended; at its very end, so that it is known until when it took time."""
        stopped = self.stopping and self._error is None
        self._events.try_append({"time": time.time(), "event": "exit", "stopped": stopped})

    def check(self) -> None:
        """After the end: raises `TrainingFailed` with the cause if there was a failure."""
        if self._error is not None:
            raise failed(self._error) from self._error

    def _train(self) -> None:
        scratch = location(self.run.run_dir) / "ray"
        try:
            with contextlib.suppress(OSError):
                remove_tree(scratch)
            self._train_to_the_end(scratch)
        except BaseException as e:  # handed to the main thread by check()
            if not self._abandoned.is_set():
                self._error = e
        finally:
            with contextlib.suppress(OSError, StorageError):  # the storage is away: that is the error already
                remove_tree(scratch)
                rundir.withdraw(self.run.run_dir)

    def _train_to_the_end(self, scratch: UPath) -> None:
        limit = self.run.cluster.max_failures
        failures, saved = 0, self._saved_step()
        while True:
            try:
                end = str(self._worker_group(scratch).fit().return_value)
            except ray.train.TrainingFailedError as error:
                if self._abandoned.is_set():
                    return
                if _is_preemption(error):
                    with contextlib.suppress(OSError, StorageError):  # the storage is away: the restart comes first
                        self._log_preemption(error)
                else:
                    reservation.remove_groups()
                    with contextlib.suppress(OSError, StorageError):
                        self._log_failure(error)
                    before, saved = saved, self._saved_step()
                    failures = 1 if saved > before else failures + 1
                    if 0 <= limit < failures or self._is_to_stop():
                        raise  # also where it was to stop: then its last steps are not saved
                    pause = BACK_OFF_S * (2 ** min(failures - 1, 20) - 1)
                    if self._stopped_while_waiting(min(pause, LONGEST_BACK_OFF_S)):
                        return
            else:
                if end.startswith(GIVEN_UP):
                    cause = end.removeprefix(GIVEN_UP)
                    self._events.try_append({"time": time.time(), "event": "failure", "cause": cause})
                    raise TrainingFailed(cause)
                if end in ("finished", "stopped") or self.stopping:  # all is saved
                    return
                failures = 0
            self._when_there(self._resolve)  # a group may have failed, too, after it had logged a rewind
            if self._requested() == rundir.RESIZE:
                with contextlib.suppress(OSError, StorageError):
                    rundir.withdraw(self.run.run_dir)
            self._events.try_append({"time": time.time(), "event": "restart"})

    def _log_failure(self, error: BaseException) -> None:
        """Of a group that failed before its workers ran, of which `FailureLog` is not told."""
        if self._newest("launch", "restart", "start", "failure", "preemption") in ("launch", "restart"):
            self._events.try_append({"time": time.time(), "event": "failure", "cause": str(failed(error))})

    def _newest(self, *kinds: str) -> str:
        """Kind of the newest event of these kinds; nothing where there is none."""
        known = [e for e in self._events.in_time() if e["event"] in kinds]
        return str(known[-1]["event"]) if known else ""

    def _log_preemption(self, error: BaseException) -> None:
        """Where the machine went before its workers had heard of it, and so logged nothing."""
        if self._newest("start", "preemption", "failure") in ("preemption", "failure"):
            return
        info = getattr(error, "preemption_info", None)
        self._events.try_append(
            {
                "time": time.time(),
                "event": "preemption",
                "ranks": list(info.preempted_ranks) if info else [],
                "nodes": list(info.preempted_node_ids) if info else [],
                "action": "late",
                "saved_step": self._saved_step(),
            }
        )

    def _resolve(self) -> None:
        """Leave out what rewinds have left out, and write the resolved configuration."""
        self.run = rundir.with_rewinds(self.run, self._events.read())
        publish(location(self.run.run_dir) / "config.toml", self.run.to_toml().encode())

    def _saved_step(self) -> int:
        found = self._when_there(lambda: newest_of_begun(self.run))
        return found.index.step if found else 0

    def _when_there(self, look: Callable[[], T]) -> T:
        """See `when_there`; meanwhile it is said what is waited for."""
        try:
            return when_there(self.run, look, self._say_away)
        finally:
            self.waits_for = ""

    def _say_away(self, problem: str) -> None:
        self.waits_for = f"waiting for the storage ({problem})"

    def _is_to_stop(self) -> bool:
        """Whether the end was asked for, here or by the file."""
        return self.stopping or self._requested() == rundir.STOP

    def _stopped_while_waiting(self, seconds: float) -> bool:
        """Wait before the next start; whether the end was asked for meanwhile, when no worker could see it."""
        end = time.monotonic() + seconds
        while not self._is_to_stop():
            if time.monotonic() >= end:
                return False
            time.sleep(min(1.0, seconds))
        self._stop.set()  # also where a file has asked for it
        return True

    def _worker_group(self, scratch: UPath) -> TorchTrainer:
        run = self.run
        gpus, accelerator = run.cluster.gpus_per_worker, run.cluster.accelerator
        resources = {"CPU": run.cluster.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
        # Ray's own bookkeeping is used once and thrown away, and so is its count of failures: resuming is ours.
        return TorchTrainer(
            train_worker,
            train_loop_config={"run": run.model_dump_json()},
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=run.cluster.workers,
                use_gpu=gpus > 0,
                resources_per_worker=resources,
                label_selector={reservation.ACCELERATOR_LABEL: accelerator} if accelerator else None,
                elastic_resize_monitor_interval_s=run.cluster.resize_interval_s,
            ),
            run_config=RayRunConfig(
                name=f"fit-{uuid.uuid4().hex[:8]}",
                **ray_storage(scratch),
                worker_runtime_env={"env_vars": {} if gpus else cpu_worker_environment()},
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
                callbacks=[
                    FailureLog(run.run_dir),
                    SaveBeforeResize(run.run_dir),
                    reservation.ReservationLog(run.run_dir),
                    *([reservation.OnItsMachines(accelerator)] if accelerator else []),
                ],
            ),
            datasets={DATASET: placeholder},
            dataset_config=ExactStream(run, functools.partial(rundir.start_step, run.run_dir)),
        )


def _end_controllers() -> None:
    """End Ray Train's controllers of this driver. They have no name, and Ray Train ends them in a main thread alone."""
    own = ray.get_runtime_context().get_job_id()
    with contextlib.suppress(ray.exceptions.RayError):  # Ray's head is busy, or away
        for actor, about in ray_state.actor_table(None, ray.JobID.from_hex(own), "ALIVE").items():
            if about["ActorClassName"] == TrainController.__name__:
                global_worker.core_worker.kill_actor(ray.ActorID.from_hex(actor), True)


def _is_preemption(error: BaseException) -> bool:
    """Whether a machine was taken away with notice, which is nobody's failure."""
    if isinstance(error, ray.train.PreemptionError):
        return True
    causes = map(root_cause, error.worker_failures.values()) if isinstance(error, ray.train.WorkerGroupError) else ()
    return any(isinstance(cause, ray.exceptions.RayActorError) and cause.preempted for cause in causes)


def failed(error: BaseException) -> TrainingFailed:
    """What ended a Ray Train job, as its cause in one line."""
    if isinstance(error, TrainingFailed):
        return error
    if isinstance(error, UserError):
        return TrainingFailed(str(error))
    if isinstance(error, ray.train.WorkerGroupError):
        return TrainingFailed(first_cause(error.worker_failures))
    if isinstance(error, ray.train.ControllerError):  # of a worker group that was set up
        error = root_cause(error.controller_failure)
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    # Of an exception in another process the traceback is in its text, and the last line is what it says.
    line = lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else f"{type(error).__name__}: {lines[0]}"
    return TrainingFailed(line)


def ray_storage(scratch: UPath) -> dict[str, Any]:
    """Where Ray Train keeps its marks: all nodes must reach it, an object store in the way that we do."""
    if is_local(scratch):
        return {"storage_path": str(scratch)}
    return {"storage_path": scratch.path, "storage_filesystem": PyFileSystem(FSSpecHandler(scratch.fs))}


class SaveBeforeResize(ControllerCallback):  # type: ignore[misc]
    """Ray Train ends a group that it resizes without a word: this lets it save first, from Ray Train's controller."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self._running = False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Ray Train calls this at every change of state."""
        self._running = isinstance(current_state, RunningState) or (
            self._running and isinstance(current_state, (ResizingState, SchedulingState))
        )

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Ray Train calls this before it ends the group, or starts the first one."""
        if not self._running:
            return
        self._running = False
        try:
            ends = len(self._ends())
            rundir.request(self.run_dir, rundir.RESIZE)
            end = time.monotonic() + self._patience()
            while len(self._ends()) == ends and time.monotonic() < end:
                time.sleep(0.5)
            if rundir.requested(self.run_dir) == rundir.RESIZE:
                rundir.withdraw(self.run_dir)
            event = {"time": time.time(), "event": "resize", "workers": resize_decision.num_workers}
            rundir.events_log(self.run_dir).append(event)
        except (OSError, StorageError) as e:  # then the steps since the last checkpoint are done again
            print(f"no save before resizing: {e}", flush=True)

    def _ends(self) -> list[Any]:
        return [e for e in rundir.events_log(self.run_dir).read() if e["event"] in ("end", "rewind", "hang")]

    def _patience(self) -> float:
        """Seconds: of a worker that dies meanwhile nobody hears before this callback has returned."""
        saves = [e.get("seconds", 0.0) for e in rundir.events_log(self.run_dir).read() if e["event"] == "commit"]
        step = (rundir.metrics_log(self.run_dir).tail() or [{}])[-1]
        busy = max(saves, default=0.0) + step.get("step_s", 0.0) + step.get("eval_s", 0.0)
        return float(min(RESIZE_SAVE_S, 60.0 + 5 * busy))


class FailureLog(UserCallback):  # type: ignore[misc]
    """Writes each failure of the worker group to events.jsonl, from Ray Train's controller."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train calls this before it decides whether to restart the group."""
        event = {"time": time.time(), "event": "failure", "cause": first_cause(worker_exceptions)}
        try:
            rundir.events_log(self.run_dir).append(event)
        except (OSError, StorageError) as e:  # an unwritten line must not end the run
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
    if "by peer" in text and "gloo" in text:  # the other one is not yet known to be dead
        text = "lost the connection to another worker"
    return f"worker {rank}: {text.splitlines()[0]}"
