"""What a run needs, computed before it starts: parameters, FLOPs, batch arithmetic, memory of each part."""

from __future__ import annotations

import math
from typing import Any

import torch

from gpt2dist.config import RunConfig
from gpt2dist.data.order import accumulation_steps, consumed
from gpt2dist.model import gpt2
from gpt2dist.model.attention import keeps_probabilities
from gpt2dist.model.linear import product_dtype
from gpt2dist.model.loss import CHUNK, ROWS
from gpt2dist.train.fragment import is_muon_matrix, sums_at_owners
from gpt2dist.train.peak import DTYPES

BESIDE_TENSORS = 15_000_000
"""Bytes that steps on a CPU take for oneDNN's scratch memory, gloo and code loaded late: 0 to 45 MB were seen."""


def arithmetic(run: RunConfig) -> dict[str, Any]:
    """Counts of one run; sizes in tokens, sequences and FLOPs; those of a step hold after the warm-up of the batch."""
    config = gpt2.GPT2Config.from_run(run)
    world, tokens = run.cluster.max_workers, run.global_batch * run.data.seq_len
    gas = accumulation_steps(run.batch.micro_batches, world)
    all_tokens = consumed(run.batch, run.train.steps) * run.data.seq_len
    flops = gpt2.flops_per_token(config, run.data.seq_len)
    n = gpt2.count_parameters(config, published=False)
    return {
        "parameters": gpt2.count_parameters(config),
        "parameters_padded": n,
        "flops_per_token": flops,
        "workers": world,
        "micro_batches": run.batch.micro_batches,
        "accumulation_steps": gas,
        "padding_micro_batches": gas * world - run.batch.micro_batches,
        "sequences_per_step": run.global_batch,
        "tokens_per_step": tokens,
        "tokens": all_tokens,
        "flops": flops * all_tokens,
        "checkpoint_bytes": (16 if run.optim.ema_decay else 12) * n - 4 * _of_muon(run),
    }


