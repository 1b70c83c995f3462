"""The run file: frozen, typed sections; unknown keys and wrong types are refused by name.

A run file is TOML. ``load_run`` reads it, applies ``--set section.key=value`` and returns a `RunConfig`.
Every mistake raises `UserError` with one line that names the file and the key.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gpt2dist.urls import without_secrets, without_secrets_in

LARGEST = sys.float_info.max
TOO_MUCH = "a number has too many digits, or lists or tables are nested too deeply"
LONGEST_SHOWN = 200


class UserError(Exception):
    """A mistake of the user's: printed as one line, exit code 2."""


class Section(BaseModel):
    """Base of all sections: immutable, strict types, finite numbers, no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


S = TypeVar("S", bound=Section)


class PrepareSection(Section):
    """[prepare] documents → token shards."""

    sources: list[str] = []
    """`builtin:stdlib`, files (.txt, .md, .jsonl, .json, also .gz or .zst; .parquet; .bin of tokens), directories,
    globs; local or URLs (`s3://`, `https://`, …)."""
    text_field: str = "text"
    """The field of a JSON object, or the column of a .parquet, that holds the document."""
    output: str = ""
    """Directory of the prepared data set."""
    val_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Share of documents that go to the validation split, chosen by a hash of the text."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    """What a record that cannot be read does: stop with its file and line, or be counted and left out."""
    dedup: Literal["none", "exact", "near"] = "exact"
    """Of documents with the same text (`near`: with nearly the same words) only the first is kept."""
    near_threshold: float = Field(default=0.8, gt=0, lt=1)
    """With dedup = "near": share of common 5-word sequences (Jaccard) from which two documents count as the same."""
    min_chars: int = Field(default=0, ge=0)
    """Leave out documents with fewer characters."""
    max_chars: int = Field(default=0, ge=0)
    """Leave out documents with more characters; 0: no limit."""
    cpus: int | None = Field(default=None, ge=1)
    """Tokenize on this many cores; by default all of them."""
    shard_mb: float = Field(default=64.0, gt=0, le=1e6)
    """Text per task and shard, in MB (10^6 bytes)."""
    vocab_dir: str = ""
    """Directory with GPT-2's `vocab.bpe` and `encoder.json`; by default they are looked up (docs/data.md)."""


class ModelSection(Section):
    """[model] a preset, or layers, heads and width."""

    preset: Literal["", "tiny", "124M", "355M", "774M", "1558M"] = ""
    """A published size of GPT-2, or `tiny` (2 layers, 2 heads, width 64)."""
    n_layer: int | None = Field(default=None, ge=1, le=10_000)
    """Transformer blocks."""
    n_head: int | None = Field(default=None, ge=1, le=1_000_000)
    """Attention heads; divides n_embd."""
    n_embd: int | None = Field(default=None, ge=1, le=1_000_000)
    """Width of the residual stream."""
    n_positions: int | None = Field(default=None, ge=1, le=100_000_000)
    """Rows of the position table; by default data.seq_len."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout after the embeddings, in attention and on both residual branches."""
    document_mask: bool = False
    """Attention does not cross `<|endoftext|>`, and positions begin again after it (docs/model.md)."""
    init_from: str = ""
    """Initial weights: a directory with a Hugging Face GPT-2 of this shape, or its id on the hub; by default random."""

    @model_validator(mode="after")
    def _shape(self) -> ModelSection:
        shape = (self.n_layer, self.n_head, self.n_embd)
        if self.preset and any(v is not None for v in shape):
            raise ValueError("give preset, or n_layer, n_head and n_embd, not both")
        if not self.preset and any(v is None for v in shape):
            raise ValueError("give preset, or all of n_layer, n_head and n_embd")
        if self.n_embd and self.n_head and self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}")
        return self


