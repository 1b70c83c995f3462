"""The training loop: train → train_step → forward_backward, and what happens between steps.

Everything but weights, Adam moments and the fp16 loss scale is a function of (config, step): the samples, the
learning rate, each micro-batch's dropout seed. No Ray here; a stream of batches comes in.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from gpt2dist.config import RunConfig
from gpt2dist.data.blocks import StepBatch
from gpt2dist.data.mixture import MixedSplit, Mixture
from gpt2dist.data.order import Ids, SampleOrder, consumed, eval_ids, micro_batches, stack_steps
from gpt2dist.model import gpt2
from gpt2dist.storage import StorageError
from gpt2dist.train import checkpoint, ledger, restore, rundir
from gpt2dist.train.divergence import Guard
from gpt2dist.train.engine import Engine
from gpt2dist.train.index import Index
from gpt2dist.train.notice import Notice, plan
from gpt2dist.train.optim import learning_rate
from gpt2dist.train.peak import peak_flops
from gpt2dist.train.profile import Profile
from gpt2dist.train.resume import order_id
from gpt2dist.train.saver import Outcome, Saver, Written
from gpt2dist.train.savetimes import SaveTimes
from gpt2dist.train.watchdog import Watchdog

COLLECT_EVERY = 50
"""Steps between two collections of cyclic garbage; left to Python they come at any time, on each rank at another."""
NOTICE_POLL_S = 2.0
"""Between two questions whether a machine will be taken away."""

End = Literal["finished", "stopped", "preempted", "resized", "rewound"]
"""Why a worker group ended on purpose; after the last three, another one goes on."""


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of a micro-batch's dropout masks; independent of the rank that runs it."""
    digest = hashlib.sha256(f"dropout/{seed}/{step}/{micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _collect_by_hand() -> None:
    """No garbage collection of its own from now on; what exists is left out of later ones."""
    gc.collect()
    gc.freeze()
    gc.disable()


def _unflatten(values: list[float], like: list[list[float]]) -> Iterator[list[float]]:
    rest = iter(values)
    return (list(itertools.islice(rest, len(part))) for part in like)


class NotSaved(Exception):
    """The last state could not be saved; the message says why."""


@dataclass(frozen=True)
class Wishes:
    """What some rank wants after a step, and how the save in flight is doing; summed over the ranks."""

    stop: float = 0.0
    """1: a person asked for it; 2: the group is to be resized."""
    leave: float = 0.0
    """The machine goes soon: the last save has to begin now."""
    save: float = 0.0
    ask: float = 0.0
    """Time to ask whether a machine will be taken away."""
    busy: float = 0.0
    """Ranks that are still writing."""
    failed: float = 0.0
    """Ranks that could not write."""
    hurry: float = 0.0
    """The machine goes before an evaluation would be over."""


class Trainer:
    """One rank's part of a run, from the newest good checkpoint to `stop_step`."""

    def __init__(self, run: RunConfig, engine: Engine, notice: Callable[[], Notice | None] = lambda: None) -> None:
        """`notice`: whether a machine of the group will be taken away; a collective."""
        self.run, self.engine, self.ask_notice = run, engine, notice
        self.rank, self.world_size = engine.rank, engine.world_size
        self.data = Mixture.open(run)
        self.order = order_id(run.model_dump(mode="json"), self.data.fingerprint)
        self.record = rundir.Record(run.run_dir, self.rank, engine.gather_objects)
        self.step = 0  # steps done; the next one has this number
        self.attempt = 0
        self.requests = rundir.Requests(run.run_dir)
        self.next_ask = 0.0
        self.notice: Notice | None = None
        self.leave_at = float("inf")
        self.eval_seconds = 0.0  # of the last one
        self.saved_step = -1
        self.ledger_end = 0  # steps that have a line
        self.uncommitted: list[Ids] = []  # sample ids received in each step since the last commit
        self.saver: Saver
        self.times: SaveTimes
        self.guard: Guard
        self.watchdog: Watchdog
        self.save_seconds = 0.0  # that saves have held up the loop since the last line of metrics
        self.profile = Profile(run, self.rank)
        self.peak = peak_flops(run, engine.device) * self.world_size
        self.token_flops = gpt2.flops_per_token(engine.model_config, run.data.seq_len)

    @property
    def step_tokens(self) -> int:
        """Tokens that the next step trains on, over all ranks."""
        batch = self.run.batch
        return micro_batches(batch, self.step) * batch.micro_sequences * self.run.data.seq_len

    # ------------------------------------------------------------------ the loop

    def train(self, batches: Iterator[StepBatch]) -> End:
        """Train up to `stop_step`, evaluating and saving as the run file says; ends saved.

        Raises:
            Diverged: non-finite gradients in too many steps in a row, or no rewind helps any more.
            NotSaved: the storage did not take the last state.
        """
        run, every = self.run, self.run.eval.every_steps
        with ThreadPoolExecutor(1) as reader:  # the stream starts up while the validation loss is computed
            first = reader.submit(lambda: list(itertools.islice(batches, 1)))
            if self.step == 0 and every:
                loss = self._timed_evaluation()
                self.record.event("eval", step=0, val_loss=loss, seconds=self.eval_seconds)
            batches = itertools.chain(first.result(), batches)
        _collect_by_hand()
        end: End = "finished"
        while self.step < run.stop_step:
            self.profile.before(self.step)
            metrics, wishes = self.train_step(batches)
            self._alive()
            if every and (self.step == run.train.steps or (self.step % every == 0 and not wishes.hurry)):
                metrics |= {"val_loss": self._timed_evaluation(), "eval_s": self.eval_seconds}
            self._alive()
            self.record.step(metrics)
            if self.guard.alarm(metrics):
                self._note(self.saver.finish(self._alive))
                self.profile.close(self.step)
                self.guard.answer(self.step)
                return "rewound"
            self.times.step(metrics["step_s"])
            self._save_in_background(wishes)
            if wishes.ask:
                self._look_for_notice(metrics["step_s"])
            if self.step % COLLECT_EVERY == 0:
                gc.collect()
            if wishes.stop or wishes.leave:
                end = "stopped" if wishes.stop == 1 else "preempted" if wishes.leave else "resized"
                break
        self.save()
        self.profile.close(self.step)
        if self.step == run.stop_step:
            end = "finished" if self.step == run.train.steps else "stopped"
        counts = {"epochs": self._epochs(), "skipped": self._skipped()}
        self.record.event("end", step=self.step, reason=end, finished=end == "finished", **counts)
        return end

    def close(self) -> None:
        """Write the log lines that wait, also after a failure."""
        self.record.flush()
        # The write in flight may never end. What failed at the start of the attempt may have left them unmade.
        for name in ("saver", "watchdog"):
            if part := getattr(self, name, None):
                part.close()

    def train_step(self, batches: Iterator[StepBatch]) -> tuple[dict[str, Any], Wishes]:
        """One step of the whole group; returns its metrics, and what the ranks want now."""
        start = time.perf_counter()
        batch = next(batches)
        data_wait = time.perf_counter() - start
        losses = self.forward_backward(batch)  # ends by reading the losses, so all its work is done
        forward_backward = time.perf_counter() - start - data_wait
        lr = learning_rate(self.run.optim, self.step, self.run.train.steps)
        held = self.saver.hold()
        self.save_seconds += held
        result = self.engine.step(lr)  # ends by reading the norm
        optimizer = time.perf_counter() - start - held - data_wait - forward_backward
        # One all-reduce carries losses and peaks (each rank its own, 0 elsewhere: the sum is exact) and the wishes.
        peaks = [0.0] * self.world_size
        peaks[self.rank] = float(self.engine.memory.bytes())
        mine = [losses, peaks, self._wishes()]
        losses, peaks, wishes = _unflatten(self.engine.sum_over_ranks([v for part in mine for v in part]), mine)
        seconds = time.perf_counter() - start - held
        metrics = {
            "step": self.step,
            "loss": sum(losses) / len(losses),
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_s": self.step_tokens / seconds,
            "mfu": self.token_flops * self.step_tokens / seconds / self.peak,
            "data_wait_s": data_wait,
            "forward_backward_s": forward_backward,
            "optimizer_s": optimizer,
            "checkpoint_s": self.save_seconds,
            "step_s": seconds,
            "peak_memory_bytes": int(max(peaks)),
            "attempt": self.attempt,
            "time": time.time(),
        }
        self.save_seconds = 0.0
        if not result.applied:
            metrics["skipped"] = True
        if result.rescaled:
            metrics["rescaled"] = True
        self.uncommitted.append(batch.ids)
        self.step += 1
        return metrics, Wishes(*wishes)

    def forward_backward(self, batch: StepBatch) -> list[float]:
        """Accumulate this rank's gradients; returns the losses of the M micro-batches, 0 for other ranks' ones."""
        losses = [0.0] * micro_batches(self.run.batch, self.step)
        pending = []
        self.engine.begin_step(len(losses))
        for slot, tokens in enumerate(self._to_device(batch.tokens)):
            micro_batch = slot * self.world_size + self.rank
            padding = micro_batch >= len(losses)
            torch.manual_seed(dropout_seed(self.run.seed, self.step, micro_batch))
            spoilt = self.step in self.run.train.nan_at
            loss = self.engine.forward_backward(tokens, padding=padding, spoilt=spoilt)
            if not padding:
                pending.append((micro_batch, loss))
        for micro_batch, loss in pending:  # read only now: a read waits for the device
            losses[micro_batch] = loss.item()
        return losses

    def evaluate(self) -> float:
        """Mean loss over the first `eval.batches` micro-batches of a fixed order of the validation split."""
        split = MixedSplit(self.data, "val", self.run.data.seq_len, self.run.data.cache_gb)
        ids = eval_ids(self.run, self.data)
        count = len(ids)
        losses = [0.0] * count
        for first in range(0, count, self.world_size):
            mine = min(first + self.rank, count - 1)  # the last ones again, unweighted, where count does not divide
            loss = self.engine.evaluate(self._to_device(split.samples(ids[mine])))
            if first + self.rank < count:
                losses[mine] = loss.item()
        return sum(self.engine.sum_over_ranks(losses)) / count

    def _timed_evaluation(self) -> float:
        start = time.perf_counter()
        loss = self.evaluate()
        self.eval_seconds = time.perf_counter() - start
        return loss

    # ------------------------------------------------------------------ state

    def is_outdated(self) -> bool:
        """Whether this group was not told of all rewinds. A collective."""
        return restore.is_outdated(self.run, self.record)

    def restore(self) -> None:
        """Load the newest checkpoint that is whole, and open a new attempt. A collective; raises like `restore.start`.

        `step` is then the one to begin with.
        """
        run, record = self.run, self.record
        self.saved_step, self.attempt = restore.start(run, self.engine, self.data, record)
        self.step = self.ledger_end = max(0, self.saved_step)
        events = record.events.in_time() if self.rank == 0 else []  # only rank 0 plans
        self.saver = Saver(self.engine, self.attempt, rundir.seconds_of("work_s", events, "commit"))
        self.saver.prepare()
        self.guard = Guard(run, self.data, record, self.attempt)
        self.watchdog = Watchdog(run, self.rank, self.attempt, record.gather)
        self.times = SaveTimes(run.checkpoint, self.saver, events)
        lines = record.metrics.tail() if self.rank == 0 else []
        evaluations = rundir.seconds_of("seconds", events, "eval") + rundir.seconds_of("eval_s", lines)
        self.eval_seconds = evaluations[-1] if evaluations else 0.0
        if run.checkpoint.every_minutes == "auto":
            record.event("save_interval", **self.times.reasoning)

    def save(self) -> None:
        """Wait until the state of the current step is committed. A collective.

        Raises:
            NotSaved: it was tried for `checkpoint.retry_minutes`.
        """
        pause, give_up = 1.0, time.monotonic() + 60 * self.run.checkpoint.retry_minutes
        while True:
            self._note(self.saver.finish(self._alive))
            if self.saved_step == self.step:
                return
            self._begin_save()
            outcome = self.saver.finish(self._alive)
            self._note(outcome)
            if outcome is None or not outcome.problem:
                return
            if self.record.agree(time.monotonic() > give_up):
                newest = f"the newest checkpoint is that of step {self.saved_step}"
                if self.saved_step <= 0:
                    newest = "there is no checkpoint"
                raise NotSaved(f"the state of step {self.step} could not be saved: {outcome.problem}; {newest}")
            again = time.monotonic() + pause
            while time.monotonic() < again:
                self._alive()
                time.sleep(min(1.0, pause))
            pause = min(2 * pause, 30.0)

    def _save_in_background(self, wishes: Wishes) -> None:
        if not self.saver.busy and not wishes.save:
            return
        start = time.perf_counter()
        self._note(self.saver.advance(wishes.busy, wishes.failed))
        # A rewind would delete what is saved after a bad step, and retention meanwhile the one to go back to.
        wanted = wishes.save and not self.guard.bad
        if wanted and not self.saver.busy and self.saved_step != self.step:
            self._begin_save()
            if not self.run.checkpoint.background:
                self._note(self.saver.finish(self._alive))
        self.save_seconds += time.perf_counter() - start

    def _begin_save(self) -> None:
        """Take a snapshot of this step and start writing it. A collective."""
        everyone = np.stack(self.record.gather(stack_steps(self.uncommitted)))
        directory = checkpoint.step_directory(self.run.run_dir, self.step)
        clean = self.step - self.guard.bad
        self.saver.begin(self.step, directory, partial(self._commit, self._index(), everyone, clean))
        self.times.begun()

    def _note(self, outcome: Outcome | None) -> None:
        """What follows from the end of a save."""
        if outcome is None:
            return
        if outcome.problem:
            self.record.event("save_failed", step=outcome.step, reason=outcome.problem)
        else:
            del self.uncommitted[: outcome.step - max(0, self.saved_step)]
            self.saved_step = outcome.step
            self.record.event(
                "commit", step=outcome.step, seconds=outcome.seconds, work_s=outcome.work, stall_s=outcome.stall
            )
        if reasoning := self.times.ended(outcome):
            self.record.event("save_interval", **reasoning)

    def _index(self) -> Index:
        """The index of this step, but for what the ranks will have written."""
        return Index(
            step=self.step,
            position=consumed(self.run.batch, self.step),
            data_fingerprint=self.data.fingerprint,
            config=self.run.model_dump(mode="json"),
            world_size=self.world_size,
            zero_stage=self.run.train.zero_stage,
            attempt=self.attempt,
            scalars=self.engine.scalars(),
            parameters={n: list(s) for n, s in gpt2.parameter_shapes(self.engine.model_config).items()},
            files=[],
            fragments=[],
        )

    def _commit(self, index: Index, ids: Ids, clean: int, written: Written) -> None:
        """Rank 0, in the background: the ledger's lines, then the index, then retention.

        ids: [world, steps, slots]; clean: the step before the bad ones that came last, to which a rewind may lead.
        """
        starts = [e["attempt"] for e in rundir.starts(self.record.events.read())]
        if starts[-1] != self.attempt:
            raise RuntimeError(f"attempt {self.attempt} was superseded by attempt {starts[-1]}")
        first = index.step - ids.shape[1]
        self.record.ledger.append(
            *(
                ledger.entry(self.run, step, ids[:, step - first], self.world_size, self.attempt, self.order)
                for step in range(max(first, self.ledger_end), index.step)
            )
        )
        self.ledger_end = index.step
        self.record.ledger.sync()
        self.record.metrics.sync()
        index = index.model_copy(update={"files": written.files, "fragments": written.fragments})
        checkpoint.commit(written.directory, index)
        try:
            checkpoint.prune(self.run.run_dir, self.run.checkpoint.keep, self.run.checkpoint.keep_every, clean)
        except (OSError, StorageError) as e:  # it is saved all the same
            self.record.event("not_deleted", step=index.step, reason=str(e))

    # ------------------------------------------------------------------ small things

    def _epochs(self) -> dict[str, float]:
        """How often each data set has been gone through."""
        epochs = SampleOrder(self.run, self.data).epochs(consumed(self.run.batch, self.step))
        return {c.path: n for c, n in zip(self.data.components, epochs, strict=True)}

    def _skipped(self) -> int:
        """Skipped steps of the whole run; rank 0 only."""
        if self.rank:
            return 0
        self.record.flush()
        return sum("skipped" in line for line in self.record.metrics.each())

    def _wishes(self) -> list[float]:
        """This rank's part of `Wishes`; rank 0 speaks for all, but each has its own save."""
        if self.rank:
            return [0.0, 0.0, 0.0, 0.0, *self.saver.status(), 0.0]
        now = time.monotonic()
        ask = now >= self.next_ask
        in_time = now + self.saver.estimate(self.saver.bytes) <= self.leave_at  # else the last save would wait for it
        return [
            self._request(),
            float(now >= self.leave_at),
            float(in_time and self.times.due(self.step + 1)),
            float(ask),
            *self.saver.status(),
            float(now + self.eval_seconds > self.leave_at),
        ]

    def _request(self) -> float:
        return {"": 0.0, rundir.STOP: 1.0, rundir.RESIZE: 2.0}[self.requests.newest()]

    def _look_for_notice(self, step_seconds: float) -> None:
        """Ask for a preemption notice; on a new one, decide what is still worth doing. A collective."""
        self.next_ask = time.monotonic() + NOTICE_POLL_S
        notice = self.ask_notice()
        if notice is None or notice == self.notice:
            return
        self.notice = notice
        if self.rank:
            return
        now = time.time()
        need = self.saver.estimate(self.saver.bytes)
        what = plan(notice, now, need, step_seconds)
        # By a clock that nobody sets meanwhile.
        self.leave_at = time.monotonic() + what.leave_at - now if what.action != "lost" else float("inf")
        if what.action == "save":
            self.times.ask()
        self.record.event(
            "preemption",
            ranks=list(notice.ranks),
            nodes=list(notice.nodes),
            seconds_left=None if notice.deadline is None else notice.deadline - now,
            save_takes_s=need,
            action=what.action,
            saved_step=max(0, self.saved_step),
            step=self.step,
        )

    def _to_device(self, tokens: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(tokens.astype(np.int64)).to(self.engine.device, non_blocking=True)

    def _alive(self) -> None:
        self.watchdog.beat(self.step)
