"""The engine: one model under DeepSpeed ZeRO, seen as forward_backward, step, and fp32 fragments.

With zero.py this is the only module that imports deepspeed, and that knows its internals (pinned in
constraints.txt; tests/distributed fails when an upgrade moves them).

Why not `engine.save_checkpoint`: its files are pickles and bind the run to its world size and stage. A
*fragment* is what ZeRO really gives a rank: a contiguous piece of one flattened parameter, as fp32 master
weight, exp_avg, exp_avg_sq or ema. Saving and loading fragments works for every stage and world size.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import filelock
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils import cpp_extension

from gpt2dist.config import RunConfig
from gpt2dist.data.order import accumulation_steps
from gpt2dist.model import gpt2
from gpt2dist.model.attention import use_units
from gpt2dist.train.fragment import EMA, KINDS, Fragment, is_muon_matrix, sums_at_owners
from gpt2dist.train.optim import MuonAdamW, adamw, ema_decay
from gpt2dist.train.peak import DTYPES, MemoryPeak
from gpt2dist.train.zero import ALIGNMENT, norm, replace_parts

log = logging.getLogger(__name__)


SMALL_BUCKET = 1 << 16
"""Elements; larger gradients are not copied into a bucket. For ranks on one machine a message costs next to nothing."""


@dataclass(frozen=True)
class StepResult:
    """What the optimizer step reports."""

    grad_norm: float
    """2-norm of the global gradient before clipping; inf or nan where the step was skipped."""
    applied: bool
    """False where the gradients were not finite: weights, moments and Adam's step count are what they were."""
    rescaled: bool = False
    """Not applied, but the fp16 loss scale was not at its minimum: it may have been too large."""


