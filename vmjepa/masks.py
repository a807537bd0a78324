"""Multi-block 3-D masks: which tokens of a clip the encoder sees (context) and the predictor must predict (target).

After V-JEPA (Bardes et al., 2024), with its defects left out: masks are a pure function of (seed, step, mask number),
drawn for the whole global batch at once, so every rank count sees the same masks and a resumed run continues with them.

Sizes: a grid is (t, h, w) tokens, raster order is time, then row, then column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from vmjepa.errors import ConfigError

Grid = tuple[int, int, int]
_REDRAWS = 100


@dataclass(frozen=True)
class TokenSet:
    """Tokens chosen per clip, as ascending raster indices (time, then row, then column).

    index: LongTensor (B, K). lengths: LongTensor (B,), or None where all K are real. Row b holds lengths[b] real
    indices first; the padded slots after them hold index 0.
    """

    index: torch.Tensor
    lengths: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> TokenSet:
        """The same set on another device."""
        lengths = None if self.lengths is None else self.lengths.to(device)
        return TokenSet(self.index.to(device), lengths)

    def real(self) -> torch.Tensor | None:
        """Bool (B, K), True at real tokens; None where no slot is padded."""
        if self.lengths is None:
            return None
        slots = torch.arange(self.index.shape[1], device=self.index.device)
        return slots < self.lengths[:, None]


class MaskSpec(Protocol):
    """One entry of the config's `mask` list."""

    aspect_ratio: tuple[float, float]
    num_blocks: int
    spatial_scale: tuple[float, float]
    temporal_scale: tuple[float, float]
    max_temporal_keep: float
    max_keep: int | None


def block_size(spec: MaskSpec, grid: Grid, draws: np.ndarray) -> Grid:
    """Size (t, h, w) in tokens of the blocks of one batch.

    Args:
        draws: three uniform numbers in [0, 1): temporal scale, spatial scale, aspect ratio.
    """

    def between(bounds: tuple[float, float], draw: float) -> float:
        low, high = bounds
        return low + draw * (high - low)

    t, h, w = grid
    time = max(1, int(t * between(spec.temporal_scale, float(draws[0]))))
    area = int(h * w * between(spec.spatial_scale, float(draws[1])))
    ratio = between(spec.aspect_ratio, float(draws[2]))
    rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return time, min(h, max(1, rows)), min(w, max(1, columns))  # at least one token, or there is nothing to predict


def target_cells(spec: MaskSpec, grid: Grid, size: Grid, corners: np.ndarray) -> np.ndarray:
    """Union of blocks, plus the time steps no context may see.

    Args:
        corners: int (samples, blocks, 3), the blocks' first (time, row, column).

    Returns:
        bool (samples, tokens), True at target tokens.
    """
    axes = [np.arange(extent) for extent in grid]
    inside = [
        (axis >= corners[..., i, None]) & (axis < corners[..., i, None] + size[i]) for i, axis in enumerate(axes)
    ]  # each (samples, blocks, extent)
    blocks = inside[0][..., :, None, None] & inside[1][..., None, :, None] & inside[2][..., None, None, :]
    cells = np.asarray(blocks.any(axis=1))
    if spec.max_temporal_keep < 1.0:
        cells[:, max(1, int(grid[0] * spec.max_temporal_keep)) :] = True
    return cells.reshape(len(corners), -1)


