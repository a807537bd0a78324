"""VideoMamba (Li et al., 2024): tubelet tokens through bidirectional Mamba blocks.

VideoMamba is the encoder that V-JEPA trains: no cls token, fixed sin-cos positions, every token out.
VideoMambaClassifier is the published supervised network, for its weights. Shapes: B clips, N tokens of the grid, K of a
token set, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vmjepa.masks import TokenSet
from vmjepa.models.layers import DropPath, InitStd, PatchEmbed, RMSNorm, grid_of, lengths_of, take, trunc_normal_
from vmjepa.models.mixer import BiMamba, mamba_blocks, run_mamba_blocks
from vmjepa.models.positions import resize_positions, sincos_3d


class VideoMamba(nn.Module):
    """The encoder: clip (B, 3, T, H, W) -> tokens (B, K, D) in fp32.

    Args:
        img_size: height and width in pixels. num_frames: T. tubelet_size: frames per token.
        drop_path: stochastic depth of the last branch in training.
        uniform_power, position_base: layout and longest wavelength of the sin-cos positions.
        dt_init: "mamba" or "official", see BiMamba.reset_parameters. init_std: see trunc_normal_.
        activation_checkpointing: recompute blocks in the backward pass instead of keeping their activations.

    Raises:
        ConfigError: sizes that do not divide into whole tokens, or a width that the position table cannot have.
    """

    pos_embed: Tensor

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_frames: int = 16,
        tubelet_size: int = 2,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        drop_path: float = 0.0,
        uniform_power: bool = True,
        position_base: float = 10000.0,
        dt_init: str = "mamba",
        init_std: InitStd = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.grid = grid_of(img_size, num_frames, patch_size, tubelet_size)
        self.num_tokens = math.prod(self.grid)
        self.activation_checkpointing = activation_checkpointing
        self.patch_embed = PatchEmbed(patch_size, tubelet_size, embed_dim)
        table = sincos_3d(embed_dim, *self.grid, uniform_power=uniform_power, base=position_base)
        self.register_buffer("pos_embed", table.float()[None])
        self.layers = mamba_blocks(embed_dim, depth, drop_path, 1e-5, d_state, d_conv, expand)
        self.drop_path = DropPath(drop_path)
        self.norm = RMSNorm(embed_dim)
        reset_mixers(self.layers, dt_init, init_std)

    def forward(self, x: Tensor, context: TokenSet | None = None) -> Tensor:
        """Tokens of `context`, or all tokens; rows beyond a clip's length mean nothing."""
        tokens = self.patch_embed(x)
        tokens = tokens + resize_positions(self.pos_embed, self.grid, self.patch_embed.grid(x))
        if context is not None:
            tokens = take(tokens, context.index)
        lengths = lengths_of(context)
        return self.norm(run_mamba_blocks(self.layers, self.drop_path, tokens, lengths, self.activation_checkpointing))


class VideoMambaClassifier(nn.Module):
    """The published classifier: cls token in front, learned spatial and temporal tables, logits from token 0.

    Parameter names and initial weights are the published ones, so its weight files load strictly.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_frames: int = 8,
        tubelet_size: int = 1,
        embed_dim: int = 192,
        depth: int = 24,
        num_classes: int = 1000,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        time, rows, columns = grid_of(img_size, num_frames, patch_size, tubelet_size)
        self.patch_embed = PatchEmbed(patch_size, tubelet_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + rows * columns, embed_dim))
        self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, time, embed_dim))
        self.layers = mamba_blocks(embed_dim, depth, drop_path, 1e-5, d_state, d_conv, expand)
        self.drop_path = DropPath(drop_path)
        self.norm_f = RMSNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        trunc_normal_(self.pos_embed, None)
        trunc_normal_(self.head.weight, None)
        nn.init.zeros_(self.head.bias)
        reset_mixers(self.layers, "official", None)

    def features(self, x: Tensor) -> Tensor:
        """All tokens after the final norm, (B, 1 + N, D), cls first."""
        patches = self.patch_embed(x)
        spatial = self.pos_embed[:, None, 1:]
        patches = patches + (spatial + self.temporal_pos_embedding[:, :, None]).flatten(1, 2)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        tokens = torch.cat([cls, patches], dim=1)
        return self.norm_f(run_mamba_blocks(self.layers, self.drop_path, tokens, None))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.head(self.features(x)[:, 0])


def reset_mixers(layers: nn.ModuleList, dt_init: str, std: InitStd) -> None:
    """Initial weights of every mixer of a network."""
    for module in layers.modules():
        if isinstance(module, BiMamba):
            module.reset_parameters(len(layers), dt_init, std)
