"""What the ranks of tests/distributed run."""

from __future__ import annotations

import hashlib
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from gpt2dist.config import RunConfig
from gpt2dist.data.blocks import StepBatch, local_blocks, split_blocks
from gpt2dist.model import gpt2
from gpt2dist.storage import StorageError
from gpt2dist.train import rundir
from gpt2dist.train.checkpoint import newest
from gpt2dist.train.divergence import Diverged
from gpt2dist.train.engine import Engine
from gpt2dist.train.notice import Notice
from gpt2dist.train.optim import learning_rate
from gpt2dist.train.trainer import Trainer


def train_runs(runs: list[RunConfig]) -> list[dict[str, Any]]:
    """Train each run (or go on with it) on this rank without Ray; returns what the engine held at the end."""
    return [train_run(run) for run in runs]


def train_run(run: RunConfig) -> dict[str, Any]:
    """One run; see `train_runs`."""
    engine = Engine(run, torch.device("cuda" if run.cluster.gpus_per_worker else "cpu"))
    trainer = Trainer(run, engine)
    trainer.restore()
    start = trainer.step
    slots = []
    blocks = local_blocks(run, engine.rank, engine.world_size, start)
    batches = split_blocks(blocks, run, engine.rank, engine.world_size, start)
    trainer.train(slots.append(len(batch.ids)) or batch for batch in batches)  # type: ignore[func-returns-value]
    trainer.close()
    result = {"start": start, "slots": slots, "elements": owned_elements(engine), "scalars": engine.scalars()}
    engine.close()
    return result


def have_imported_compiler(runs: list[RunConfig]) -> list[bool]:
    """Train each run on this rank; whether this process has imported torch's compiler after it."""
    imported = []
    for run in runs:
        train_run(run)
        imported.append("torch._inductor.compile_fx" in sys.modules)
    return imported


def compiled_graphs(run: RunConfig) -> int:
    """Graphs that torch.compile made for two engine steps."""
    from torch._dynamo.utils import counters

    drive(run, [0, 1])
    return int(counters["stats"]["unique_graphs"])