def draw_targets(spec: MaskSpec, grid: Grid, samples: int, seed: int, step: int, number: int) -> np.ndarray:
    """Target cells of a global batch: bool (samples, tokens), a pure function of (seed, step, number).

    Raises:
        ConfigError: when after many redraws a clip still has no context token left: the blocks cover the grid.
    """
    rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, number, step]))
    size = block_size(spec, grid, rng.random(3))
    room = np.array([extent - block + 1 for extent, block in zip(grid, size, strict=True)])
    cells: np.ndarray = np.full((samples, math.prod(grid)), True)
    for _ in range(_REDRAWS):
        empty = cells.all(axis=1)
        if not empty.any():
            return cells
        corners = (rng.random((samples, spec.num_blocks, 3)) * room).astype(np.int64)
        cells[empty] = target_cells(spec, grid, size, corners[empty])
    raise ConfigError(
        f"mask.{number}: {spec.num_blocks} blocks of {size[0]}x{size[1]}x{size[2]} tokens cover the whole "
        f"{grid[0]}x{grid[1]}x{grid[2]} grid, so no context is left; lower spatial_scale, temporal_scale or num_blocks"
    )


@dataclass(frozen=True)
class StepMask:
    """One mask of one micro-batch: what the encoder sees, what the predictor predicts.

    target_total and clip_total are the numbers of target tokens and clips in the *global* batch, by which the loss is
    normalised, so that it is the same at any rank count and accumulation.
    """

    context: TokenSet
    target: TokenSet
    target_total: int
    clip_total: int


@dataclass(frozen=True)
class GlobalMask:
    """One mask drawn for a global batch, cut to what `truncate` keeps: bool (samples, tokens) each."""

    context: np.ndarray
    target: np.ndarray

    def rows(self, rows: np.ndarray, device: torch.device | str = "cpu", clips: int = 1) -> StepMask:
        """The part of one micro-batch.

        Args:
            rows: int (b,), positions in the global batch, repeated when a video gives several clips.
            clips: clips per video; all of them share their video's mask.
        """
        context, target = token_set(self.context[rows]), token_set(self.target[rows])
        totals = int(self.target.sum()) * clips, len(self.target) * clips
        return StepMask(context.to(device), target.to(device), *totals)


def draw_mask(spec: MaskSpec, grid: Grid, samples: int, seed: int, step: int, number: int, truncate: str) -> GlobalMask:
    """Mask `number` of a step, for the whole global batch.

    Args:
        truncate: "prefix" cuts every list to the batch's shortest, keeping the first indices (V-JEPA's collator; it
            loses the end of the clip), "random" drops surplus tokens uniformly, "none" keeps all (padded later).
    """
    target = draw_targets(spec, grid, samples, seed, step, number)
    context = ~target
    if truncate == "none" and spec.max_keep is None:
        return GlobalMask(context, target)
    rng = np.random.Generator(np.random.Philox(key=seed, counter=[1, 0, number, step]))
    keep_context = int(context.sum(axis=1).min()) if truncate != "none" else context.shape[1]
    if spec.max_keep is not None:
        keep_context = min(keep_context, spec.max_keep)
    keep_target = int(target.sum(axis=1).min()) if truncate != "none" else target.shape[1]
    shuffled = truncate != "prefix"
    return GlobalMask(
        keep_cells(context, keep_context, rng if shuffled else None),
        keep_cells(target, keep_target, rng if shuffled else None),
    )


def keep_cells(cells: np.ndarray, keep: int, rng: np.random.Generator | None) -> np.ndarray:
    """At most `keep` True cells per row: the first ones, or uniformly chosen ones when `rng` is given."""
    if rng is None:
        return cells & (np.cumsum(cells, axis=1) <= keep)
    rank = np.where(cells, rng.random(cells.shape), 2.0).argsort(axis=1).argsort(axis=1)
    return cells & (rank < keep)


def token_set(cells: np.ndarray) -> TokenSet:
    """TokenSet of the True cells of each row; lengths is None where all rows have equally many."""
    counts = cells.sum(axis=1)
    order = np.argsort(~cells, axis=1, kind="stable")[:, : int(counts.max())]
    order = np.where(np.arange(order.shape[1]) < counts[:, None], order, 0)
    lengths = None if (counts == counts[0]).all() else torch.from_numpy(counts.astype(np.int64))
    return TokenSet(torch.from_numpy(order.astype(np.int64)), lengths)
