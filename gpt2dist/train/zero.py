"""Parts of DeepSpeed's ZeRO stages 1 and 2 that are replaced: what they compute stays, how fast or how exactly changes.

Like engine.py it knows DeepSpeed's internals.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import Tensor

from gpt2dist.train.fragment import sums_at_owners

ALIGNMENT = 32
"""Elements of which each rank's part is a multiple: what fills no vector the optimizer computes by other instructions,
whose last bit may be another one."""

IN_FLIGHT = 6
"""Reductions that may wait for other ranks while backward goes on: a rank that is late for a moment stops nobody."""

# DeepSpeed's, however often they are replaced.
_copy_own = DeepSpeedZeroOptimizer.copy_grads_in_partition
_end_backward = DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue
_into_bucket = DeepSpeedZeroOptimizer.reduce_independent_p_g_buckets_and_remove_grads


def replace_parts(device: torch.device, world_size: int) -> None:
    """Put the replacements in place; before `deepspeed.initialize`."""
    _leave_out_muon()
    DeepSpeedEngine._do_optimizer_sanity_check = _choose_optimizer
    stage_1_and_2.count_used_parameters_in_backward = stage3.count_used_parameters_in_backward = len  # all are
    DeepSpeedZeroOptimizer.nccl_start_alignment_factor = property(lambda _: ALIGNMENT, lambda *_: None)  # 2 there
    DeepSpeedZeroOptimizer._add_to_grad_partition_buffer = staticmethod(_add)
    DeepSpeedZeroOptimizer.get_grad_norm_direct = _norm_of_own
    DeepSpeedZeroOptimizer.complete_grad_norm_calculation_for_cpu_offload = _norm_of_offloaded
    DeepSpeedZeroOptimizer.has_overflow_partitioned_grads_serial = _seen_by_norm
    DeepSpeedZeroOptimizer.unscale_and_clip_grads = _scale_in_step
    if sums_at_owners(device.type, world_size):
        DeepSpeedZeroOptimizer.copy_grads_in_partition = _let_go
        DeepSpeedZeroOptimizer._build_compact_grad_partition_buffer = _unset_sums
        DeepSpeedZeroOptimizer.allreduce_and_copy_with_multiple_ranks = _sum_at_owners
        DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue = _finish_sums
        stage_1_and_2.all_gather_dp_groups = _gather
    if world_size == 1:
        DeepSpeedZeroOptimizer.reduce_independent_p_g_buckets_and_remove_grads = _sum_alone


def _leave_out_muon() -> None:
    """DeepSpeed imports its Muon in the first step, to see that nobody uses it: that takes 2 s. Ours is torch's."""
    for name, content in (("muon_optimizer", "MuonWithAuxAdam"), ("original_muon", "muon_update")):
        module = ModuleType(f"deepspeed.runtime.zero.muon.{name}")
        setattr(module, content, type(content, (), {}))
        sys.modules.setdefault(module.__name__, module)


def _choose_optimizer(engine: Any, _basic: Any) -> str | None:
    """Stages 1 to 3 use the ZeRO optimizers, whose fragments engine.py knows.

    DeepSpeed would send stage 1 in bf16 with fp32 accumulation to a class of its own; stage 2's does it as well.
    """
    return ZERO_OPTIMIZATION if engine.zero_optimization() else None


def _add(output: Tensor | None, gradient: Tensor) -> None:
    """Add a 16-bit gradient to its fp32 sum. DeepSpeed makes a fp32 copy of the whole gradient first."""
    if output is None:
        return
    if output.is_cuda:
        output.add_(gradient)
    else:  # in pieces that a cache holds
        for a, b in zip(torch.split(output, 1 << 20), torch.split(gradient, 1 << 20), strict=True):
            a.add_(b)


def _into_sum(total: Tensor, gradient: Tensor, first: bool) -> None:
    """Add a gradient to its fp32 sum, which is not set yet where it is the step's first one."""
    if first:
        total.copy_(gradient)
    else:
        _add(total, gradient)


