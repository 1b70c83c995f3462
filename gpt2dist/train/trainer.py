"""The training loop: train → train_step → forward_backward, and what happens between steps.

Everything but weights, Adam moments and the fp16 loss scale is a function of (config, step): the samples, the
learning rate, each micro-batch's dropout seed. No Ray here; a stream of batches comes in.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from upath import UPath

from gpt2dist.config import RunConfig
from gpt2dist.data.blocks import StepBatch
from gpt2dist.data.mixture import MixedSplit, Mixture
from gpt2dist.data.order import PADDING, Ids, SampleOrder, eval_ids, micro_batches, position, stack_steps
from gpt2dist.model import gpt2, hf
from gpt2dist.storage import exists, is_local, location, remove_tree
from gpt2dist.train import checkpoint, ledger, rundir
from gpt2dist.train.checkpoint import BadCheckpoint, Checkpoint
from gpt2dist.train.engine import Engine
from gpt2dist.train.optim import learning_rate
from gpt2dist.train.peak import peak_flops
from gpt2dist.train.profile import Profile

COLLECT_EVERY = 50
"""Steps between two collections of cyclic garbage; left to Python they come at any time, on each rank at another."""
STOP_POLL_S = 3.0
"""Between two looks for the stop file on an object store."""


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of a micro-batch's dropout masks; independent of the rank that runs it."""
    digest = hashlib.sha256(f"dropout/{seed}/{step}/{micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _collect_by_hand() -> None:
    """No garbage collection of its own from now on; what exists is left out of later ones."""
    gc.collect()
    gc.freeze()
    gc.disable()


class NonFiniteGradients(Exception):
    """`train.max_skipped` steps in a row had gradients that are not finite; the message names them."""


class Trainer:
    """One rank's part of a run, from the newest good checkpoint to `stop_step`."""

    def __init__(self, run: RunConfig, engine: Engine) -> None:
        self.run, self.engine = run, engine
        self.rank, self.world_size = engine.rank, engine.world_size
        self.data = Mixture.open(run)
        self.metrics = rundir.metrics_log(run.run_dir)
        self.ledger = rundir.ledger_log(run.run_dir)
        self.events = rundir.events_log(run.run_dir)
        self.step = 0  # steps done; the next one has this number
        self.attempt = 0
        self.stop_file = location(run.run_dir) / rundir.STOP_FILE
        self.look_for_stop = 0.0  # not before this time
        self.saved_step = -1
        self.saved_time = time.monotonic()
        self.uncommitted: list[Ids] = []  # sample ids received in each step since the last commit
        self.skipped: dict[int, Ids] = {}  # the same of the newest steps, where none of them was applied
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

    def train(self, batches: Iterator[StepBatch]) -> None:
        """Train up to `stop_step`, evaluating and saving as the run file says; ends saved.

        Raises:
            NonFiniteGradients: in too many steps in a row.
        """
        run = self.run
        with ThreadPoolExecutor(1) as reader:  # the stream starts up while the validation loss is computed
            first = reader.submit(lambda: list(itertools.islice(batches, 1)))
            if self.step == 0 and run.eval.every_steps:
                self._event("eval", step=0, val_loss=self.evaluate())
            batches = itertools.chain(first.result(), batches)
        _collect_by_hand()
        while self.step < run.stop_step:
            self.profile.before(self.step)
            metrics, stop, save = self.train_step(batches)
            last = self.step == run.stop_step
            every = run.eval.every_steps
            if every and (self.step % every == 0 or self.step == run.train.steps):
                metrics["val_loss"] = self.evaluate()
            self._log(metrics)
            if "val_loss" in metrics:
                self.metrics.flush()
            self._stop_if_not_finite()
            every = run.checkpoint.every_steps
            if last or stop or save or (every and self.step % every == 0):
                self.save()
            if self.step % COLLECT_EVERY == 0:
                gc.collect()
            if stop:
                break
        self.profile.close(self.step)
        end = {"finished": self.step == run.train.steps, "epochs": self._epochs(), "skipped": self._count_skipped()}
        self._event("end", step=self.step, **end)

    def close(self) -> None:
        """Write the metrics that wait, also after a failure."""
        self.metrics.flush()

    def train_step(self, batches: Iterator[StepBatch]) -> tuple[dict[str, Any], bool, bool]:
        """One step of the whole group; returns its metrics, whether to stop, and whether to save."""
        start = time.perf_counter()
        batch = next(batches)
        data_wait = time.perf_counter() - start
        losses = self.forward_backward(batch)  # ends by reading the losses, so all its work is done
        forward_backward = time.perf_counter() - start - data_wait
        lr = learning_rate(self.run.optim, self.step, self.run.train.steps)
        result = self.engine.step(lr)  # ends by reading the norm
        optimizer = time.perf_counter() - start - data_wait - forward_backward
        # One all-reduce carries losses and peaks (each rank its own, 0 elsewhere: the sum is exact) and the wishes.
        peaks = [0.0] * self.world_size
        peaks[self.rank] = float(self.engine.memory.bytes())
        mine = [self._wants_stop(), self._wants_save(), *peaks, *losses]
        stop, save, *both = self.engine.sum_over_ranks(mine)
        peaks, losses = both[: self.world_size], both[self.world_size :]
        seconds = time.perf_counter() - start
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
        }
        self.save_seconds = 0.0
        if result.applied:
            self.skipped.clear()
        else:
            metrics["skipped"] = True
            if not result.rescaled:
                self.skipped[self.step] = batch.ids
        self.uncommitted.append(batch.ids)
        self.step += 1
        return metrics, stop > 0, save > 0

    def forward_backward(self, batch: StepBatch) -> list[float]:
        """Accumulate this rank's gradients; returns the losses of the M micro-batches, 0 for other ranks' ones."""
        losses = [0.0] * micro_batches(self.run.batch, self.step)
        pending = []
        self.engine.begin_step(len(losses))
        for slot, tokens in enumerate(self._to_device(batch.tokens)):
            micro_batch = slot * self.world_size + self.rank
            padding = micro_batch >= len(losses)
            torch.manual_seed(dropout_seed(self.run.seed, self.step, micro_batch))
            loss = self.engine.forward_backward(tokens, padding=padding)
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

    # ------------------------------------------------------------------ state

    def restore(self) -> None:
        """Load the newest checkpoint that is whole, and open a new attempt."""
        for step in self._agree([c.index.step for c in self._committed()]):
            found = checkpoint.step_directory(self.run.run_dir, step)
            try:
                candidate = Checkpoint(found, checkpoint.read_index(found))
                checkpoint.verify(candidate, self.rank, self.world_size)
                problem = ""
            except BadCheckpoint as e:
                problem = str(e)
            problems = [p for p in self.engine.gather_objects(problem) if p]
            if problems:
                self._event("bad_checkpoint", step=step, reason=problems[0])
                continue
            checkpoint.load(candidate, self.engine.fragments(owned=False))
            self.engine.state_changed()
            self.engine.load_scalars(candidate.index.scalars)
            self.step = self.saved_step = step
            if self.run.optim.ema_decay and not candidate.index.has_ema:
                self.engine.start_ema()
                self._event("ema_started", step=step)
            before, now = candidate.index.data_fingerprint, self.data.fingerprint
            if before != now:
                self._event("data_changed", step=step, before=before, now=now)
            break
        else:
            if self.run.model.init_from:
                self.engine.set_weights(hf.read_weights(self.run.model.init_from))
        self._open_attempt()

    def save(self) -> None:
        """Write and commit a checkpoint of the current step; nothing if there is one already."""
        if self.saved_step == self.step:
            return
        start = time.perf_counter()
        directory = checkpoint.step_directory(self.run.run_dir, self.step)
        if self.rank == 0:
            remove_tree(directory)  # left by an attempt that died while saving, or damaged
        self.engine.barrier()
        part = checkpoint.write_rank(directory, self.rank, self.engine.fragments(owned=True))
        parts = self.engine.gather_objects(part)
        ids = self.engine.gather_rows(torch.from_numpy(stack_steps(self.uncommitted))).numpy()
        if self.rank == 0:
            self._commit(directory, parts, ids)
            self._event("commit", step=self.step, seconds=time.perf_counter() - start)
        self.engine.barrier()
        self.save_seconds += time.perf_counter() - start
        self.uncommitted.clear()
        self.saved_step, self.saved_time = self.step, time.monotonic()

    def _commit(self, directory: UPath, parts: list[Any], ids: Ids) -> None:
        """Rank 0: the ledger's lines, then the index, then retention. ids: [world, steps, slots]."""
        starts = [e["attempt"] for e in self.events.read() if e["event"] == "start"]
        if starts[-1] != self.attempt:
            raise RuntimeError(f"attempt {self.attempt} was superseded by attempt {starts[-1]}")
        first = self.step - ids.shape[1]
        data = self.data.fingerprint
        self.ledger.append(
            *(
                ledger.entry(self.run, first + i, ids[:, i], self.world_size, self.attempt, data)
                for i in range(ids.shape[1])
            )
        )
        self.ledger.sync()
        self.metrics.sync()
        checkpoint.commit(
            directory,
            checkpoint.Index(
                step=self.step,
                position=position(self.run.batch, self.step),
                data_fingerprint=self.data.fingerprint,
                config=self.run.model_dump(mode="json"),
                world_size=self.world_size,
                zero_stage=self.run.train.zero_stage,
                attempt=self.attempt,
                scalars=self.engine.scalars(),
                parameters={n: list(s) for n, s in gpt2.parameter_shapes(self.engine.model_config).items()},
                files=[file for file, _ in parts],
                fragments=[f for _, table in parts for f in table],
            ),
        )
        checkpoint.prune(self.run.run_dir, self.run.checkpoint.keep, self.run.checkpoint.keep_every)

    def _open_attempt(self) -> None:
        """Drop what earlier attempts logged but did not commit, and log the start of this one."""
        if self.rank == 0:
            attempts = [e["attempt"] for e in self.events.read() if e["event"] == "start"]
            self.attempt = max(attempts, default=0) + 1
            self.ledger.keep(lambda line: bool(line["step"] < self.step))
            redone = self.metrics.keep(lambda line: bool(line["step"] < self.step))
            self._event(
                "start",
                attempt=self.attempt,
                step=self.step,
                world_size=self.world_size,
                zero_stage=self.run.train.zero_stage,
                redone_steps=len(redone),
            )
        self.attempt = self._agree(self.attempt)

    # ------------------------------------------------------------------ small things

    def _epochs(self) -> dict[str, float]:
        """How often each data set has been gone through."""
        epochs = SampleOrder(self.run, self.data).epochs(position(self.run.batch, self.step))
        return {c.path: n for c, n in zip(self.data.components, epochs, strict=True)}

    def _stop_if_not_finite(self) -> None:
        if len(self.skipped) < self.run.train.max_skipped:
            return
        ids = self.engine.gather_rows(torch.from_numpy(stack_steps(list(self.skipped.values())))).numpy()
        samples = [np.sort(ids[:, i][ids[:, i] != PADDING]).tolist() for i in range(ids.shape[1])]
        steps = list(self.skipped)
        first = ", ".join(map(str, samples[-1][:8])) + (", …" if len(samples[-1]) > 8 else "")
        cause = (
            f"gradients were not finite in {len(steps)} steps in a row, the last being step {steps[-1]} on samples "
            f"{first} (all of them are in events.jsonl)"
        )
        self._event("non_finite", steps=steps, samples=samples, cause=cause)
        raise NonFiniteGradients(cause)

    def _count_skipped(self) -> int:
        """Skipped steps of the whole run; rank 0 only."""
        if self.rank:
            return 0
        self.metrics.flush()
        return sum("skipped" in line for line in self.metrics.read())

    def _wants_stop(self) -> float:
        now = time.monotonic()
        if self.rank or now < self.look_for_stop:
            return 0.0
        self.look_for_stop = now + (0.0 if is_local(self.stop_file) else STOP_POLL_S)
        return float(exists(self.stop_file))

    def _wants_save(self) -> float:
        minutes = self.run.checkpoint.every_minutes
        due = minutes > 0 and time.monotonic() - self.saved_time >= 60 * minutes
        return float(self.rank == 0 and due)

    def _to_device(self, tokens: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(tokens.astype(np.int64)).to(self.engine.device, non_blocking=True)

    def _committed(self) -> list[Checkpoint]:
        return [c for c in checkpoint.committed(self.run.run_dir) if isinstance(c, Checkpoint)]

    def _agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self.engine.gather_objects(value)[0]

    def _log(self, metrics: dict[str, Any]) -> None:
        if self.rank == 0:
            self.metrics.append(metrics)

    def _event(self, event: str, **fields: Any) -> None:
        if self.rank == 0:
            self.events.append({"time": time.time(), "event": event, **fields})
