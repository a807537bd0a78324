"""The models by name, built from a config, and which of their parameters are decayed.

Sizes: VideoMamba's and V-JEPA's published ones. `*_custom` takes its size from the config.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from vmjepa.errors import ConfigError
from vmjepa.models.layers import InitStd
from vmjepa.models.predictor import AttentionPredictor, MambaPredictor
from vmjepa.models.probe import AttentiveClassifier, LinearProbe
from vmjepa.models.videomamba import VideoMamba, VideoMambaClassifier
from vmjepa.models.vit import VisionTransformer

__all__ = [
    "MODELS",
    "AttentionPredictor",
    "AttentiveClassifier",
    "LinearProbe",
    "MambaPredictor",
    "Size",
    "VideoMamba",
    "VideoMambaClassifier",
    "VisionTransformer",
    "build_encoder",
    "build_predictor",
    "decays",
    "make_encoder",
]

# Width of an attention head that the predictor beside a VideoMamba encoder aims at, where the config names no heads.
_PREDICTOR_HEAD_DIM = 32


class Size(NamedTuple):
    """A model's family (videomamba or vit) and size; num_heads and mlp_ratio are the transformer's."""

    family: str
    embed_dim: int
    depth: int
    num_heads: int = 0
    mlp_ratio: float = 4.0


MODELS: dict[str, Size] = {
    "videomamba_tiny": Size("videomamba", 192, 24),
    "videomamba_small": Size("videomamba", 384, 24),
    "videomamba_middle": Size("videomamba", 576, 32),
    "videomamba_base": Size("videomamba", 768, 24),
    "vit_tiny": Size("vit", 192, 12, 3),
    "vit_small": Size("vit", 384, 12, 6),
    "vit_base": Size("vit", 768, 12, 12),
    "vit_large": Size("vit", 1024, 24, 16),
    "vit_huge": Size("vit", 1280, 32, 16),
    "vit_giant": Size("vit", 1408, 40, 16, 48 / 11),
}


class ModelConfig(Protocol):
    """What the config's `model` section says about the encoder."""

    model_name: str
    embed_dim: int | None
    depth: int | None
    num_heads: int | None
    uniform_power: bool
    position_base: float
    drop_path: float
    dt_init: str
    init_std: InitStd


def make_encoder(
    model: ModelConfig,
    crop_size: int,
    num_frames: int,
    patch_size: int,
    tubelet_size: int,
    activation_checkpointing: bool = False,
) -> VideoMamba | VisionTransformer:
    """The encoder that `model` names, for clips of the given geometry. Raises ConfigError for sizes that do not fit."""
    size = _size(model)
    common: dict[str, Any] = {
        "img_size": crop_size,
        "patch_size": patch_size,
        "num_frames": num_frames,
        "tubelet_size": tubelet_size,
        "embed_dim": size.embed_dim,
        "depth": size.depth,
        "drop_path": model.drop_path,
        "uniform_power": model.uniform_power,
        "position_base": model.position_base,
        "init_std": model.init_std,
        "activation_checkpointing": activation_checkpointing,
    }
    if size.family == "videomamba":
        return VideoMamba(**common, dt_init=model.dt_init)
    return VisionTransformer(**common, num_heads=size.num_heads, mlp_ratio=size.mlp_ratio)


def build_encoder(cfg: Any) -> VideoMamba | VisionTransformer:
    """The encoder of a PretrainConfig."""
    data, checkpointing = cfg.data, cfg.engine.activation_checkpointing
    return make_encoder(
        cfg.model, data.crop_size, data.num_frames, data.patch_size, data.tubelet_size, checkpointing
    )  # fmt: skip


def build_predictor(cfg: Any, encoder: VideoMamba | VisionTransformer) -> AttentionPredictor:
    """The attention predictor of a PretrainConfig beside its encoder.

    Its heads are model.pred_num_heads, else as many as a ViT encoder has (V-JEPA's rule), else the number that divides
    the width with heads nearest to 32 wide. Raises ConfigError when the heads do not divide the width.
    """
    model = cfg.model
    return AttentionPredictor(
        encoder.grid,
        encoder.embed_dim,
        model.pred_embed_dim,
        model.pred_depth,
        model.pred_num_heads or _predictor_heads(model.pred_embed_dim, encoder),
        num_mask_tokens=len(cfg.mask),
        zero_init_mask_tokens=model.zero_init_mask_tokens,
        uniform_power=model.uniform_power,
        position_base=model.position_base,
        init_std=model.init_std,
        activation_checkpointing=cfg.engine.activation_checkpointing,
    )


def decays(name: str, parameter: Tensor, official: bool = False) -> bool:
    """Whether weight decay applies to a parameter; shapes are ZeRO-3's `ds_shape` where it has partitioned them.

    Never: biases, vectors, and (ours) A_log and D of the scan, position tables, cls and mask tokens. official: V-JEPA's
    rule, which spares only vectors and names with "bias" in them, and so decays mask tokens.
    """
    if len(getattr(parameter, "ds_shape", parameter.shape)) <= 1:
        return False
    if official:
        return "bias" not in name
    parts = name.split(".")
    spared = {"A_log", "A_b_log", "D", "D_b", "bias", "cls_token"}
    return parts[-1] not in spared and "mask_tokens" not in parts and "pos_embed" not in parts[-1]


def _size(model: ModelConfig) -> Size:
    family, _, kind = model.model_name.partition("_")
    if kind == "custom" and model.embed_dim and model.depth:
        return Size(family, model.embed_dim, model.depth, model.num_heads or 0)
    if model.model_name not in MODELS:
        raise ConfigError(f"model.model_name {model.model_name!r} is unknown; use one of {', '.join(MODELS)}")
    return MODELS[model.model_name]


def _predictor_heads(width: int, encoder: VideoMamba | VisionTransformer) -> int:
    if isinstance(encoder, VisionTransformer):
        if width % encoder.num_heads:
            raise ConfigError(
                f"model.pred_embed_dim {width} does not divide into the encoder's {encoder.num_heads} heads; "
                "change it or set model.pred_num_heads"
            )
        return encoder.num_heads
    divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
    return min(divisors, key=lambda heads: abs(width / heads - _PREDICTOR_HEAD_DIM))
