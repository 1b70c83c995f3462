"""`evaluate`: a saved model on a split of prepared data, in this process or as a Ray Train job."""

from __future__ import annotations

import contextlib
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from upath import UPath

from gpt2dist.config import UserError, absolute
from gpt2dist.data.mixture import MixedSplit, Mixture
from gpt2dist.data.order import Ids, permutation
from gpt2dist.data.shards import Split
from gpt2dist.model.evaluate import Score, evaluate
from gpt2dist.storage import location, remove_tree
from gpt2dist.train.saved import SavedModel, open_model


@dataclass(frozen=True)
class Evaluation:
    """What to compute; the same for every process that takes part."""

    location: str
    """Run directory, or directory of a Hugging Face model."""
    step: int | None
    """Of the checkpoint; None: the newest."""
    ema: bool
    """Its averaged weights."""
    precision: str
    paths: dict[str, float]
    """Data sets; every sample of each counts once."""
    split: Split
    seq_len: int
    batch: int
    """Sequences computed together."""
    batches: int | None
    """Of a fixed random order; None: the whole split."""

    @classmethod
    def of(
        cls,
        saved: SavedModel,
        place: str,
        *,
        ema: bool,
        precision: str,
        data: str | None,
        split: Split,
        seq_len: int | None,
        batch: int | None,
        batches: int | None,
    ) -> Evaluation:
        """What is not given comes from the run that trained the model.

        Raises:
            UserError: no data is named, or the sequences are too long for the model.
        """
        run, positions = saved.run, saved.config.n_positions
        if data == "":
            raise UserError("--data: empty; name a directory")
        paths = {data: 1.0} if data else run.absolute().data_paths if run else {}
        if not paths:
            raise UserError("--data: required for a Hugging Face model")
        seq_len = seq_len or (run.data.seq_len if run else positions)
        if seq_len > positions:
            raise UserError(f"--seq-len {seq_len} is longer than the model's n_positions = {positions}")
        batch = batch or (run.batch.micro_sequences if run else max(1, 4096 // seq_len))
        return cls(place, saved.step, ema, precision, paths, split, seq_len, batch, batches)

    def open(self) -> MixedSplit:
        """The tokens. Raises `UserError` where they are damaged, or less than one sequence."""
        data = Mixture.of(self.paths)
        tokens = MixedSplit(data, self.split, self.seq_len)
        tokens.check_sizes()
        if not tokens.num_samples:
            count = sum(part.tokens for part in tokens.parts)
            raise UserError(f"{data}: {self.split} has {count:,} tokens, less than one sequence of {self.seq_len} + 1")
        return tokens

    def ids(self, tokens: MixedSplit) -> Ids:
        """The samples, from the front of the storage to its end: int64 [samples]."""
        if not self.batches:
            return np.arange(tokens.num_samples)
        return np.sort(permutation(tokens.num_samples, "eval")[: self.batches * self.batch])


def on_ray(e: Evaluation, workers: int, cpus_per_worker: float, gpus_per_worker: float) -> Score:
    """The score of all batches, shared among Ray Train workers. Ray must be initialized.

    Raises:
        TrainingFailed: with the cause.
    """
    import ray.train  # here: in one process evaluation needs no Ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from gpt2dist.train.allocator import cpu_worker_environment
    from gpt2dist.train.launch import failed, ray_storage

    e = replace(e, paths={absolute(path): weight for path, weight in e.paths.items()})
    resources = {"CPU": cpus_per_worker} | ({"GPU": gpus_per_worker} if gpus_per_worker else {})
    with _scratch(e) as scratch:
        trainer = TorchTrainer(
            _evaluate_share,
            train_loop_config=asdict(e),
            torch_config=TorchConfig(backend="gloo"),  # three numbers travel
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=gpus_per_worker > 0, resources_per_worker=resources
            ),
            run_config=RunConfig(
                **ray_storage(scratch),
                worker_runtime_env={"env_vars": {} if gpus_per_worker else cpu_worker_environment()},
            ),
        )
        try:
            return Score(**trainer.fit().return_value)
        except ray.train.TrainingFailedError as error:
            raise failed(error) from error


@contextlib.contextmanager
def _scratch(e: Evaluation) -> Iterator[UPath]:
    """Where Ray Train keeps its marks: in a run directory, which all nodes reach, or for this machine alone."""
    if e.step is None:
        with tempfile.TemporaryDirectory() as name:
            yield UPath(name)
        return
    directory = location(e.location) / f"ray-evaluate-{uuid.uuid4().hex[:8]}"
    try:
        yield directory
    finally:
        with contextlib.suppress(OSError):
            remove_tree(directory)


def _evaluate_share(config: dict[str, Any]) -> dict[str, Any]:
    """The score; each rank computes every world-th batch, and the sums are added up in fp64."""
    e = Evaluation(**config)
    rank, world = dist.get_rank(), dist.get_world_size()
    tokens = e.open()
    ids = e.ids(tokens)
    mine = [ids[first : first + e.batch] for first in range(rank * e.batch, len(ids), world * e.batch)]
    model = open_model(e.location, e.step, ema=e.ema).load(e.precision)
    score = sum((part for share in mine for part in evaluate(model, tokens, share, e.batch)), Score())
    total = torch.tensor([score.loss_sum, score.correct, score.tokens], dtype=torch.float64)
    dist.all_reduce(total)
    return asdict(Score(total[0].item(), int(total[1]), int(total[2])))
