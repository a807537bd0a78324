"""Fixed sin-cos position tables, as V-JEPA uses them.

An axis with m columns has the frequencies base^(-k / (m/2)), k = 0 .. m/2-1: first all sines, then all cosines. Tables
are float64, rows in raster order (time, then row, then column); models store them as float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from vmjepa.errors import ConfigError


def sincos_1d(dim: int, positions: torch.Tensor | int, base: float = 10000.0) -> torch.Tensor:
    """(N, dim) for the given positions, or for 0 .. N-1. Raises ConfigError for an odd dim."""
    if dim % 2:
        raise ConfigError(f"a sin-cos position axis cannot have {dim} columns (odd); change the embedding width")
    if isinstance(positions, int):
        positions = torch.arange(positions)
    frequencies = base ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(dim: int, h: int, w: int, base: float = 10000.0) -> torch.Tensor:
    """(h*w, dim): dim/2 columns for the row, then dim/2 for the column."""
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.cat([sincos_1d(dim // 2, axis.flatten(), base) for axis in (row, column)], dim=1)


def sincos_3d(
    dim: int, t: int, h: int, w: int, uniform_power: bool, base: float = 10000.0, cls_token: bool = False
) -> torch.Tensor:
    """(t*h*w, dim), columns [time | row | column]; with cls_token a zero row in front.

    uniform_power gives each axis 2*ceil(dim/6) columns and cuts the whole to dim; otherwise they get dim/2, dim/4 and
    dim/4. Raises ConfigError when that makes an axis odd.
    """
    widths = [2 * math.ceil(dim / 6)] * 3 if uniform_power else [dim // 2, dim // 4, dim // 4]
    axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
    table = torch.cat([sincos_1d(m, axis.flatten(), base) for m, axis in zip(widths, axes, strict=True)], dim=1)
    if table.shape[1] < dim:
        raise ConfigError(f"width {dim} does not split into 1/2 + 1/4 + 1/4; use a multiple of 8, or uniform_power")
    table = table[:, :dim]
    return torch.cat([table.new_zeros(1, dim), table]) if cls_token else table


def resize_positions(table: torch.Tensor, old: tuple[int, int, int], new: tuple[int, int, int]) -> torch.Tensor:
    """A table (1, N, dim) of grid `old` (t, h, w) resized to grid `new`: trilinear, corners not aligned."""
    if old == new:
        return table
    grid = table.view(1, *old, -1).permute(0, 4, 1, 2, 3)
    grid = F.interpolate(grid, size=new, mode="trilinear")
    return grid.flatten(2).transpose(1, 2)