def poison(engine: Engine, broken: Callable[[], bool]) -> None:
    """From now on embeddings are NaN on the last rank while `broken()`."""
    model = next(m for m in engine.ds.module.modules() if isinstance(m, gpt2.GPT2))
    factor = torch.ones(())

    def multiply(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        bad = engine.rank == engine.world_size - 1 and broken()
        return output * factor.to(output.dtype).fill_(torch.nan if bad else 1.0)

    model.wte.register_forward_hook(multiply)


def drive(
    run: RunConfig, steps: list[int], broken: frozenset[int] = frozenset(), identical: bool = False
) -> dict[str, Any]:
    """Engine steps with these numbers, tokens depending on the number alone, embeddings NaN in the `broken` ones.

    With `identical` all micro-batches of a step hold the same tokens.
    """
    engine = Engine(run, torch.device("cpu"))
    now = -1
    poison(engine, lambda: now in broken)
    losses, results = [], []
    for now in steps:
        total = [0.0] * run.batch.micro_batches
        for slot in range(engine.gas):
            j = slot * engine.world_size + engine.rank
            generator = torch.Generator().manual_seed(1000 * now + (0 if identical else j))
            shape = (run.batch.micro_sequences, run.data.seq_len + 1)
            tokens = torch.randint(0, 50257, shape, generator=generator)
            torch.manual_seed(j)
            loss = engine.forward_backward(tokens, padding=j >= len(total))
            if j < len(total):
                total[j] = loss.item()
        losses.append(sum(engine.sum_over_ranks(total)) / len(total))
        results.append(engine.step(learning_rate(run.optim, now, run.train.steps)))
    state = hashlib.sha256(b"".join(f.tensor.numpy().tobytes() for f in engine.fragments(owned=True))).hexdigest()
    scalars = engine.scalars()
    engine.close()
    return {
        "losses": losses,
        "norms": [r.grad_norm for r in results],
        "applied": [r.applied for r in results],
        "state": state,
        "scalars": scalars,
    }


def drive_all(calls: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """`drive` with each tuple of arguments, one after the other in one process."""
    return [drive(*call) for call in calls]


def drive_average(run: RunConfig, broken: int) -> tuple[float, float, int]:
    """Ten engine steps, gradients NaN in step `broken`.

    Largest difference between the averaged weights and the average of the weights after each step, taken here; of the
    averaged weights and the weights at the end; elements compared.
    """
    engine = Engine(run, torch.device("cpu"))
    now = -1
    poison(engine, lambda: now == broken)

    def read(kind: str) -> torch.Tensor:
        return torch.cat([f.tensor.double() for f in engine.fragments(owned=True) if f.kind == kind])

    average, steps = read("weight"), 0
    for now in range(10):
        for slot in range(engine.gas):
            generator = torch.Generator().manual_seed(100 * now + slot)
            shape = (run.batch.micro_sequences, run.data.seq_len + 1)
            engine.forward_backward(torch.randint(0, 50257, shape, generator=generator), padding=False)
        if engine.step(3e-3).applied:
            steps += 1
            decay = min(run.optim.ema_decay, (1 + steps) / (10 + steps))
            average = decay * average + (1 - decay) * read("weight")
    assert steps == 9
    has = read("ema")
    result = float((has - average).abs().max()), float((has - read("weight")).abs().max()), len(has)
    engine.close()
    return result


def drive_averages(calls: list[tuple[RunConfig, int]]) -> list[tuple[float, float, int]]:
    """`drive_average` with each tuple of arguments, one after the other in one process."""
    return [drive_average(*call) for call in calls]


def train_poisoned(run: RunConfig, first: int) -> str:
    """Train with NaN embeddings from step `first` on; the message of the exception that ends it."""
    engine = Engine(run, torch.device("cpu"))
    trainer = Trainer(run, engine)
    poison(engine, lambda: trainer.step >= first)
    trainer.restore()
    blocks = local_blocks(run, engine.rank, engine.world_size, 0)
    try:
        trainer.train(split_blocks(blocks, run, engine.rank, engine.world_size, 0))
    except Diverged as e:
        return str(e)
    finally:
        trainer.close()
        engine.close()
    return ""


def train_with_bad_samples(run: RunConfig, bad: list[int]) -> list[str]:
    """Train to the end with NaN embeddings wherever a rank's samples are among the `bad` ones; how each group ended."""
    ends: list[str] = []
    while not ends or ends[-1] == "rewound":
        run = rundir.with_rewinds(run, rundir.events_log(run.run_dir).read())
        engine = Engine(run, torch.device("cpu"))
        trainer = Trainer(run, engine)
        trainer.restore()
        current: set[int] = set()
        poison(engine, lambda current=current: bool(current & set(bad)))  # type: ignore[misc]
        blocks = local_blocks(run, engine.rank, engine.world_size, trainer.step)

        batches = split_blocks(blocks, run, engine.rank, engine.world_size, trainer.step)
        try:
            ends.append(trainer.train(_noted(batches, current)))
        except Diverged as e:
            ends.append(str(e))
        trainer.close()
        engine.close()
    return ends


def restore_from_views(run: RunConfig, storages: list[str]) -> str:
    """Restore where each rank sees a storage of its own; what came of it."""
    engine = Engine(run, torch.device("cpu"))
    trainer = Trainer(run.model_copy(update={"storage": storages[engine.rank]}), engine)
    try:
        trainer.restore()
        return f"step {trainer.step}"
    except StorageError as e:
        return str(e)
    finally:
        engine.close()


def train_on_a_leaving_machine(run: RunConfig, notice_at: int, seconds_left: float, evaluation_s: float) -> str:
    """A step takes 0.2 s, an evaluation `evaluation_s`; the machine goes `seconds_left` after step `notice_at`."""
    engine = Engine(run, torch.device("cpu"))
    given: list[Notice] = []

    def notice() -> Notice | None:
        if trainer.step >= notice_at and not given:
            given.append(Notice(time.time() + seconds_left, (0,)))
        return given[0] if given else None

    def evaluate() -> float:
        time.sleep(evaluation_s)
        return 0.0

    trainer = Trainer(run, engine, notice)
    trainer.restore()
    trainer.evaluate = evaluate  # type: ignore[method-assign]
    blocks = local_blocks(run, 0, 1, 0)
    batches = (time.sleep(0.2) or batch for batch in split_blocks(blocks, run, 0, 1, 0))  # type: ignore[func-returns-value]
    end = trainer.train(batches)
    trainer.close()
    engine.close()
    return end


def is_outdated(run: RunConfig) -> bool:
    """Whether a group that is started for `run` was not told of a rewind."""
    engine = Engine(run, torch.device("cpu"))
    found = Trainer(run, engine).is_outdated()
    engine.close()
    return found


def _noted(batches: Iterator[StepBatch], current: set[int]) -> Iterator[StepBatch]:
    """The same batches; `current` holds the samples of the newest."""
    for batch in batches:
        current.clear()
        current.update(batch.ids.reshape(-1).tolist())
        yield batch


def owned_elements(engine: Engine) -> int:
    """Elements of master weights that this rank would save."""
    return sum(f.tensor.numel() for f in engine.fragments(owned=True) if f.kind == "weight")


def initial_digests(runs: list[RunConfig]) -> list[str]:
    """For each run one sha256 over the initial fp32 weights, put together from all ranks' fragments."""
    return [_initial_digest(run) for run in runs]


def _initial_digest(run: RunConfig) -> str:
    engine = Engine(run, torch.device("cpu"))
    mine = [
        (f.parameter, f.start, f.tensor.numpy().tobytes()) for f in engine.fragments(owned=True) if f.kind == "weight"
    ]
    pieces = sorted(piece for part in engine.gather_objects(mine) for piece in part)
    engine.close()
    return weights_digest((name, content) for name, _, content in pieces)


def weights_digest(pieces: Iterable[tuple[str, bytes]]) -> str:
    """sha256 of (parameter, content) pairs; a parameter may come in several consecutive ones."""
    digest = hashlib.sha256()
    for name, group in itertools.groupby(pieces, lambda piece: piece[0]):
        digest.update(name.encode())
        for _, content in group:
            digest.update(content)
    return digest.hexdigest()


def startup_peak(run: RunConfig) -> int:
    """Bytes that this process needed at its peak to build the engine."""
    engine = Engine(run, torch.device("cpu"))
    peak = engine.memory.bytes()
    engine.close()
    return peak


def committed_step(run: RunConfig) -> int:
    """Step of the newest checkpoint."""
    found = newest(run.run_dir)
    return found.index.step if found else 0