class DataSection(Section):
    """[data] which token shards, and how they are cut and shuffled."""

    path: str | dict[str, float] = ""
    """A prepared data set, or a table of them with their weights; by default prepare.output."""
    seq_len: int = Field(default=1024, ge=1, le=100_000_000)
    """Tokens a sequence (T); a sample holds T+1 ids."""
    verify: bool = False
    """Before training, compute the hash of every shard; otherwise only sizes are compared, and hashes when a shard is
    copied from an object store."""
    allow_changed: bool = False
    """Go on with a run although steps will train on other samples than so far: another data set, or a changed key
    that decides the order (docs/checkpoints.md). Which samples it has seen is then not known, and `audit` cannot prove
    the steps before."""
    skip: list[Annotated[tuple[int, int], Field(strict=False)]] = []
    """Positions [first, end) of the sample order that are left out; a rewind (train.rewind) adds to them by itself."""
    shuffle_window: int = Field(default=8, ge=1, le=2**31)
    """Shards among which samples are shuffled at a time."""
    cache_gb: float = Field(default=20.0, gt=0)
    """Shards on an object store are copied to each node's disk; of all copies there, at most this many GB are kept."""

    @field_validator("path", mode="before")
    @classmethod
    def _path_or_weights(cls, path: Any) -> Any:
        if isinstance(path, dict):
            for name, weight in path.items():
                if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= LARGEST:
                    raise ValueError(f"the weight of {name} must be a number above 0, got {_shown(weight)}")
            places: dict[str, str] = {}
            for name in path:
                place = name.rstrip("/") if "://" in name else os.path.normpath(absolute(name))
                if (other := places.setdefault(place, name)) != name:
                    raise ValueError(f"{other} and {name} are the same data set: give one weight for it")
        if not isinstance(path, (str, dict)) or path == {}:
            raise ValueError(f"a path, or a table of paths with their weights, got {_shown(path)}")
        return path

    @field_validator("skip")
    @classmethod
    def _disjoint(cls, skip: list[tuple[int, int]]) -> list[tuple[int, int]]:
        ordered = sorted(skip)
        starts = [0, *(end for _, end in ordered)]
        if any(first < least or first >= end for (first, end), least in zip(ordered, starts, strict=False)):
            raise ValueError(f"ranges [first, end) that do not overlap, got {json.dumps(skip)}")
        return ordered


class BatchSection(Section):
    """[batch] the global batch, independent of the number of workers."""

    micro_sequences: int = Field(default=8, ge=1)
    """Sequences of one micro-batch."""
    micro_batches: int = Field(default=1, ge=1)
    """M: micro-batches of a step, shared among the workers, of whom there may be no more."""
    warmup_steps: int = Field(default=0, ge=0)
    """M grows linearly over this many steps, from `initial_micro_batches`; 0: M from the start."""
    initial_micro_batches: int = Field(default=1, ge=1)
    """M of the first step where there is a warm-up."""

    @model_validator(mode="after")
    def _grows(self) -> BatchSection:
        if self.initial_micro_batches > self.micro_batches:
            raise ValueError(
                f"initial_micro_batches = {self.initial_micro_batches} is above micro_batches = {self.micro_batches}"
            )
        if self.initial_micro_batches > 1 and not self.warmup_steps:
            raise ValueError(f"initial_micro_batches = {self.initial_micro_batches} needs warmup_steps")
        return self


