"""A run of ours on two ranks and one of transformers' own Trainer end at the same validation loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, SequentialSampler
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from gpt2dist.config import RunConfig
from gpt2dist.data.mixture import MixedSplit, Mixture
from gpt2dist.data.order import SampleOrder, eval_ids
from tests.conftest import tiny_run
from tests.distributed import jobs
from tests.distributed.test_engine import logged
from tests.unit.corpora import run_prepare

STEPS, BATCH, SEQ_LEN = 80, 16, 128


class Samples(Dataset[dict[str, Tensor]]):
    """Samples of a split by their ids, as Trainer takes them."""

    def __init__(self, split: MixedSplit, ids: np.ndarray[Any, Any]) -> None:
        self.split, self.ids = split, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        tokens = torch.from_numpy(self.split.samples(self.ids[i : i + 1])[0].astype("int64"))
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


class InOrder(Trainer):
    """Takes the samples in the order of the data set, which is that of our run."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset)


def loss_function(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The labels are the next tokens already; GPT2LMHeadModel would shift them."""
    return cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


def trainer_loss(run: RunConfig, directory: Path) -> float:
    """Validation loss at the end, on the samples that ours is computed on."""
    data = Mixture.open(run)
    train = MixedSplit(data, "train", SEQ_LEN)
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=run.batch.micro_sequences,
        learning_rate=run.optim.lr,
        lr_scheduler_type="cosine",
        weight_decay=run.optim.weight_decay,
        adam_beta1=run.optim.betas[0],
        adam_beta2=run.optim.betas[1],
        adam_epsilon=run.optim.eps,
        max_grad_norm=run.optim.grad_clip,
        seed=run.seed,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    order = SampleOrder(run, data).samples(0, STEPS * BATCH)
    trainer = InOrder(
        GPT2LMHeadModel.from_pretrained(run.model.init_from),
        arguments,
        train_dataset=Samples(train, order),
        eval_dataset=Samples(MixedSplit(data, "val", SEQ_LEN), eval_ids(run, data).reshape(-1)),
        compute_loss_func=loss_function,
    )
    trainer.train()
    return float(trainer.evaluate()["eval_loss"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_same_validation_loss_as_transformers_trainer(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 128}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    initial = str(tmp_path / "initial")
    GPT2LMHeadModel(GPT2Config(n_positions=SEQ_LEN, **shape, **no_dropout)).save_pretrained(initial)
    run = tiny_run(
        storage=str(tmp_path),
        prepare={"sources": ["builtin:stdlib"], "output": str(tmp_path / "stdlib"), "val_fraction": 0.02},
        model={**shape, "dropout": 0.0, "init_from": initial},
        data={"seq_len": SEQ_LEN},
        batch={"micro_sequences": 4, "micro_batches": BATCH // 4},
        train={"steps": STEPS, "precision": "fp32", "zero_stage": 2, "peak_tflops": 1.0},
        optim={"lr": 5e-4, "min_lr": 0.0, "warmup_steps": 0},
        eval={"every_steps": STEPS, "batches": 64},
        checkpoint={"every_steps": 0},
    )
    run_prepare(run)
    ranks(jobs.train_runs, 2, [run], timeout=600)
    ours = list(logged(run, "val_loss").values())[-1]
    theirs = trainer_loss(run, tmp_path / "trainer")
    print(f"validation loss: {ours:.4f}, transformers' Trainer {theirs:.4f}")
    assert ours < 7  # both have learned something
    assert abs(ours - theirs) <= 1e-3
