"""What a run needs, computed before it starts: parameters, FLOPs, batch arithmetic, memory of each part."""

from __future__ import annotations

from typing import Any

from gpt2dist.config import RunConfig
from gpt2dist.data.order import accumulation_steps
from gpt2dist.model import gpt2


def arithmetic(run: RunConfig) -> dict[str, Any]:
    """Counts of one run; sizes in tokens, sequences and FLOPs."""
    config = gpt2.GPT2Config.from_run(run)
    world, tokens = run.cluster.workers, run.global_batch * run.data.seq_len
    gas = accumulation_steps(run.batch.micro_batches, world)
    flops = gpt2.flops_per_token(config, run.data.seq_len)
    return {
        "parameters": gpt2.count_parameters(config),
        "parameters_padded": gpt2.count_parameters(config, published=False),
        "flops_per_token": flops,
        "workers": world,
        "micro_batches": run.batch.micro_batches,
        "accumulation_steps": gas,
        "padding_micro_batches": gas * world - run.batch.micro_batches,
        "sequences_per_step": run.global_batch,
        "tokens_per_step": tokens,
        "tokens": tokens * run.train.steps,
        "flops": flops * tokens * run.train.steps,
        "checkpoint_bytes": 12 * gpt2.count_parameters(config, published=False),
    }


def memory(run: RunConfig) -> dict[str, int]:
    """Bytes of each part on one worker, by ZeRO stage (Rajbhandari et al. 2020) and as the engine allocates.

    Activations follow Korthikanti et al. 2022 (34·C bytes a token and layer in 16 bit, attention scores never
    stored), plus the logits in working precision and twice in fp32 (the loss and its gradient).
    """
    config = gpt2.GPT2Config.from_run(run)
    n, world, stage = gpt2.count_parameters(config, published=False), run.cluster.workers, run.train.zero_stage
    low = 4 if run.train.precision == "fp32" else 2
    share = {s: -(-n // world) if stage >= s else n for s in (1, 2, 3)}
    if stage == 0:
        weights, master, gradients = 4 * n, (0 if low == 4 else low * n), 4 * n
    else:
        weights = low * share[3]
        master = 0 if low == 4 and stage == 3 else 4 * share[1]
        gradients = low * share[2]
    token_count = run.batch.micro_sequences * run.data.seq_len
    return {
        "weights": weights,
        "master weights" if stage else "16-bit copy": master,
        "gradients": gradients,
        "Adam moments": 8 * share[1],
        "activations": 17 * low * config.n_embd * config.n_layer * token_count,
        "logits": (low + 8) * config.padded_vocab_size * token_count,
    }
