"""What a training run reports: health signals of the representation, and where they are written.

Metrics go to metrics.jsonl (one object per logged optimizer step) and TensorBoard, the optimizer step on the x axis.
"""

from __future__ import annotations

import json
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmjepa.masks import StepMask
from vmjepa.run_dir import RunDir, write_atomic
from vmjepa.train.distributed import sum_over_ranks

_RANK_TOKENS = 8192
_SECTIONS = {"loss": "loss", "lr": "schedule", "weight_decay": "schedule", "momentum": "schedule", "epoch": "schedule"}
_SECTIONS |= dict.fromkeys(("clips_per_s", "step_seconds", "data_wait", "memory_gib", "replaced_clips"), "speed")


def rank_me(tokens: Tensor) -> float:
    """RankMe (Garrido et al., 2023): exp of the entropy of the normalised singular values, between 1 and D.

    Args:
        tokens: (..., D) features, of any leading shape.
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).double()
    values = torch.linalg.eigvalsh(flat.T @ flat).clamp(min=0).sqrt()
    share = values / values.sum().clamp(min=1e-12)
    return float(torch.exp(-(share * torch.log(share + 1e-12)).sum()))


def target_ranks(features: Tensor) -> dict[str, float]:
    """RankMe of target features (B, N, D), raw and with each position's mean over the batch removed.

    The second falling is the earliest sign of a collapse onto positions. At most 8192 tokens are used.
    """
    features = features[: max(2, _RANK_TOKENS // features.shape[1])]
    ranks = {"rank": rank_me(features)}
    if len(features) > 1:  # a clip alone is its own mean
        ranks["rank_content"] = rank_me(features - features.mean(dim=0, keepdim=True))
    return ranks


class TokenSpread:
    """Variance of features over clips and tokens, averaged over dimensions, exact over micro-batches and ranks."""

    def __init__(self, dim: int, device: torch.device):
        self._sums = torch.zeros(2, dim, device=device, dtype=torch.float64)
        self._count = torch.zeros((), device=device, dtype=torch.float64)

    def add(self, tokens: Tensor, mask: StepMask | None = None) -> None:
        """Adds tokens (B, K, D); with a mask, only its real target tokens."""
        real = None if mask is None else mask.target.real()
        rows = tokens.flatten(0, 1) if real is None else tokens[real]
        rows = rows.double()
        self._sums += torch.stack([rows.sum(dim=0), rows.square().sum(dim=0)])
        self._count += rows.shape[0]

    def variance(self) -> Tensor:
        """Mean over dimensions of the variance; all ranks must call it together."""
        first, second = sum_over_ranks(self._sums) / sum_over_ranks(self._count)
        return (second - first**2).mean()


class MetricsWriter:
    """Writes on rank 0; on other ranks `active` is False and nothing is written.

    A resumed run drops the lines of steps it will do again, so metrics.jsonl holds every step once.
    """

    def __init__(self, run: RunDir, active: bool, tensorboard: bool, first_step: int):
        self.active, self._run = active, run
        self._board: Any = None
        if not active:
            return
        keep_steps_before(run.metrics, first_step)
        self._file = open(run.metrics, "a", buffering=1)  # noqa: SIM115 - held open for the run
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run.tensorboard), purge_step=first_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one step's values. step: optimizer steps done."""
        if not self.active:
            return
        self._file.write(json.dumps({"step": step} | values) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{_SECTIONS.get(name, 'health')}/{name}", value, step)

    def close(self) -> None:
        """Flushes everything."""
        if self.active:
            self._file.close()
        if self._board is not None:
            self._board.close()


def keep_steps_before(path: Path, first_step: int) -> None:
    """Drops lines of metrics.jsonl for steps after `first_step`, and a half line that a kill left."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= first_step:
                kept.append(line + "\n")
    write_atomic(path, "".join(kept))


def memory_gib(device: torch.device) -> float:
    """Highest memory use so far: of the GPU's allocator, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
