"""The V-JEPA objective (Bardes et al., 2024): predict the target encoder's features of hidden tokens from visible ones.

Shapes: B clips, N tokens of the grid, D embed dim, K tokens of a set. The model that DeepSpeed trains holds the online
encoder and the predictor; the target encoder lives beside it (vmjepa.train.ema).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmjepa.masks import StepMask, TokenSet


class JEPA(nn.Module):
    """Encoder and predictor under one forward, so that ZeRO sees every parameter use.

    Args:
        encoder: (B, 3, T, H, W), TokenSet -> (B, K, D).
        predictor: (B, K, D), context, target, mask number -> (B, K', D).
        loss_exp: power p of the loss |z - h|^p / p.
        reg_coeff: weight of the variance term (0 in V-JEPA's recipes).
    """

    def __init__(self, encoder: nn.Module, predictor: nn.Module, loss_exp: float = 1.0, reg_coeff: float = 0.0):
        super().__init__()
        self.encoder, self.predictor = encoder, predictor
        self.loss_exp, self.reg_coeff = loss_exp, reg_coeff

    def forward(
        self, clips: Tensor, masks: Sequence[StepMask], features: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """One micro-batch.

        Args:
            clips: float (B, 3, T, H, W).
            masks: context and target tokens, one entry per mask of the config.
            features: fp32 (B, N, D), the target encoder's layer-normalised output for all tokens.

        Returns:
            loss to differentiate: this micro-batch's *share* of the global batch's loss (shares add up to it, since
            each is divided by the global number of target tokens); the same without the variance term, detached; and
            the detached predictions per mask.
        """
        share = features.new_zeros(())
        penalty = features.new_zeros(())
        predictions = []
        for number, mask in enumerate(masks):
            context = self.encoder(clips, mask.context)
            predicted = self.predictor(context, mask.context, mask.target, number).float()
            error = (predicted - gather_tokens(features, mask.target)).abs()
            if self.loss_exp != 1.0:
                error = error**self.loss_exp / self.loss_exp
            real = mask.target.real()
            if real is not None:
                error = error * real[..., None]
            share = share + error.sum() / (mask.target_total * features.shape[-1] * len(masks))
            if self.reg_coeff > 0:
                fraction = len(clips) / mask.clip_total
                penalty = penalty + fraction * variance_penalty(predicted, mask.target) / len(masks)
            predictions.append(predicted.detach())
        return share + self.reg_coeff * penalty, share.detach(), predictions


def target_features(encoder: nn.Module, clips: Tensor) -> Tensor:
    """What is to be predicted: LayerNorm (no affine, eps 1e-5) of the target encoder's tokens, fp32 (B, N, D)."""
    with torch.no_grad():
        tokens = encoder(clips, None).float()
        return F.layer_norm(tokens, (tokens.shape[-1],))


def gather_tokens(features: Tensor, tokens: TokenSet) -> Tensor:
    """Rows of `features` (B, N, D) at a token set: (B, K, D); padded slots repeat token 0."""
    return features.gather(1, tokens.index[..., None].expand(-1, -1, features.shape[-1]))


def variance_penalty(predicted: Tensor, target: TokenSet) -> Tensor:
    """V-JEPA's optional variance term: mean over clips and features of ReLU(1 - std over tokens)."""
    real = target.real()
    weight = torch.ones_like(predicted[..., :1]) if real is None else real[..., None].to(predicted.dtype)
    count = weight.sum(dim=1, keepdim=True)
    mean = (predicted * weight).sum(dim=1, keepdim=True) / count
    variance = (((predicted - mean) * weight) ** 2).sum(dim=1) / (count[:, 0] - 1).clamp(min=1)
    return F.relu(1 - torch.sqrt(variance + 1e-4)).mean()


def skill_baseline(features: Tensor, position_mean: Tensor, masks: Sequence[StepMask], loss_exp: float) -> Tensor:
    """Loss share of the predictor that knows only the batch-mean target of each position.

    skill = 1 - loss / baseline: 0 knows nothing beyond the mean, 1 is perfect.

    Args:
        features: (B, N, D) of this micro-batch. position_mean: (N, D), mean over the global micro-batch.
    """
    error = (features - position_mean).abs()
    if loss_exp != 1.0:
        error = error**loss_exp / loss_exp
    total = features.new_zeros(())
    for mask in masks:
        picked = gather_tokens(error, mask.target)
        real = mask.target.real()
        if real is not None:
            picked = picked * real[..., None]
        total = total + picked.sum() / (mask.target_total * features.shape[-1] * len(masks))
    return total
