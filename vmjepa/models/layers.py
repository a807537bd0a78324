"""Parts that the encoders and predictors share: patches, token gathering, norms, stochastic depth, initial weights."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vmjepa.errors import ConfigError
from vmjepa.masks import TokenSet

InitStd = float | str | None
Grid = tuple[int, int, int]


def grid_of(img_size: int | tuple[int, int], num_frames: int, patch_size: int, tubelet_size: int) -> Grid:
    """Tokens along (time, row, column). Raises ConfigError where clips do not divide into whole patches."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height % patch_size or width % patch_size:
        raise ConfigError(f"frames of {height}x{width} pixels do not divide into patches of {patch_size}; change one")
    if num_frames % tubelet_size:
        raise ConfigError(f"{num_frames} frames do not divide into tubelets of {tubelet_size}; change one of them")
    return num_frames // tubelet_size, height // patch_size, width // patch_size


class _PatchConv(nn.Conv3d):
    """A convolution whose stride is its kernel, computed as one matrix product (many times faster on a CPU)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, N, D), N in raster order."""
        batch, channels, *size = x.shape
        counts = [n // k for n, k in zip(size, self.kernel_size, strict=True)]
        if any(n % k for n, k in zip(size, self.kernel_size, strict=True)):
            raise ConfigError(f"a clip of {size} (frames, rows, columns) does not divide into {list(self.kernel_size)}")
        cut = [part for pair in zip(counts, self.kernel_size, strict=True) for part in pair]
        patches = x.view(batch, channels, *cut).permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, math.prod(counts), -1)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Tubelets of a clip to tokens: (B, 3, T, H, W) -> (B, N, embed_dim)."""

    def __init__(self, patch_size: int, tubelet_size: int, embed_dim: int, in_chans: int = 3) -> None:
        super().__init__()
        self.patch_size, self.tubelet_size = patch_size, tubelet_size
        kernel = (tubelet_size, patch_size, patch_size)
        self.proj = _PatchConv(in_chans, embed_dim, kernel_size=kernel, stride=kernel)

    def reset_parameters(self, std: InitStd) -> None:
        """Truncated-normal weights and a zero bias, instead of a convolution's own."""
        trunc_normal_(self.proj.weight, std)
        assert self.proj.bias is not None
        nn.init.zeros_(self.proj.bias)

    def grid(self, x: Tensor) -> Grid:
        """Tokens of a clip along (time, row, column)."""
        return x.shape[2] // self.tubelet_size, x.shape[3] // self.patch_size, x.shape[4] // self.patch_size

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.contiguous())


class RMSNorm(nn.Module):
    """x / sqrt(mean of squares + eps) * weight over the last axis, in fp32 (fp64 for fp64) whatever autocast says."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x.to(dtype), x.shape[-1:], self.weight.to(dtype), self.eps)


class DropPath(nn.Module):
    """In training drops a sample's whole branch with probability `rate` and scales what stays (Huang et al., 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, K) of each sample's own tokens (B, N, D): (B, K, D). A table (1, N, D) serves every sample."""
    tokens = tokens.expand(len(index), -1, -1)
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def lengths_of(context: TokenSet | None) -> Tensor | None:
    """Real tokens per row, or None where nothing is padded."""
    return None if context is None else context.lengths


def key_mask(*sets: TokenSet) -> Tensor | None:
    """Attention mask (B, 1, 1, sum of K), True at real tokens of the sets in a row; None where nothing is padded."""
    if all(tokens.lengths is None for tokens in sets):
        return None
    real = [torch.ones_like(s.index, dtype=torch.bool) if (r := s.real()) is None else r for s in sets]
    return torch.cat(real, dim=1)[:, None, None]


def run_block(block: nn.Module, use_checkpoint: bool, *inputs: Any) -> Any:
    """Calls a block; in training with use_checkpoint its activations are recomputed in the backward pass."""
    if use_checkpoint and block.training and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def trunc_normal_(weight: Tensor, std: InitStd) -> None:
    """Normal(0, std) cut at +-2, absolute as in the originals. std None: 0.02; "fan_in": 0.64 / sqrt(fan in).

    torch's own trunc_normal_ inverts a uniform draw, which is rarely exactly 0: that weight becomes -2, 100 deviations
    out. At these deviations a clamped normal is the same distribution without it.
    """
    if std == "fan_in":
        std = 0.64 / math.sqrt(weight[0].numel())
    with torch.no_grad():
        weight.normal_(0.0, 0.02 if std is None else float(std)).clamp_(-2.0, 2.0)


def init_linears(module: nn.Module, std: InitStd) -> None:
    """Truncated-normal weights and zero biases in every Linear."""

    def init(child: nn.Module) -> None:
        if isinstance(child, nn.Linear):
            trunc_normal_(child.weight, std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)

    module.apply(init)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rates rising linearly from 0 at the first of `depth` blocks to `rate` at the last."""
    return [rate * i / max(1, depth - 1) for i in range(depth)]
