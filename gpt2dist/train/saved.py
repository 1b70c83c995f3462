"""What was saved: a model, in a run directory or in a Hugging Face one, and the run that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gpt2dist import storage
from gpt2dist.config import RunConfig, UserError, parse_toml
from gpt2dist.data.mixture import Mixture
from gpt2dist.model import gpt2, hf
from gpt2dist.model.gpt2 import GPT2, GPT2Config
from gpt2dist.train import checkpoint, resume, rundir
from gpt2dist.train.peak import DTYPES


@dataclass(frozen=True)
class SavedModel:
    """Shape and weights, and where they come from."""

    config: GPT2Config
    weights: hf.Weights
    run: RunConfig | None = None
    """The run that trained it; None: a Hugging Face directory."""
    step: int | None = None
    """Of the checkpoint."""

    @property
    def vocab_dir(self) -> str:
        """Where the run looks for the vocabulary files."""
        return self.run.prepare.vocab_dir if self.run else ""

    def load(self, precision: str) -> GPT2:
        """The model in eval mode; on the GPU where there is one. precision: fp32, bf16."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return gpt2.assemble(self.config, self.weights).eval().to(device, DTYPES[precision])


def open_model(location: str, step: int | None = None, *, ema: bool = False) -> SavedModel:
    """The newest good checkpoint of a run directory, or the one of `step`; or a Hugging Face model.

    With `ema` the moving average of the weights. All that is read of a checkpoint is checked against its hashes.

    Raises:
        UserError: nothing of the kind lies there, or it is damaged.
    """
    directory = storage.location(location)
    try:
        run = parse_toml(rundir.config_text(location), f"{location}/config.toml")
    except (FileNotFoundError, NotADirectoryError):
        if not storage.exists(directory / hf.CONFIG):
            raise UserError(
                f"{location}: no run directory (config.toml) and no Hugging Face model ({hf.CONFIG})"
            ) from None
        if step is not None:
            raise UserError(f"{location}: --step: not a run directory, it has no steps") from None
        if ema:
            raise UserError(f"{location}: --ema: not a run directory, it has no averaged weights") from None
        return SavedModel(hf.read_config(location), hf.read_weights(location))
    try:
        found = find_checkpoint(location, step)
        config = _as_trained(GPT2Config.from_run(run), found)
        if config.n_layer > len(found.index.parameters):  # before so many blocks are made
            raise UserError(f"{location}/config.toml: model.n_layer: does not fit the checkpoint {found.path}")
        checkpoint.check_fits(found, gpt2.parameter_shapes(config), f"{location}/config.toml")
        if ema and not found.index.has_ema:
            raise UserError(f"{found.path}: --ema: no averaged weights: optim.ema_decay was 0")
        weights = checkpoint.load_weights(found, "ema" if ema else "weight")
        return SavedModel(config, weights.__getitem__, run, found.index.step)
    except checkpoint.BadCheckpoint as e:
        raise UserError(f"{e}; for an older one: --step") from None


def _as_trained(config: GPT2Config, found: checkpoint.Checkpoint) -> GPT2Config:
    """With what a later command may have changed in config.toml as it was when the checkpoint was saved."""
    model = found.index.config.get("model")
    saved = model if isinstance(model, dict) else {}
    mask, dropout = saved.get("document_mask"), saved.get("dropout")
    config = replace(config, document_mask=mask) if isinstance(mask, bool) else config
    return replace(config, dropout=dropout) if isinstance(dropout, float) else config


def find_checkpoint(location: str, step: int | None = None) -> checkpoint.Checkpoint:
    """The newest good checkpoint of a run directory, or the one of `step`. Raises `UserError`, `BadCheckpoint`."""
    if step is None:
        if (found := checkpoint.newest(location)) is None:
            raise UserError(f"{location}: no checkpoint yet")
        return found
    if step not in checkpoint.steps(location):
        raise UserError(f"{location}: no checkpoint of step {step}; see: gpt2dist checkpoint ls {location}")
    found = checkpoint.open_step(location, step)
    checkpoint.check_sizes(found)
    return found


def changes(run: RunConfig, found: checkpoint.Checkpoint, data: Mixture) -> list[resume.Change]:
    """How the run differs from the one that saved the checkpoint.

    Raises:
        UserError: the configuration in its index is not understood.
    """
    now = rundir.with_rewinds(run, rundir.events_log(run.run_dir).read()).absolute().for_record()
    index = found.index
    try:
        return resume.changes(index.config, now, index.position, index.data_fingerprint, data.fingerprint)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        what = f"{type(e).__name__}: {e}"
        raise UserError(f"{found.path}: its configuration is not understood ({what}); of a newer version?") from None
