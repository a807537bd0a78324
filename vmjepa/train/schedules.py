"""Learning rate, weight decay and EMA momentum as pure functions of the optimizer step.

Resuming therefore needs no scheduler state, and gradient accumulation cannot turn the cosine round early: a step is an
optimizer step, never a micro-batch. Formulas: V-JEPA (Bardes et al., 2024), its public training code's conventions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """V-JEPA's schedules over a run of `epochs` x `ipe` optimizer steps.

    The cosines span `ipe_scale` times the run, so a run ends before their minimum, as V-JEPA does on purpose. Nothing
    stops them after that horizon: the learning rate's cosine rises again, weight decay's comes back down.

    Attributes:
        ipe: optimizer steps per epoch. epochs, warmup: in epochs. ipe_scale: horizon over run length.
        start_lr, lr, final_lr: before warmup, after it, at the horizon.
        weight_decay, final_weight_decay: at the start, at the horizon. ema: momentum at the start and at the horizon.
    """

    ipe: int
    epochs: int
    warmup: float
    ipe_scale: float
    start_lr: float
    lr: float
    final_lr: float
    weight_decay: float
    final_weight_decay: float
    ema: tuple[float, float]

    @property
    def horizon(self) -> int:
        """Optimizer steps over which the cosines fall."""
        return int(self.ipe_scale * self.epochs * self.ipe)

    def lr_at(self, step: int) -> float:
        """Learning rate used in optimizer step `step` (from 0): linear warmup, then a cosine, never below final_lr."""
        done, warm = step + 1, int(self.warmup * self.ipe)
        if done < warm:
            return self.start_lr + done / max(1, warm) * (self.lr - self.start_lr)
        progress = (done - warm) / max(1, self.horizon - warm)
        return max(self.final_lr, _cosine(self.lr, self.final_lr, progress))

    def weight_decay_at(self, step: int) -> float:
        """Weight decay of the decayed groups in optimizer step `step`: a cosine, clamped on the side of its end."""
        value = _cosine(self.weight_decay, self.final_weight_decay, (step + 1) / self.horizon)
        clamp = max if self.final_weight_decay <= self.weight_decay else min
        return clamp(self.final_weight_decay, value)

    def momentum_at(self, step: int) -> float:
        """EMA momentum applied after optimizer step `step`: linear, without warmup, held at its end value."""
        start, end = self.ema
        progress = min(1.0, step / (self.ipe * self.epochs * self.ipe_scale))
        return start + progress * (end - start)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))