class TrainSection(Section):
    """[train] how long and in which arithmetic."""

    steps: int = Field(default=1000, ge=1)
    """Length of the run and of its schedules."""
    stop_at: int | None = Field(default=None, ge=1)
    """Stop here, saved, though the schedules go on to `steps`."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of forward and backward; master weights and Adam moments are always fp32. fp16 needs zero_stage 1 to
    3."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO shards: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights."""
    activation_checkpointing: bool = False
    """Keep only each block's input and compute the rest again in backward: less memory, about a third more work."""
    bucket_mb: float = Field(default=100.0, ge=0.1, le=1e6)
    """Gradients, and at stage 3 weights, travel in pieces of so many MB of fp32; not used at stage 2
    with one worker or up to 4 CPU ones."""
    overlap_comm: bool = True
    """Reduce gradients while the backward pass goes on; takes a second bucket. Not with one worker."""
    offload_optimizer: bool = False
    """Keep master weights and Adam moments in host memory, and update them there; changes nothing on CPU workers. Needs
    zero_stage 1 to 3."""
    offload_param: bool = False
    """Keep the weights in host memory while they are not used; changes nothing on CPU workers. Needs zero_stage 3."""
    compile: bool = False
    """torch.compile each block, on CUDA the loss's softmax too. Same losses to rounding, but other dropout masks; CPU
    workers need a C++ compiler."""
    deterministic: bool = True
    """On CUDA: only kernels that add in the same order in every run, as CPU workers do, for a resumed run to equal an
    undisturbed one bit for bit."""
    max_skipped: int = Field(default=10, ge=1)
    """A step with non-finite gradients changes nothing but is counted; after this many in a row the run stops and names
    their samples (with `rewind` it goes back instead). In fp16 those that lower the loss scale do not count."""
    nan_at: list[int] = []
    """Steps whose gradients are made NaN on purpose, to see what becomes of a run."""
    rewind: bool = False
    """After `rewind_after` steps in a row whose loss or gradients are not finite, or whose loss has jumped (`spike`),
    go back to the last checkpoint before them and leave their samples out; events.jsonl names the documents."""
    rewind_after: int = Field(default=3, ge=1, le=10_000)
    """Bad steps in a row that are a divergence."""
    spike: float = Field(default=1.0, gt=0)
    """A loss this far above the median of the last 100 steps, in nats, has jumped; not before there are 10 of them."""
    max_rewinds: int = Field(default=5, ge=1)
    """A run that diverges once more than this stops, naming the samples."""
    initial_loss_scale: int = Field(default=2**16, ge=1, le=2**32)
    """fp16: loss scale at the start, a power of two; it halves when gradients overflow and doubles every 1000 steps."""
    profile_steps: tuple[int, int] | None = Field(default=None, strict=False)
    """[first, end]: steps first to end − 1 of worker 0 are recorded by torch's profiler, into the run's directory."""
    peak_tflops: float | None = Field(default=None, gt=0, le=1e6)
    """Peak of one worker for the MFU figure; by default measured with a matrix product at start."""

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _number(cls, stage: Any) -> Any:
        if isinstance(stage, bool):  # equal to 0 and 1 in Python
            raise ValueError(f"input should be 0, 1, 2 or 3, got {json.dumps(stage)}")
        return stage

    @model_validator(mode="after")
    def _known(self) -> TrainSection:
        if self.stop_at is not None and self.stop_at > self.steps:
            raise ValueError(f"stop_at = {self.stop_at} is after steps = {self.steps}")
        if self.precision == "fp16" and self.zero_stage == 0:
            raise ValueError("precision = fp16 needs zero_stage 1, 2 or 3, which carry the loss scale")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "offload_optimizer needs zero_stage 1, 2 or 3: at 0 the optimizer is torch's, on the device"
            )
        if self.offload_param and self.zero_stage != 3:
            raise ValueError(
                "offload_param needs zero_stage 3: below, every worker uses its whole weights all the time"
            )
        if self.profile_steps and not 0 <= self.profile_steps[0] < self.profile_steps[1]:
            raise ValueError(f"profile_steps = {list(self.profile_steps)}: give the first step and a later one")
        if self.profile_steps and self.profile_steps[0] >= self.steps:
            raise ValueError(f"profile_steps = {list(self.profile_steps)} begins after the last of {self.steps} steps")
        if (latest := max(self.nan_at, default=0)) >= self.steps:
            raise ValueError(f"nan_at = {self.nan_at}: step {latest} is after the last of {self.steps} steps")
        if self.initial_loss_scale.bit_count() != 1:
            raise ValueError(f"initial_loss_scale = {self.initial_loss_scale} is not a power of two")
        if self.activation_checkpointing and self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError(
                "activation_checkpointing in bf16 needs zero_stage 1, 2 or 3: at stage 0 the bf16 weights are gone "
                "when backward computes the blocks again"
            )
        return self


