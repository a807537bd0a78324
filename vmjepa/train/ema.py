"""The target encoder: an exponential moving average of the online encoder, kept in fp32.

Under ZeRO 0-2 every rank holds whole parameters and averages them in place. Under ZeRO 3 both encoders are partitioned
alike, so each rank averages its own partitions without gathering; the target is then its own DeepSpeed engine without
optimizer, with no parameter kept whole (persistence threshold 0), else its small parameters would be updated too late.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vmjepa.jepa import target_features


class TargetEncoder:
    """Holds the target, computes features with it, moves it towards the online encoder.

    Args:
        encoder: the online encoder, before DeepSpeed partitions it; its copy becomes the target.
        state: weights to start from instead (a resumed run).
        partition: None, or a function that turns the module into a ZeRO-3 engine.
        autocast_dtype: None, or torch.bfloat16.
    """

    def __init__(
        self,
        encoder: nn.Module,
        device: torch.device,
        state: dict[str, Tensor] | None = None,
        partition: Any = None,
        autocast_dtype: torch.dtype | None = None,
    ):
        self.module = copy.deepcopy(encoder)
        if state is not None:
            self.module.load_state_dict(state)
        self.module.requires_grad_(False).eval().to(device)
        self._engine = partition(self.module) if partition else None
        self._device, self._autocast_dtype = device, autocast_dtype

    def features(self, clips: Tensor) -> Tensor:
        """Layer-normalised target features of all tokens, fp32 (B, N, D)."""
        with self._autocast():
            return target_features(self._engine or self.module, clips)

    @torch.no_grad()
    def update(self, online: nn.Module, momentum: float) -> None:
        """target <- momentum * target + (1 - momentum) * online, over every parameter."""
        source = dict(online.named_parameters())
        targets, sources = [], []
        for name, target in self.module.named_parameters():
            partitioned = self._engine is not None
            targets.append(getattr(target, "ds_tensor") if partitioned else target)  # noqa: B009 - DeepSpeed adds it
            sources.append(getattr(source[name], "ds_tensor") if partitioned else source[name].detach())  # noqa: B009
        torch._foreach_lerp_(targets, sources, 1.0 - momentum)

    def state_dict(self) -> dict[str, Tensor]:
        """Whole weights and buffers on the CPU. Under ZeRO 3 all ranks must call it together."""
        if self._engine is None:
            return {name: value.detach().cpu() for name, value in self.module.state_dict().items()}
        import deepspeed

        parameters = list(self.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}

    def _autocast(self) -> AbstractContextManager:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, self._autocast_dtype)
