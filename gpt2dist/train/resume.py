"""What a changed run file means for a run that exists: each key is safe, decides what steps train on, or must stay."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from pydantic import BaseModel

from gpt2dist.config import RunConfig
from gpt2dist.data.order import positions
from gpt2dist.model.gpt2 import PRESETS

Effect = Literal["safe", "order", "incompatible"]
WORDS: dict[Effect, str] = {"safe": "safe", "order": "changes the data order", "incompatible": "incompatible"}

# safe: the state fits and every sample stands where it stood; what the key does holds from now on. (Documents that are
#   prepared otherwise, and data elsewhere, show in the fingerprint of the data set.)
# order: steps train on other samples from now on; some may come twice, or not at all.
# incompatible: the saved weights or moments are those of another model or optimizer. (What data.skip leaves out may
#   change for samples that are still to come.)
TABLE = """
safe          name storage
order         seed
safe          prepare.sources prepare.text_field prepare.output prepare.val_fraction prepare.on_bad_record
safe          prepare.dedup prepare.near_threshold prepare.min_chars prepare.max_chars prepare.cpus
safe          prepare.shard_mb prepare.vocab_dir
incompatible  model.preset model.n_layer model.n_head model.n_embd model.n_positions
safe          model.dropout model.document_mask model.init_from
order         data.seq_len data.shuffle_window
incompatible  data.skip
safe          data.path data.verify data.allow_changed data.cache_gb
order         batch.micro_sequences batch.micro_batches batch.warmup_steps batch.initial_micro_batches
safe          train.steps train.stop_at train.precision train.zero_stage train.activation_checkpointing
safe          train.bucket_mb train.overlap_comm train.offload_optimizer train.offload_param train.compile
safe          train.deterministic
safe          train.max_skipped train.initial_loss_scale train.profile_steps train.peak_tflops train.nan_at
safe          train.rewind train.rewind_after train.spike train.max_rewinds
incompatible  optim.name
safe          optim.lr optim.min_lr optim.warmup_steps optim.schedule optim.decay_steps optim.betas optim.eps
safe          optim.weight_decay optim.grad_clip optim.ema_decay
safe          eval.every_steps eval.batches
safe          checkpoint.every_steps checkpoint.every_minutes checkpoint.mtbf_hours checkpoint.background
safe          checkpoint.retry_minutes checkpoint.keep checkpoint.keep_every
safe          cluster.workers cluster.cpus_per_worker cluster.gpus_per_worker cluster.max_failures
safe          cluster.resize_interval_s cluster.accelerator cluster.price_per_hour cluster.hang_timeout_s
"""


def _effects() -> Iterator[tuple[str, Effect]]:
    for line in TABLE.strip().splitlines():
        effect, *names = line.split()
        for name in names:
            yield name, cast(Effect, effect)


EFFECTS = dict(_effects())
"""Every key of a run file → what a change of it means."""


@dataclass(frozen=True)
class Change:
    """A key that is not what it was when the run's newest checkpoint was made."""

    key: str
    before: Any
    now: Any
    effect: Effect
    reason: str = ""
    """Why it is incompatible."""

    def __str__(self) -> str:
        return f"{self.key}: {_text(self.before)} → {_text(self.now)}"

    def to_json(self) -> dict[str, Any]:
        """For --json and events.jsonl."""
        return asdict(self)


def changes(saved: dict[str, Any], run: RunConfig, position: int, data_before: str, data_now: str) -> list[Change]:
    """How a run file differs from the configuration in a checkpoint; of a model the shape, however it is written.

    saved, position: of the checkpoint's index; run: with absolute paths, and with what rewinds left out; data_before,
    data_now: fingerprints of the data sets.
    """
    before, now = _resolved(saved), _resolved(run.model_dump(mode="json"))
    found = []
    for key in now:
        if key.split(".")[0] in saved and before[key] != now[key]:
            effect, reason = EFFECTS[key], ""
            if key == "data.skip":
                reason = _skipped_before(before[key], now[key], position)
                effect = "incompatible" if reason else "safe"
            elif effect == "incompatible":
                what = "moments are of another kind" if key == "optim.name" else "weights are of another model"
                reason = f"the saved {what}"
            found.append(Change(key, before[key], now[key], effect, reason))
    if data_before != data_now:
        found.append(Change("content of data.path", data_before[:16], data_now[:16], "order"))
    return found


def refusal(found: list[Change], allow_changed: bool) -> str:
    """Why a run cannot go on with these changes; empty: it can. `allow_changed`: data.allow_changed."""
    for change in found:
        if change.effect == "incompatible":
            note = " (unset: data.seq_len)" if change.key == "model.n_positions" else ""
            return f"{change}{note}: {change.reason}; choose another name for a new run"
    order = [change for change in found if change.effect == "order"]
    if order and not allow_changed:
        what = ", ".join(map(str, order))
        return f"{what}: steps would train on other samples; to go on all the same: --set data.allow_changed=true"
    return ""


def order_id(config: dict[str, Any], fingerprint: str) -> str:
    """Names the order in which samples are trained on, as in the ledger: <data set>/<hash of the keys that decide>.

    config: a run's, as JSON. Keys at their defaults do not count, so one that a later version adds changes no id.
    """
    values, defaults = _flat(config), _flat({})
    chosen = {key: values[key] for key in sorted(values) if EFFECTS[key] == "order" and values[key] != defaults[key]}
    return f"{fingerprint}/{hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:16]}"


def keys() -> Iterator[tuple[str, Any]]:
    """Every key of a run file and its default."""
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            for key, inner in section.model_fields.items():
                yield f"{name}.{key}", inner.default
        else:
            yield name, field.default


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Key → value, as JSON; a key that the version which wrote it did not have had its default."""
    flat = {}
    for key, default in keys():
        section, _, name = key.rpartition(".")
        table = config.get(section, {}) if section else config
        flat[key] = table.get(name, list(default) if isinstance(default, tuple) else default)
    return flat


def _resolved(config: dict[str, Any]) -> dict[str, Any]:
    """`_flat` with the model's shape as numbers."""
    flat = _flat(config)
    if flat["model.preset"]:
        shape = PRESETS[flat["model.preset"]]
        flat |= dict(zip(("model.n_layer", "model.n_head", "model.n_embd"), shape, strict=True)) | {"model.preset": ""}
    flat["model.n_positions"] = flat["model.n_positions"] or flat["data.seq_len"]
    return flat


def _skipped_before(before: list[list[int]], now: list[list[int]], position: int) -> str:
    """What is wrong with leaving out other samples than before; empty: all of them are still to come."""
    old, new = ({(first, end) for first, end in ranges} for ranges in (before, now))
    reached = max((end for _, end in positions(0, position, sorted(old))), default=0)
    for first, end in sorted(old ^ new):
        if first < reached:
            done = "trained on" if (first, end) in new else "left out"
            return f"the samples from position {first} on were {done} already"
    return ""


def _text(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)