def _unset_sums(zero: Any, group_idx: int) -> GradPartitionBufferGroup:
    """Where this rank sums the gradients of its part, fp32. DeepSpeed's are zero; here the first ones are put there."""
    size, rank = int(zero.partition_size[group_idx]), dist.get_rank(zero.real_dp_process_group[group_idx])
    flat = torch.empty(size, dtype=torch.float32, device=zero.bit16_groups[group_idx][0].device)
    pieces, of, end = [], {}, 0
    for param in zero.params_in_partition[group_idx]:
        key = zero.get_param_id(param)
        place = int(zero.grad_partition_insertion_offset[group_idx][rank][key])
        length = min(param.numel() - int(zero.grad_start_offset[group_idx][rank][key]), size - place)
        if place > end:
            pieces.append(_padding(flat[end:place]))
        of[key] = flat[place : place + length].view(param.shape if length == param.numel() else length)
        pieces.append(of[key])
        end = place + length
    if end < size:
        pieces.append(_padding(flat[end:]))
    sums = GradPartitionBufferGroup(pieces, flat)
    sums.gpt2dist_of = of
    return sums


def _padding(x: Tensor) -> Tensor:
    x._zero_padding = True  # type: ignore[attr-defined]
    return x.zero_()


def _let_go(zero: Any, param: Tensor, group_idx: int | None = None) -> None:
    """A gradient that was added to its fp32 sum is not needed any more; DeepSpeed keeps it to the end of backward."""
    _copy_own(zero, param, group_idx)
    if zero.partition_gradients and not zero.cpu_offload and zero._use_compact_grad_partition_buffer(group_idx):
        zero.clear_grad_attribute(param)


def _sum_alone(zero: Any, param: Tensor, group_idx: int) -> None:
    """Add a gradient to its fp32 sum at once, where no other rank has a part of it; no bucket is in between."""
    if not zero.partition_gradients or zero.cpu_offload or not zero._use_compact_grad_partition_buffer(group_idx):
        _into_bucket(zero, param, group_idx)
        return
    assert param.grad is not None
    total = zero._get_compact_grad_partition_buffer(group_idx).gpt2dist_of[zero.get_param_id(param)]
    _into_sum(total, param.grad, first=zero.micro_step_id == 0)
    param.grad = None


@dataclass
class _Sum:
    """One reduction on its way."""

    transfers: list[Any]
    parts: list[tuple[Tensor, Sequence[Tensor]]]
    """A fp32 sum of this rank's, and each rank's gradient for it."""
    first: bool
    """Whether they are the step's first ones: the sum is not set yet."""

    def finish(self) -> None:
        """Wait for what comes from other ranks, and add it, in order of rank."""
        for transfer in self.transfers:
            transfer.wait()
        for total, (gradient, *others) in self.parts:
            _into_sum(total, gradient, self.first)
            for other in others:
                _add(total, other)


def _sum_at_owners(
    zero: Any,
    slices: Sequence[Tensor],
    _dtype: torch.dtype,
    *,
    bucket_ranks: Sequence[Iterable[int]],
    output_bucket: Sequence[Tensor | None],
    process_group: Any,
    **_: Any,
) -> None:
    """Every rank gets its own slices of the gradients from all the others and sums them in fp32, in order of rank.

    At stage 2 that may be later, up to the end of this backward pass.

    slices: 1-D, in the same order on all ranks; bucket_ranks: who owns each, one rank; output_bucket: where this
    rank sums the slices that it owns over the micro-batches, or None for the slice itself.
    """
    rank, world = dist.get_rank(process_group), dist.get_world_size(process_group)
    if world == 1 and all(output is None for output in output_bucket):
        return  # each slice is its sum
    owners = [next(iter(ranks)) for ranks in bucket_ranks]
    own = [i for i, owner in enumerate(owners) if owner == rank]
    itself = any(output_bucket[i] is None for i in own)
    late = world > 1 and zero.partition_gradients and not zero.cpu_offload and not itself
    sizes = [s.numel() for s in slices]
    if late and sum(sizes) <= zero.reduce_bucket_size:  # they lie in the bucket, which is used again
        slices = torch.split(torch.cat(list(slices)), sizes)
    received: list[Sequence[Tensor]] = []
    transfers = []
    for other in range(world):
        if other == rank:
            received.append([slices[i] for i in own])
            continue
        if theirs := [s for s, owner in zip(slices, owners, strict=True) if owner == other]:
            sent = torch.cat(theirs) if len(theirs) > 1 else theirs[0]
            transfers.append(dist.P2POp(dist.isend, sent, group=process_group, group_peer=other))
        flat = torch.empty(sum(sizes[i] for i in own), dtype=slices[0].dtype, device=slices[0].device)
        if own:
            transfers.append(dist.P2POp(dist.irecv, flat, group=process_group, group_peer=other))
        received.append(torch.split(flat, [sizes[i] for i in own]))
    totals = [torch.empty(sizes[i]) if (output := output_bucket[i]) is None else output for i in own]
    first = itself or not zero.partition_gradients or zero.micro_step_id == 0
    started = dist.batch_isend_irecv(transfers) if transfers else []
    _in_flight(zero).append(_Sum(started, list(zip(totals, zip(*received, strict=True), strict=True)), first))
    _finish(zero, IN_FLIGHT if late else 0)
    if itself:
        for i, total in zip(own, totals, strict=True):
            slices[i].copy_(total)