class OptimSection(Section):
    """[optim] the optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the blocks' matrices, its updates scaled to the size of AdamW's, and AdamW for the rest; needs
    zero_stage = 0."""

    lr: float = Field(default=6e-4, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=6e-5, ge=0)
    """Learning rate at the end of the schedule; `constant` does not look at it."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps of linear warm-up; step 0 has lr ÷ warmup_steps."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warm-up: half a cosine or a line down to min_lr, `wsd` (constant, then a line for
    `decay_steps`), or constant."""
    decay_steps: int | None = Field(default=None, ge=2)
    """With `wsd`: length of the decay at the end, 2 or more; by default a tenth of train.steps."""
    betas: tuple[float, float] = Field(default=(0.9, 0.95), strict=False)
    """Adam's β₁ and β₂."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's ε; at least 1e-30."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices and embeddings; never of biases and LayerNorm."""
    grad_clip: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient; 0 switches clipping off."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Keep a moving average of the weights, for `--ema` of `generate`, `evaluate` and `export`: after step n it becomes
    d·average + (1 − d)·weights with d = (1 + n)/(10 + n), but at most this; 0: none."""

    @model_validator(mode="after")
    def _ordered(self) -> OptimSection:
        if self.min_lr > self.lr and self.schedule != "constant":
            raise ValueError(f"min_lr = {self.min_lr} is above lr = {self.lr}")
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f'decay_steps is of schedule = "wsd" only, not of "{self.schedule}"')
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)} must lie in [0, 1)")
        if self.eps < 1e-30:
            raise ValueError(f"eps = {self.eps:g} is below 1e-30: in fp32 it may be 0, and steps NaN")
        return self


class EvalSection(Section):
    """[eval] validation loss during training."""

    every_steps: int = Field(default=0, ge=0)
    """Evaluate before the first step, after every n-th and after the last; 0 switches it off."""
    batches: int = Field(default=8, ge=1)
    """Micro-batches of the validation split that an evaluation reads, always the same ones."""


class CheckpointSection(Section):
    """[checkpoint] when to save and what to keep."""

    every_steps: int = Field(default=0, ge=0)
    """Save after every n-th step; 0: only by minutes. A run also saves at its end."""
    every_minutes: float | Literal["auto"] = "auto"
    """Save when this long has passed since the last save began; 0: only by steps; `auto`: the interval that loses
    least (Young and Daly), from how long saves hold the run up and how often it failed. With every_steps alone: 0."""
    mtbf_hours: float = Field(default=6.0, gt=0)
    """For `auto`: hours between failures that are assumed until some have happened."""
    background: bool = True
    """Write while training goes on; otherwise the run waits for every save."""
    retry_minutes: float = Field(default=10.0, ge=0)
    """At the end of a run, try to save for this long if the storage is away or full; then exit code 1. Where the next
    worker group starts, or a run whose directory is there, the storage is waited for as long."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    keep_every: int = Field(default=0, ge=0)
    """Save at every n-th step too, and keep these for ever; where such a save has to wait, the next one is kept. 0:
    none."""

    @model_validator(mode="before")
    @classmethod
    def _steps_alone(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("every_steps") and "every_minutes" not in table:
            return {**table, "every_minutes": 0.0}
        return table

    @field_validator("every_minutes", mode="before")
    @classmethod
    def _minutes_or_auto(cls, minutes: Any) -> Any:
        number = isinstance(minutes, (int, float)) and not isinstance(minutes, bool) and 0 <= minutes <= LARGEST
        if not number and minutes != "auto":
            raise ValueError(f"0 or more minutes, or auto, got {_shown(minutes)}")
        return minutes


class ClusterSection(Section):
    """[cluster] what the run asks Ray for."""

    workers: int | tuple[int, int] = 1
    """Data-parallel workers (the world size), or [min, max]: as many as there are machines for at the time; at most
    batch.micro_batches."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs that Ray reserves for a worker; also its threads."""
    gpus_per_worker: float = Field(default=0, ge=0, le=1)
    """1 trains on CUDA with NCCL, 0 on the CPU with gloo."""
    accelerator: str = ""
    """Train only on machines with these GPUs, by Ray's name (`A100`, `H100`, `L4`, …); by default on any. Needs
    gpus_per_worker = 1."""
    max_failures: int = Field(default=3, ge=-1)
    """Restarts of the worker group after failures in a row with no checkpoint between them; -1 is without limit.
    Machines that are taken away with notice do not count."""
    resize_interval_s: float = Field(default=60.0, gt=0)
    """With [min, max]: how often to look whether there are machines for more workers, or for fewer."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """Dollars that a worker costs in an hour; with it `goodput` tells what the run has cost."""
    hang_timeout_s: float = Field(default=600.0, ge=0)
    """A worker that finishes no step for so long is taken for hung: the stacks of all are written to the run's
    directory, and the group starts again. Raise it where a step or an evaluation takes longer; 0: off."""

    @field_validator("workers", mode="before")
    @classmethod
    def _count_or_range(cls, workers: Any) -> Any:
        both = list(workers) if isinstance(workers, (list, tuple)) else [workers, workers]
        if len(both) != 2 or not all(type(n) is int and n >= 1 for n in both) or both[0] > both[1]:
            raise ValueError(f"a number of workers, or [min, max], got {_shown(workers)}")
        return tuple(both) if isinstance(workers, (list, tuple)) else workers

    @model_validator(mode="after")
    def _accelerator_is_used(self) -> ClusterSection:
        if self.gpus_per_worker not in (0, 1):
            raise ValueError(
                f"gpus_per_worker = {self.gpus_per_worker:g}: 0 or 1, since NCCL wants a GPU for each worker"
            )
        if self.accelerator and not self.gpus_per_worker:
            raise ValueError(f'accelerator = "{self.accelerator}" needs gpus_per_worker = 1')
        return self

    @property
    def min_workers(self) -> int:
        """The fewest workers that may train."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that may train."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class RunConfig(Section):
    """One run: every section of a run file."""

    name: str
    """Name of the run; its directory is storage/name."""
    storage: str = Field(default="runs", min_length=1)
    """Where runs are kept."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights, the sample order and dropout."""
    prepare: PrepareSection = PrepareSection()
    model: ModelSection
    data: DataSection = DataSection()
    batch: BatchSection = BatchSection()
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    cluster: ClusterSection = ClusterSection()

    @field_validator("storage")
    @classmethod
    def _place(cls, storage: str) -> str:
        if re.fullmatch(r"[A-Za-z0-9+.-]+:/*", storage):
            raise ValueError(f"{storage} names no place")
        return storage

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError("use letters, digits, '.', '_' and '-' only")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        positions = self.model.n_positions
        if positions is not None and self.data.seq_len > positions:
            raise ValueError(f"data.seq_len = {self.data.seq_len} is longer than model.n_positions = {positions}")
        warmup, decay, steps = self.optim.warmup_steps, self.optim.decay_steps or 0, self.train.steps
        if warmup + decay > steps and self.optim.schedule == "wsd":
            raise ValueError(
                f"optim.warmup_steps + optim.decay_steps = {warmup + decay} is more than train.steps = {steps}"
            )
        if self.optim.name == "muon" and self.train.zero_stage > 0:
            raise ValueError(
                f'optim.name = "muon" needs train.zero_stage = 0: at stage {self.train.zero_stage} a worker holds '
                "pieces of matrices, and Muon takes whole ones"
            )
        if self.cluster.max_workers > self.batch.micro_batches:
            raise ValueError(
                f"cluster.workers = {self.cluster.max_workers} is more than batch.micro_batches = "
                f"{self.batch.micro_batches}: a worker would never have a micro-batch to train on"
            )
        return self

    @property
    def run_dir(self) -> str:
        """Directory of the run: storage/name."""
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def data_paths(self) -> dict[str, float]:
        """Directories of token shards, with their weights; empty where none is named."""
        if isinstance(self.data.path, dict):
            return self.data.path
        path = self.data.path or self.prepare.output
        return {path: 1.0} if path else {}

    @property
    def shared_places(self) -> list[tuple[str, str]]:
        """(key, location) of what all nodes have to reach."""
        key = "data.path" if self.data.path else "prepare.output"
        return [("storage", self.storage), *((key, path) for path in self.data_paths)]

    @property
    def stop_step(self) -> int:
        """The step after which this invocation stops."""
        return self.train.stop_at or self.train.steps

    def absolute(self) -> RunConfig:
        """The same run with absolute local paths, for processes with other working directories."""
        p = self.prepare
        prepare = p.model_copy(update={"output": absolute(p.output), "vocab_dir": absolute(p.vocab_dir)})
        paths = {absolute(path): weight for path, weight in self.data_paths.items()}
        path = paths if len(paths) > 1 else next(iter(paths), "")
        data = self.data.model_copy(update={"path": path})
        init = self.model.init_from
        model = self.model.model_copy(update={"init_from": absolute(init) if Path(init).is_dir() else init})
        places = {"storage": absolute(self.storage), "prepare": prepare, "data": data, "model": model}
        return self.model_copy(update=places)

    def for_record(self) -> RunConfig:
        """The same run as it may be written down and shown: its sources without passwords and signatures."""
        sources = [without_secrets(source) for source in self.prepare.sources]
        return self.model_copy(update={"prepare": self.prepare.model_copy(update={"sources": sources})})

    @property
    def long_warmup(self) -> str:
        """What to say of a warm-up as long as the run; empty for a shorter one."""
        warmup, steps = self.optim.warmup_steps, self.train.steps
        if warmup < steps:
            return ""
        return f"optim.warmup_steps = {warmup} of train.steps = {steps}: the learning rate only rises"

    @property
    def global_batch(self) -> int:
        """Sequences of one step, over all workers; after the warm-up where there is one (`data.order.consumed`)."""
        return self.batch.micro_batches * self.batch.micro_sequences

    def to_toml(self) -> str:
        """The resolved configuration as a run file."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def load_run(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a run file and apply ``section.key=value`` overrides.

    Raises:
        UserError: the file is missing or not TOML, or a key is unknown, missing or of the wrong type.
    """
    return parse_toml(read_file(path), str(path), overrides)


def read_file(path: str | Path) -> bytes:
    """A local file that the user named. Raises `UserError`."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e}") from None


def parse_table(data: bytes, source: str) -> dict[str, Any]:
    """The table of a TOML file's content; `source` names it in error messages. Raises `UserError`."""
    try:
        return tomllib.loads(data.decode("utf-8-sig"))  # some editors on Windows begin files with a mark
    except UnicodeDecodeError as e:
        raise UserError(f"{source}: cannot be read: {e}") from None
    except tomllib.TOMLDecodeError as e:
        raise UserError(f"{source}: not valid TOML: {e}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{source}: {TOO_MUCH}") from None


def parse_toml(data: bytes, source: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Like `load_run`, of a run file's content; `source` names it in error messages. Raises `UserError`."""
    table = parse_table(data, source)
    for override in overrides:
        _apply_override(table, override)
    return validate(RunConfig, table, source)


def validate(model: type[S], table: dict[str, Any], source: str) -> S:
    """A section of a table; `source` names the table in error messages. Raises `UserError`."""
    try:
        return model.model_validate(table)
    except ValidationError as e:
        problems = e.errors(include_url=False)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{source}: {_explain(model, problems[0])}{more}") from None


def absolute(location: str) -> str:
    """A location for processes with other working directories; an empty one stays empty."""
    return location if not location or "://" in location else str(Path(location).absolute())


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"--set {override}: write it as section.key=value")
    try:
        given = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        given = {"value": text.strip()}  # a bare word is a string
    except (ValueError, RecursionError):
        raise UserError(f"--set {key}: {TOO_MUCH}") from None
    if len(given) > 1:
        raise UserError(f"--set {key}: {text!r} sets more than one key: give --set for each")
    value = given["value"]
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: {part} is not a section")
    table[path[-1]] = value


def _explain(model: type[Section], problem: Any) -> str:
    """One line for one pydantic error: the key, what is wrong, the nearest valid name."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    kind = problem["type"]
    if kind == "extra_forbidden":
        section: Any = model
        for part in location[:-1]:
            if hasattr(section, "model_fields"):
                section = section.model_fields[part].annotation
            else:  # a table of sections, dict[str, Section]
                section = get_args(section)[1]
        near = difflib.get_close_matches(location[-1], section.model_fields, n=1, cutoff=0.5)
        where = f"in [{'.'.join(location[:-1])}]" if location[:-1] else "at the top level"
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(section.model_fields)}"
        return f"{key}: unknown key {where}{hint}"
    if kind == "missing":
        return f"{key}: required, but missing"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    message = message.replace("a valid tuple", "a list")  # as TOML calls it
    if kind in ("model_type", "dict_type"):
        message = "input should be a table"
    return f"{key}: {message[0].lower()}{message[1:]}, got {_shown(problem['input'])}"


def _shown(value: Any) -> str:
    """What was given, for a message."""
    try:
        text = without_secrets_in(json.dumps(value, default=str))
    except (ValueError, RecursionError):
        return "what is too long to be shown"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