class _CastForward(nn.Module):
    """Runs a fp32 module in bf16 by casting its parameters in every forward.

    Stage 0 in bf16 goes this way: DeepSpeed's own wrapper for it takes a hidden optimizer step at start-up
    and follows another loss curve than stages 1-3 do. Gradients flow back through the cast into fp32.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        cast = {name: p.to(self.dtype) for name, p in self.module.named_parameters()}
        cast["head.weight"] = cast["wte.weight"]
        out: Tensor = torch.func.functional_call(self.module, cast, (tokens,), tie_weights=False)
        return out


class Engine:
    """A GPT-2, its optimizer and its place among the ranks. torch.distributed must be initialized."""

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = device
        self.stage = run.train.zero_stage
        self.optim = run.optim
        self.clip = run.optim.grad_clip
        self.muon = run.optim.name == "muon"
        self.model_config = gpt2.GPT2Config.from_run(run)
        shapes = gpt2.parameter_shapes(self.model_config)
        importlib.import_module("torch._dynamo")  # which torch's optimizers do; it is not the engine's memory
        self.memory = MemoryPeak(device)
        self.control = dist.new_group(backend="gloo")  # small CPU collectives, whatever the backend is
        self.begin_step(run.batch.micro_batches)

        if device.type == "cpu":
            _build_cpu_collectives()
            # DeepSpeed refuses fp16 on CPUs that have no units for it; torch computes it on all.
            get_accelerator().is_fp16_supported = lambda: True
        else:
            os.environ["LOCAL_RANK"] = str(device.index or 0)  # which DeepSpeed takes for the number of the device
            if run.train.deterministic:
                _be_deterministic()
        deepspeed.init_distributed(dist_init_required=False)
        replace_parts(device, self.world_size)
        config = _deepspeed_config(run, self.world_size, self.gas, device)
        working = DTYPES[run.train.precision]
        use_units(working, device, run.model.dropout)
        cast = self.stage == 0 and working != torch.float32
        model = _zero_model(self.model_config, torch.float32 if cast else working, device, config)
        self._names = {id(p): name for name, p in model.named_parameters()}
        if run.train.compile:
            for block in model.h:
                _compile(block, self.stage)
            model.head.compiled = True
        self.ds: Any = deepspeed.initialize(
            model=_CastForward(model, working) if cast else model,
            optimizer=MuonAdamW(model, run.optim) if self.muon else adamw(model, run.optim),
            config=config,
            dist_init_required=False,
        )[0]
        self._zero: Any = self.ds.optimizer
        scaler = self._loss_scaler()
        if scaler is not None:
            scaler.raise_error_at_min_scale = False  # when to give up is the trainer's decision
        self._create_optimizer_state()
        self.set_weights(lambda name: gpt2.initial_value(name, shapes[name], self.model_config, run.seed))

    # ------------------------------------------------------------------ training

    def begin_step(self, micro_batches: int) -> None:
        """From the next step on, a step is the mean over this many micro-batches; until then, over the run's M.

        `gas` is then how many of them each rank runs, padding included.
        """
        self.gas = accumulation_steps(micro_batches, self.world_size)
        self._weight = (self.world_size if self.stage == 3 else 1) / micro_batches  # stage 3 averages over the ranks
        self._done = 0  # micro-batches of this step that this rank has run

    def forward_backward(self, tokens: Tensor, *, padding: bool, spoilt: bool = False) -> Tensor:
        """Mean loss of one micro-batch, its gradient accumulated, which is NaN where it is `spoilt`.

        tokens: int64 [micro, T+1]; result: fp32 scalar, detached, without gradient scaling. A padding
        micro-batch weighs nothing: it keeps the ranks' collectives in step where M does not divide.
        """
        self._done += 1
        self.ds.set_gradient_accumulation_boundary(self._done == self.gas)
        loss: Tensor = self.ds(tokens)
        weight = math.nan if spoilt else 0.0 if padding else self._weight
        self.ds.backward(loss * weight, scale_wrt_gas=False)
        return loss.detach().float()

    def step(self, lr: float) -> StepResult:
        """Clip, update the weights, clear the gradients. Call after the last micro-batch of a step."""
        self._done = 0
        for group in self._zero.param_groups:
            group["lr"] = lr
        # At stage 0 DeepSpeed reports no norm, and would skip nothing.
        result = self._step_replicated() if self.stage == 0 else self._step_sharded()
        if result.applied and self.optim.ema_decay:
            self._update_ema()
        return result

    def _step_sharded(self) -> StepResult:
        scaler = self._loss_scaler()
        can_fall = scaler is not None and scaler.cur_scale > scaler.min_scale
        self.ds.step()
        applied = bool(self.ds.was_step_applied())
        return StepResult(float(self.ds.get_global_grad_norm()), applied, rescaled=not applied and can_fall)

    def _step_replicated(self) -> StepResult:
        parameters = [p for p in self.ds.module.parameters() if p.grad is not None]
        total = torch.linalg.vector_norm(torch.stack([norm(p.grad) for p in parameters]))
        applied = bool(torch.isfinite(total))
        if not applied:
            for p in parameters:
                p.grad = None
        elif self.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, total.float())
        self.ds.step()
        return StepResult(float(total), applied)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor) -> Tensor:
        """Mean loss of one micro-batch, dropout off; a collective at stage 3. tokens: int64 [micro, T+1]."""
        self.ds.eval()
        loss: Tensor = self.ds(tokens)
        self.ds.train()
        return loss.float()

    # ------------------------------------------------------------------ state

    def fragments(self, *, owned: bool) -> Iterator[Fragment]:
        """The fp32 state that this rank holds, as views.

        After writing to them, call `state_changed`.

        With `owned`, every element of the model is in exactly one rank's fragments (what to save); without,
        all that this rank needs to hold (what to load). They differ at stage 0 only, where all hold all.
        """
        if self.stage == 0:
            yield from self._replicated(owned)
        elif self.stage == 3:
            yield from self._partitioned()
        else:
            yield from self._flat()

    def scalars(self) -> dict[str, float]:
        """State beside the fragments: Adam's step count and, in fp16, the loss scale."""
        result = {"optimizer_steps": self._optimizer_steps()}
        scaler = self._loss_scaler()
        if scaler is not None:
            result |= {f"loss_scale.{key}": float(getattr(scaler, key)) for key in _SCALER_STATE}
        return result

    def load_scalars(self, values: dict[str, float]) -> None:
        """Take over what `scalars` returned."""
        for state in self._optimizer_states():
            if "step" in state:  # Muon counts none
                state["step"].fill_(values["optimizer_steps"])
        scaler = self._loss_scaler()
        if scaler is not None and "loss_scale.cur_scale" in values:
            for key, kind in _SCALER_STATE.items():
                setattr(scaler, key, kind(values[f"loss_scale.{key}"]))

    @torch.no_grad()
    def set_weights(self, value: Callable[[str], Tensor]) -> None:
        """Set every parameter to `value(name)`, fp32 of its shape; never more than one whole parameter is held."""
        weights = (f for f in self.fragments(owned=False) if f.kind == "weight")
        for name, pieces in itertools.groupby(weights, lambda f: f.parameter):
            whole = value(name).flatten()
            for f in pieces:
                f.tensor.copy_(whole[f.start : f.start + f.tensor.numel()])
        self.start_ema()
        self.state_changed()

    @torch.no_grad()
    def start_ema(self) -> None:
        """Begin the moving average, if there is one, with the weights as they are."""
        if self.optim.ema_decay:
            for master, state in zip(self._masters(), self._optimizer_states(), strict=True):
                state[EMA].copy_(master)

    @torch.no_grad()
    def state_changed(self) -> None:
        """Recompute the working weights after fragments were written; a collective."""
        zero = self._zero
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            for flat16, flat32, params in zip(
                zero.fp16_partitioned_groups_flat,
                zero.fp32_partitioned_groups_flat,
                zero.fp16_partitioned_groups,
                strict=True,
            ):
                flat16.data.copy_(flat32.data)  # in fp32 they are one tensor
                for p, view in zip(params, zero.unflatten(flat16, params), strict=True):
                    p.data = view.data
            if zero.persistent_parameters:  # small ones are kept whole on every rank
                persistent = zero.persistent_parameters
                persistent[0].partition(persistent, has_been_updated=False)
                persistent[0].all_gather(persistent)

    # ------------------------------------------------------------------ between ranks

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Element-wise sum in fp64. Exact where all but one rank contribute 0."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return list(tensor.tolist())

    def gather_objects(self, item: Any) -> list[Any]:
        """Every rank's `item`, in order of rank."""
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.control)
        return items

    def close(self) -> None:
        """Take DeepSpeed down in order; without it a finished process now and then dies at exit."""
        self.ds.destroy()

    # ------------------------------------------------------------------ DeepSpeed's internals

    def _optimizer_states(self) -> Iterator[dict[str, Tensor]]:
        state = self._torch_optimizer().state
        for master in self._masters():
            yield state[master]

    def _optimizer_steps(self) -> float:
        return next(float(state["step"]) for state in self._optimizer_states() if "step" in state)

    def _update_ema(self) -> None:
        update = get_ema_multi_avg_fn(ema_decay(self.optim, int(self._optimizer_steps())))  # type: ignore[no-untyped-call]
        update([state[EMA] for state in self._optimizer_states()], [m.detach() for m in self._masters()], None)

    def _masters(self) -> list[Tensor]:
        """The fp32 tensors that the torch optimizer steps on this rank."""
        if self.stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return [p for group in self._torch_optimizer().param_groups for p in group["params"]]

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self._zero if self.stage == 0 else self._zero.optimizer
        return optimizer

    def _loss_scaler(self) -> Any:
        scaler = getattr(self._zero, "loss_scaler", None)
        return scaler if scaler is not None and getattr(scaler, "dynamic", False) else None

    def _create_optimizer_state(self) -> None:
        """AdamW makes its state in its first step; a checkpoint has to be loaded before that."""
        if self.stage == 3:  # in fp32 one tensor is enough; DeepSpeed means to see that, but compares device and name
            for low, master in zip(self._zero.fp16_partitioned_groups_flat, self._masters(), strict=True):
                if low.dtype == master.dtype and low.device == master.device:
                    master.data = low.data
        state = self._torch_optimizer().state
        for p in self._masters():
            if self.muon and is_muon_matrix(self._names[id(p)], p.ndim):
                state[p] = {"momentum_buffer": torch.zeros_like(p.detach())}
            elif "exp_avg" not in state[p]:
                state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p.detach()),
                    "exp_avg_sq": torch.zeros_like(p.detach()),
                }
            else:  # stage 3 has made it with an empty step
                state[p]["step"].zero_()
            if self.optim.ema_decay:
                state[p][EMA] = torch.zeros_like(p.detach())

    def _kinds(self, master: Tensor) -> Iterator[tuple[str, Tensor]]:
        state = self._torch_optimizer().state[master]
        yield "weight", master.detach()
        if "momentum_buffer" in state:
            yield "exp_avg", state["momentum_buffer"]
        yield from ((kind, state[kind]) for kind in (*KINDS[1:], EMA) if kind in state)

    def _replicated(self, owned: bool) -> Iterator[Fragment]:
        for group in self._torch_optimizer().param_groups:
            for p in group["params"]:
                share = -(-p.numel() // self.world_size)
                start = min(self.rank * share, p.numel()) if owned else 0
                length = min(share, p.numel() - start) if owned else p.numel()
                if length:
                    for kind, tensor in self._kinds(p):
                        view = tensor.view(-1).narrow(0, start, length)
                        yield Fragment(self._names[id(p)], kind, start, view)

    def _flat(self) -> Iterator[Fragment]:
        """Stages 1 and 2: each group is one flat fp32 tensor, this rank holding a slice of it."""
        zero = self._zero
        for params, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            for p in params:
                mapping = p._hp_mapping
                if mapping is None:  # not in this rank's slice
                    continue
                source, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                for kind, tensor in self._kinds(flat):
                    view = tensor.narrow(0, place.start, place.numel)
                    yield Fragment(self._names[id(p)], kind, source.start, view)

    def _partitioned(self) -> Iterator[Fragment]:
        """Stage 3: every parameter is cut into equal pieces, one a rank, the last ones padded."""
        zero = self._zero
        for params, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for p in params:
                piece = p.partition_numel()
                start = self.rank * piece
                length = max(0, min(piece, p.ds_numel - start))
                if length:
                    for kind, tensor in self._kinds(flat):
                        yield Fragment(self._names[id(p)], kind, start, tensor.narrow(0, offset, length))
                offset += piece


def _zero_model(
    config: gpt2.GPT2Config, dtype: torch.dtype, device: torch.device, ds_config: dict[str, Any]
) -> gpt2.GPT2:
    """The model with parameters of zeros; at stage 3 each is cut into the ranks' pieces before the next is made.

    So no rank holds the weights in fp32 beside those that DeepSpeed needs, nor at stage 3 the whole model.
    """
    with torch.device("meta"):
        model = gpt2.GPT2(config)
    partition = ds_config["zero_optimization"]["stage"] == 3
    zero = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=ds_config) if partition else None
    made: dict[int, nn.Parameter] = {}
    for p in model.parameters():
        made[id(p)] = nn.Parameter(torch.zeros(p.shape, dtype=dtype, device=device))
        if zero is not None:
            zero._convert_to_zero_parameters([made[id(p)]])
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            module._parameters[name] = made[id(p)]
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(device)
    return model