def _in_flight(zero: Any) -> deque[_Sum]:
    sums: deque[_Sum] = zero.__dict__.setdefault("gpt2dist_in_flight", deque())
    return sums


def _finish(zero: Any, left: int) -> None:
    while len(_in_flight(zero)) > left:
        _in_flight(zero).popleft().finish()


def _finish_sums(zero: Any) -> None:
    """The end of a backward pass."""
    _end_backward(zero)
    _finish(zero, 0)


def _gather(partitioned_param_groups: Sequence[Sequence[Tensor]], dp_process_group: Sequence[Any], **_: Any) -> None:
    """Every rank gets the others' updated weights. gloo's all-gather copies them twice more."""
    sent = [
        dist.broadcast(part, group=group, group_src=owner, async_op=True)
        for parts, group in zip(partitioned_param_groups, dp_process_group, strict=True)
        for owner, part in enumerate(parts)
        if len(parts) > 1
    ]
    for transfer in sent:
        transfer.wait()


def _norm_of_own(zero: Any, gradients: list[Tensor], _params: Any, norm_type: float = 2) -> Tensor:
    """2-norm of the gradients of all ranks' parts; DeepSpeed makes a fp64 copy of each gradient first."""
    assert norm_type == 2
    return _over_ranks(zero, [norm(g) for g in gradients if not getattr(g, "_zero_padding", False)], zero.device)


def _norm_of_offloaded(zero: Any, params: Iterable[Tensor]) -> Tensor:
    """The same where gradients lie in the CPU's memory; DeepSpeed adds up the ranks' squares in fp32."""
    device = zero.temp_grad_buffer_for_gpu_offload.device  # the group may know no other: NCCL's does not
    norms = [zero.norm_for_param_grads[zero.get_param_id(p)].to(device) for p in params]
    return _over_ranks(zero, norms, device).to(zero.device)


def _over_ranks(zero: Any, norms: Sequence[Tensor], device: torch.device) -> Tensor:
    """2-norm of what has these 2-norms, fp64 scalars, on all ranks."""
    total = torch.stack([*norms, torch.zeros((), dtype=torch.float64, device=device)]).square().sum()
    dist.all_reduce(total, group=zero.dp_process_group)
    result = total.sqrt().float()
    return torch.where(result.isfinite(), result, -1.0)  # which DeepSpeed's has there


def _seen_by_norm(zero: Any) -> Tensor:
    """Whether gradients are not finite: then their norm is not, which is looked at next."""
    return torch.zeros(1, dtype=torch.bool, device=zero.device)


def _scale_in_step(zero: Any, _gradients: Any, total_norm: Tensor) -> None:
    """Clip, and take fp16's loss scale back, as the optimizer reads the gradients; DeepSpeed goes over them before."""
    scale = torch.as_tensor(zero.loss_scale, dtype=torch.float32, device=zero.device)
    if zero.clip_grad:
        scale = scale * ((total_norm / scale + 1e-6) / zero.clip_grad).clamp(min=1.0)
    zero.optimizer.grad_scale = scale


def norm(x: Tensor) -> Tensor:
    """2-norm of all elements, summed in fp64: in fp32 it is then the same however the ranks share the model."""
    if x.device.type != "cpu":
        result: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
        return result
    squares, wide = [], torch.empty(1 << 17, dtype=torch.float64)  # fits into a cache
    for part in torch.split(x.flatten(), len(wide)):
        in_fp64 = wide[: len(part)].copy_(part)
        squares.append(in_fp64 @ in_fp64)
    return torch.stack(squares).sum().sqrt()
