"""V-JEPA's vision transformer (Bardes et al., 2024): tubelet tokens, fixed sin-cos positions, pre-norm blocks.

Shapes: B clips, N tokens of the grid, K of a token set, D width. Parameter names are V-JEPA's.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from vmjepa.errors import ConfigError
from vmjepa.masks import TokenSet
from vmjepa.models.layers import (
    DropPath,
    InitStd,
    PatchEmbed,
    drop_path_rates,
    grid_of,
    init_linears,
    key_mask,
    run_block,
    take,
)
from vmjepa.models.positions import resize_positions, sincos_3d


class MLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention; the rows of qkv are ordered q, k, v, each split in heads."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"width {dim} does not divide into {num_heads} attention heads; change their number")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, K, D). mask: bool (B, 1, 1, K), True at the tokens that may be attended to."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x += drop_path(attn(norm1(x))); x += drop_path(mlp(norm2(x)))."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, eps: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """The encoder: clip (B, 3, T, H, W) -> tokens (B, K, D).

    Initial weights are what V-JEPA's training really starts from: truncated normal, biases 0. (Its constructor also
    divides the output layers by sqrt(2 * layer), which its training helper then overwrites.) Arguments as VideoMamba's.

    Raises:
        ConfigError: sizes that do not divide into whole tokens or heads.
    """

    pos_embed: Tensor

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_frames: int = 16,
        tubelet_size: int = 2,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        uniform_power: bool = True,
        position_base: float = 10000.0,
        init_std: InitStd = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.grid = grid_of(img_size, num_frames, patch_size, tubelet_size)
        self.num_tokens = math.prod(self.grid)
        self.activation_checkpointing = activation_checkpointing
        self.patch_embed = PatchEmbed(patch_size, tubelet_size, embed_dim)
        table = sincos_3d(embed_dim, *self.grid, uniform_power=uniform_power, base=position_base)
        self.register_buffer("pos_embed", table.float()[None])
        rates = drop_path_rates(drop_path, depth)
        self.blocks = nn.ModuleList([Block(embed_dim, num_heads, mlp_ratio, 1e-6, rate) for rate in rates])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        init_linears(self, init_std)
        self.patch_embed.reset_parameters(init_std)

    def forward(self, x: Tensor, context: TokenSet | None = None) -> Tensor:
        """Tokens of `context`, or all tokens; rows beyond a clip's length mean nothing."""
        tokens = self.patch_embed(x)
        tokens = tokens + resize_positions(self.pos_embed, self.grid, self.patch_embed.grid(x))
        mask = None
        if context is not None:
            tokens = take(tokens, context.index)
            mask = key_mask(context)
        for block in self.blocks:
            tokens = run_block(block, self.activation_checkpointing, tokens, mask)
        return self.norm(tokens)