def _compile(block: nn.Module, stage: int) -> None:
    """In place: names and structure stay.

    At stage 3 DeepSpeed's hooks gather a block's weights as a whole, and the compiler does not see them: between the
    hooks of every layer there is nothing for it to fuse.
    """
    if stage == 3:
        deepspeed.utils.set_z3_leaf_module(block, True)
        block.forward = torch.compile(block.forward)
    else:
        block.compile()


_SCALER_STATE = {"cur_scale": float, "cur_iter": int, "last_overflow_iter": int, "cur_hysteresis": int}


def _be_deterministic() -> None:
    """From now on CUDA adds in the same order in every run, as the CPU does."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # compiled kernels are not chosen by how fast they were
    torch.use_deterministic_algorithms(True)
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False  # it only finds mistakes


def _build_cpu_collectives() -> None:
    """Compile DeepSpeed's shared-memory collectives, once a machine; without a compiler go on with gloo's own."""
    name = "deepspeed_shm_comm"
    directory = Path(cpp_extension._get_build_directory(name, verbose=False))
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja lies there
    with filelock.FileLock(f"{directory}.lock"):
        # torch's own lock file outlives a killed process, and everybody would wait for it for ever.
        (directory / "lock").unlink(missing_ok=True)
        try:
            get_accelerator().create_op_builder("ShareMemCommBuilder").load()
        except Exception as e:
            log.warning("no shared-memory collectives (%s); gloo does it, slower", e)
            deepspeed.ops.__compatible_ops__[name] = False


def _deepspeed_config(run: RunConfig, world_size: int, gas: int, device: torch.device) -> dict[str, Any]:
    """Our typed config in DeepSpeed's words. Gradients are summed in fp32, over micro-batches and over ranks."""
    t, stage, micro = run.train, run.train.zero_stage, run.batch.micro_sequences
    at_owners = stage == 2 and sums_at_owners(device.type, world_size)
    as_they_are = world_size == 1 or at_owners
    most = gpt2.count_parameters(gpt2.GPT2Config.from_run(run), published=False)  # it is allocated whole
    bucket = SMALL_BUCKET if at_owners else min(most, round(t.bucket_mb * 1e6 / 4))
    offload = {"device": "cpu", "pin_memory": run.cluster.gpus_per_worker > 0}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": gas,
        "train_batch_size": micro * gas * world_size,
        "bf16": {"enabled": t.precision == "bf16" and stage > 0},
        "fp16": {"enabled": t.precision == "fp16", "initial_scale_power": t.initial_loss_scale.bit_length() - 1},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": t.overlap_comm and world_size > 1,  # it ends every backward pass by waiting for the device
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": 2 * bucket // ALIGNMENT * ALIGNMENT + ALIGNMENT,  # must be a multiple
            "stage3_prefetch_bucket_size": bucket,
            **({"offload_optimizer": offload} if t.offload_optimizer else {}),
            **({"offload_param": offload} if t.offload_param else {}),
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",  # stage 3 has no sum
        "gradient_clipping": run.optim.grad_clip if stage > 0 else 0.0,
        # At stages 2 and 3 what travels is one micro-batch's gradients, at 0 and 1 their fp32 sums.
        "communication_data_type": t.precision if stage >= 2 and as_they_are else "fp32",
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device before each micro-batch
        "wall_clock_breakdown": False,
    }