def copied_bytes(run: RunConfig) -> int:
    """What a worker has of the state while it is saved, in host memory."""
    return int(-(-arithmetic(run)["checkpoint_bytes"] // run.cluster.max_workers))


def memory(run: RunConfig) -> dict[str, int]:
    """Bytes of each part on one worker at the moment that needs most, by ZeRO stage (Rajbhandari et al. 2020).

    Beside what is always there, that is either when the loss goes backward (activations, logits), or when gradients are
    reduced, at the end of backward. tests/distributed/test_memory.py holds this against measurements.
    """
    config = gpt2.GPT2Config.from_run(run)
    n, world, stage = gpt2.count_parameters(config, published=False), run.cluster.max_workers, run.train.zero_stage
    low = 4 if run.train.precision == "fp32" else 2
    share = {s: -(-n // world) if stage >= s else n for s in (1, 2, 3)}
    on_cpu = run.cluster.gpus_per_worker == 0
    parts = {}
    if stage == 0:
        parts["weights"] = 4 * n
        parts["16-bit copy"] = 0 if low == 4 else low * n
    else:
        parts["weights"] = low * share[3]
        # At stage 3 in fp32 the weights are the master weights.
        parts["master weights"] = 0 if low == 4 and stage == 3 else 4 * share[1]
    if stage == 3:
        # Gathered to be used, and not let go again where they are few (DeepSpeed's max_live_parameters is 10^9).
        gathers = world > 1 or (run.train.offload_param and not on_cpu)
        parts["gathered weights"] = low * min(n, 10**9) if gathers else 0
    parts["gradients"] = 4 * share[2]  # the sum over micro-batches, fp32
    parts["Adam moments"] = 8 * share[1] - 4 * _of_muon(run)  # Muon has one moment
    if run.optim.ema_decay:
        parts["averaged weights"] = 4 * share[1]
    if run.train.offload_optimizer and not on_cpu:
        # Stages 1 and 2 sum gradients on the device, and copy them through a buffer for the largest parameter.
        gradients = 4 * share[2] if stage < 3 else 0
        parts |= {"master weights": 0, "gradients": gradients, "Adam moments": 0}
        parts |= {"averaged weights": 0} if run.optim.ema_decay else {}
        if stage < 3:
            parts["buffer for offload"] = low * config.padded_vocab_size * config.n_embd
    if run.train.offload_param and not on_cpu:
        parts["weights"] = 0
    if on_cpu:
        parts["beside tensors"] = BESIDE_TENSORS
        parts["copy while saving"] = copied_bytes(run)
    tokens = run.batch.micro_sequences * run.data.seq_len
    device = torch.device("cpu" if on_cpu else "cuda")
    dtype = DTYPES[run.train.precision]
    product = product_dtype(dtype, device).itemsize
    # Korthikanti et al. 2022: 34·C bytes a token and layer in 16 bit, without attention scores. Products in
    # fp32 keep Q, K, V and the result of attention in it. With checkpointing the input of each block, and later all of
    # the one that is computed again.
    inputs = low * config.n_embd * tokens
    block = 17 * inputs + 4 * (product - low) * config.n_embd * tokens
    scores = config.n_head * run.data.seq_len * tokens
    with_dropout = on_cpu and config.dropout > 0  # torch has no fused attention for it there
    if with_dropout:
        # In fp32 probabilities, what dropout multiplies them by, and their product; Q, K and V, but not the result.
        # Beside them what it multiplies both branches by.
        block = 19 * inputs + 3 * (4 - low) * config.n_embd * tokens + 3 * 4 * scores
    elif not config.document_mask and keeps_probabilities(run.data.seq_len, dtype, device):
        block += low * scores - inputs  # in place of the result
    checkpointing = run.train.activation_checkpointing
    activations = config.n_layer * (inputs if checkpointing else block)
    table = low * config.padded_vocab_size * config.n_embd  # a gradient of the embedding table
    # The gradient takes the place of the logits (model/loss.py).
    if on_cpu and product == 4:  # of a chunk at a time; the table and its gradient in fp32
        loss = {
            "logits": 4 * min(tokens, CHUNK) * config.padded_vocab_size,
            "table in fp32": 0 if low == 4 else 2 * table,
            "gradient of the table": 4 * config.padded_vocab_size * config.n_embd,
        }
    else:  # all at once; beside them some rows in fp32: where they are not, and on CUDA their logarithms
        copies = (low != 4) + (not on_cpu)
        if run.train.compile and not on_cpu:
            copies = 0
        rows = 4 * copies * min(tokens, ROWS[device.type])
        loss = {"logits": (low * tokens + rows) * config.padded_vocab_size, "gradient of the table": table}
    tables = 2 if on_cpu else 3  # its gradients from the head and from the embedding, on CPUs rows, and their sum
    bucket = min(n, round(run.train.bucket_mb * 1e6 / 4))
    moments = [{"activations": activations, **loss}]
    if stage == 3:  # where the bucket stays
        moments[0]["bucket"] = 4 * bucket
    if checkpointing:
        activations += block
    if checkpointing or with_dropout:
        of_scores = 2 * 4 * scores if with_dropout else 0  # two gradients of them
        moments.append({"activations": activations + of_scores, "gradient of the table": table})
    reduce: dict[str, int] = {}
    if stage == 1:
        reduce = {"gradients to reduce": table, "gradients of the own part": 4 * share[1]}
    elif stage >= 2:
        reduce = {"gradients to reduce": tables * table}
    if stage == 3 and low == 4:  # and the own part of a bucket
        own = -(-min(n - table // low, bucket) // world)
        reduce = {"gradients to reduce": 2 * table + 4 * own, "activations": activations}
    elif stage == 3:  # and those that wait for their bucket
        reduce = {"gradients to reduce": low * min(n, 2 * bucket) + tables * table, "activations": activations}
    if stage == 2 and sums_at_owners(device.type, world):
        own = min(table, low * share[2])
        reduce["of the others, summed"] = own * (world - 1 + (low == 4)) if world > 1 else 0
    elif stage:
        # On CUDA two with overlap_comm, by DeepSpeed's source: not measured; and what is made of them on the way.
        second = 4 if run.train.overlap_comm else 0
        as_it_is = on_cpu or sums_at_owners(device.type, world)
        reduce["bucket"] = (4 if as_it_is else {1: 8 + second, 2: 6 + second, 3: 4}[stage]) * bucket
    sizes = [sum(moment.values()) for moment in [*moments, reduce]]
    parts |= [*moments, reduce][sizes.index(max(sizes))]
    return parts


def _of_muon(run: RunConfig) -> int:
    """Elements of the matrices that Muon has."""
    shapes = gpt2.parameter_shapes(gpt2.GPT2Config.from_run(run)).items()
    return sum(math.prod(s) for name, s in shapes if run.optim.name == "muon" and is_muon_matrix(name, len(s)))
