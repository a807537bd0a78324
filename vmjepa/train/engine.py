"""The DeepSpeed engine around the online model: ZeRO 0-3, accumulation, per-module clipping, portable optimizer state.

Clipping. V-JEPA clips the encoder and the predictor separately; DeepSpeed clips all parameters together. So DeepSpeed's
clipping stays off and the averaged gradients, which each rank holds for its own partition, are scaled before the step.
The parameter groups keep the two modules apart, hence a norm per group is a norm per module.

Optimizer state. DeepSpeed's files fit one world size and one ZeRO stage; here the state is gathered under parameter
names instead, so any number of ranks and any stage can resume, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vmjepa.jepa import JEPA
from vmjepa.masks import StepMask
from vmjepa.train.distributed import World, sum_over_ranks

MODULES = ("encoder", "predictor")
_MOMENTS = ("exp_avg", "exp_avg_sq")
# keeps fp32 parameters; DeepSpeed's "bf16" would round A_log and D too
_AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


@dataclass(frozen=True)
class EngineSettings:
    """What DeepSpeed needs to know. batch_size is per rank and micro-batch."""

    batch_size: int
    accumulation: int
    zero_stage: int
    betas: tuple[float, float]
    eps: float
    bfloat16: bool = False


def parameter_groups(model: nn.Module, decays: Callable[[str, nn.Parameter], bool]) -> list[dict[str, Any]]:
    """AdamW groups: per module, decayed and not. Each carries `module` and `decayed`; empty groups are left out."""
    groups = []
    for module in MODULES:
        named = [(n, p) for n, p in getattr(model, module).named_parameters() if p.requires_grad]
        for decayed in (True, False):
            params = [p for n, p in named if decays(n, p) == decayed]
            if params:
                groups.append({"params": params, "module": module, "decayed": decayed, "weight_decay": 0.0})
    return groups


class Engine:
    """Forward, backward, clip and step of the online model on every rank.

    Args:
        model: with its starting weights already loaded; ZeRO partitions it in place.
        decays: says by name and parameter whether weight decay applies.
        optimizer_state: {"step": int, "exp_avg": {name: tensor}, "exp_avg_sq": {…}} to resume from, or None.
    """

    def __init__(
        self,
        model: JEPA,
        settings: EngineSettings,
        world: World,
        decays: Callable[[str, nn.Parameter], bool],
        optimizer_state: dict[str, Any] | None = None,
    ):
        import deepspeed

        self.settings, self.world = settings, world
        self._shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        model.to(world.device)
        groups = parameter_groups(model, decays)
        self._group_modules = [group["module"] for group in groups]
        base = torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=base, config=self._config(), dist_init_required=False
        )
        self._base = base if settings.zero_stage == 0 else self._optimizer.optimizer
        self.model: JEPA = self._engine.module
        self._create_moments(step=optimizer_state["step"] if optimizer_state else 0)
        if optimizer_state:
            self._restore(optimizer_state)

    def _config(self) -> dict[str, Any]:
        settings = self.settings
        zero: dict[str, Any] = {"stage": settings.zero_stage}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": settings.batch_size,
            "gradient_accumulation_steps": settings.accumulation,
            "train_batch_size": settings.batch_size * settings.accumulation * self.world.size,
            "zero_optimization": zero,
            "steps_per_print": 2**62,
        }
        return config | (_AUTOCAST if settings.bfloat16 else {})

    def micro_step(self, clips: Tensor, masks: Sequence[StepMask], features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Forward and backward of one micro-batch.

        Returns:
            this rank's share of the global batch's loss (detached), and the predictions per mask.
        """
        loss, share, predictions = self._engine(clips, masks, features)
        # DeepSpeed averages over ranks and micro-batches; a share is already divided by the global count
        self._engine.backward(loss * (self.world.size * self.settings.accumulation))
        return share, predictions

    @torch.no_grad()
    def clip(self, limits: dict[str, float | None]) -> Tensor:
        """Scales down the gradients of a module above its limit; norms before that, (2,) in the order of MODULES.

        Call once per optimizer step, after the last micro-batch. The factor is limit / (norm + 1e-6).
        """
        gradients = {module: list(self._gradients(module)) for module in MODULES}
        squares = torch.stack(
            [
                torch.stack(torch._foreach_norm(tensors)).square().sum()
                if tensors
                else torch.zeros((), device=self.world.device)
                for tensors in gradients.values()
            ]
        )
        if self.settings.zero_stage > 0:
            sum_over_ranks(squares)
        norms = squares.sqrt()
        for norm, (module, tensors) in zip(norms, gradients.items(), strict=True):
            limit = limits.get(module)
            if limit is not None and tensors:
                torch._foreach_mul_(tensors, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norms

    def step(self, lr: float, weight_decay: float) -> None:
        """One AdamW step on all ranks, then gradients are cleared."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decayed"] else 0.0
        self._engine.step()

    def advance(self) -> None:
        """Ends a micro-batch that is not the last of its step (DeepSpeed counts micro-batches in `step`)."""
        self._engine.step()

    def _gradients(self, module: str) -> Iterable[Tensor]:
        """The averaged gradients of a module that this rank holds: whole ones at stage 0, partitions above."""
        stage = self.settings.zero_stage
        if stage == 0:
            yield from (p.grad for p in getattr(self.model, module).parameters() if p.grad is not None)
            return
        groups = self._optimizer.sub_group_to_group_id if stage == 3 else None
        for index, tensors in self._optimizer.averaged_gradients.items():
            if tensors is not None and self._group_modules[groups[index] if groups else index] == module:
                yield from tensors

    def model_state(self) -> dict[str, Tensor]:
        """Whole weights and buffers of encoder and predictor on the CPU. All ranks must call it together."""
        if self.settings.zero_stage < 3:
            return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}

    def optimizer_state(self) -> dict[str, Any]:
        """AdamW's moments as whole tensors under parameter names, on the CPU. All ranks must call it together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        moments: dict[str, dict[str, Tensor]] = {key: {} for key in _MOMENTS}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            for key in _MOMENTS:
                if self.settings.zero_stage == 0:
                    value = self._base.state[parameter][key]
                else:
                    value = safe_get_full_optimizer_state(parameter, key)
                moments[key][name] = value.detach().reshape(self._shapes[name]).cpu()
        return {"step": self._steps_taken(), **moments}

    def _steps_taken(self) -> int:
        return int(max(float(state["step"]) for state in self._base.state.values()))

    def _create_moments(self, step: int) -> None:
        """Creates AdamW's state up front, as its first step would.

        DeepSpeed links parameters to their moments once, when the first group has stepped; moments of later groups that
        do not exist by then could never be read or restored.
        """
        if self.settings.zero_stage == 0:
            masters = [p for group in self._base.param_groups for p in group["params"]]
        elif self.settings.zero_stage == 3:
            masters = self._optimizer.fp32_partitioned_groups_flat
        else:
            masters = self._optimizer.single_partition_of_fp32_groups
        for master in masters:
            self._base.state[master] = {"step": torch.tensor(float(step))}
            self._base.state[master].update({key: torch.zeros_like(master) for key in _MOMENTS})
        if self.settings.zero_stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _restore(self, state: dict[str, Any]) -> None:
        """Puts gathered moments into this stage's partitions."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                for key in _MOMENTS:
                    self._set_moment(parameter, key, state[key][name].to(self.world.device))

    def _set_moment(self, parameter: Any, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.settings.zero_stage == 0:
            self._base.state[parameter][key].copy_(value)
        elif self.settings.zero_stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
        else:  # partitions are padded to equal sizes, whole tensors are not
            size = parameter.ds_tensor.numel()
            padded = torch.zeros(size * self.world.size, device=value.device)
            padded[: value.numel()] = value.flatten()
            safe_set_local_optimizer_state(parameter, padded[self.world.rank * size :][:size], key)


def partition_target(bfloat16: bool) -> Callable[[nn.Module], Any]:
    """Makes the target encoder a ZeRO-3 engine of its own, without optimizer (see vmjepa.train.ema).

    DeepSpeed's forward switches an autocast around it off, so bfloat16 has to be its own setting too.
    """

    def partition(module: nn.Module) -> Any:
        import deepspeed

        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "steps_per_print": 2**62,
        } | (_AUTOCAST if bfloat16 else {})
        return deepspeed.initialize(model=module, config=config, dist_init_required=False)[0]

    return partition
