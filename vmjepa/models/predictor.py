"""Predictors: from the context's features and the positions to predict, the targets' features.

Linear(D -> P), the predictor's own positions added; each target starts as a learned mask token (one per mask of the
config) at its position; [context; targets] through blocks; the targets' part back to D. Shapes: context (B, K, D),
targets (B, K', D). Parameter names are V-JEPA's and, for the Mamba predictor, those of videoMamba-jepa.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vmjepa.masks import TokenSet
from vmjepa.models.layers import Grid, InitStd, RMSNorm, init_linears, key_mask, run_block, take, trunc_normal_
from vmjepa.models.mixer import DropPath, mamba_blocks, run_mamba_blocks
from vmjepa.models.positions import sincos_3d
from vmjepa.models.videomamba import reset_mixers
from vmjepa.models.vit import Block


class _Predictor(nn.Module):
    """What both predictors share: embedding, mask tokens, positions."""

    predictor_pos_embed: Tensor

    def __init__(
        self,
        grid: Grid,
        embed_dim: int,
        pred_dim: int,
        num_mask_tokens: int,
        zero_init_mask_tokens: bool,
        uniform_power: bool,
        position_base: float,
        init_std: InitStd,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.predictor_embed = nn.Linear(embed_dim, pred_dim)
        self.mask_tokens = nn.ParameterList([nn.Parameter(torch.zeros(1, 1, pred_dim)) for _ in range(num_mask_tokens)])
        table = sincos_3d(pred_dim, *grid, uniform_power=uniform_power, base=position_base)
        self.register_buffer("predictor_pos_embed", table.float()[None])
        self.predictor_proj = nn.Linear(pred_dim, embed_dim)
        if not zero_init_mask_tokens:
            for token in self.mask_tokens:
                trunc_normal_(token.data, init_std)

    def _sequence(self, ctx_tokens: Tensor, context: TokenSet, target: TokenSet, mask_index: int) -> Tensor:
        """(B, K + K', P): embedded context, then mask tokens, each with its position."""
        positions = self.predictor_pos_embed
        visible = self.predictor_embed(ctx_tokens) + take(positions, context.index)
        hidden = self.mask_tokens[mask_index % len(self.mask_tokens)] + take(positions, target.index)
        return torch.cat([visible, hidden], dim=1)


class AttentionPredictor(_Predictor):
    """V-JEPA's predictor: transformer blocks over [context; targets].

    Args:
        grid: tokens along (time, row, column). embed_dim: the encoder's width D. pred_dim: width P.
        num_mask_tokens: masks in the config. Others as VideoMamba's.
    """

    def __init__(
        self,
        grid: Grid,
        embed_dim: int,
        pred_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        num_mask_tokens: int = 2,
        zero_init_mask_tokens: bool = True,
        uniform_power: bool = True,
        position_base: float = 10000.0,
        init_std: InitStd = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            grid, embed_dim, pred_dim, num_mask_tokens, zero_init_mask_tokens, uniform_power, position_base, init_std,
            activation_checkpointing,
        )  # fmt: skip
        self.predictor_blocks = nn.ModuleList([Block(pred_dim, num_heads, 4.0, 1e-6) for _ in range(depth)])
        self.predictor_norm = nn.LayerNorm(pred_dim, eps=1e-6)
        init_linears(self, init_std)

    def forward(self, ctx_tokens: Tensor, context: TokenSet, target: TokenSet, mask_index: int) -> Tensor:
        """Predictions (B, K', D) at `target`; rows beyond a clip's length mean nothing."""
        tokens = self._sequence(ctx_tokens, context, target, mask_index)
        mask = key_mask(context, target)
        for block in self.predictor_blocks:
            tokens = run_block(block, self.activation_checkpointing, tokens, mask)
        return self.predictor_proj(self.predictor_norm(tokens[:, ctx_tokens.shape[1] :]))


class MambaPredictor(_Predictor):
    """The predictor of videoMamba-jepa: bidirectional Mamba blocks over [context; targets], each in raster order.

    Targets are far from their neighbours in this order, and gradients to the encoder are small; AttentionPredictor is
    the better choice. Arguments as AttentionPredictor's, dt_init as BiMamba.reset_parameters'.
    """

    def __init__(
        self,
        grid: Grid,
        embed_dim: int,
        pred_dim: int = 384,
        depth: int = 12,
        num_mask_tokens: int = 2,
        zero_init_mask_tokens: bool = True,
        uniform_power: bool = True,
        position_base: float = 10000.0,
        dt_init: str = "mamba",
        init_std: InitStd = None,
        activation_checkpointing: bool = False,
        **mixer: Any,
    ) -> None:
        super().__init__(
            grid, embed_dim, pred_dim, num_mask_tokens, zero_init_mask_tokens, uniform_power, position_base, init_std,
            activation_checkpointing,
        )  # fmt: skip
        self.layers = mamba_blocks(pred_dim, depth, **mixer)
        self.drop_path = DropPath(0.0)
        self.predictor_norm = RMSNorm(pred_dim)
        init_linears(self, init_std)
        reset_mixers(self.layers, dt_init, init_std)

    def forward(self, ctx_tokens: Tensor, context: TokenSet, target: TokenSet, mask_index: int) -> Tensor:
        """Predictions (B, K', D) at `target`; rows beyond a clip's length mean nothing."""
        tokens = self._sequence(ctx_tokens, context, target, mask_index)
        real = key_mask(context, target)
        if real is None:
            tokens = self._blocks(tokens, None)
        else:  # padding must stand at the end of the row: a gap between context and targets would cut the convolution
            real = real[:, 0, 0]
            order = (~real).int().argsort(dim=1, stable=True)
            tokens = take(self._blocks(take(tokens, order), real.sum(dim=1)), order.argsort(dim=1))
        return self.predictor_proj(self.predictor_norm(tokens[:, ctx_tokens.shape[1] :]))

    def _blocks(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        return run_mamba_blocks(self.layers, self.drop_path, tokens, lengths, self.activation_checkpointing)
