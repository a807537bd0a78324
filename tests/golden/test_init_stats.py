"""Initial weights against statistics of the official ones: constants exactly, the rest within sampling error."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.golden.vectors import Vectors
from vmjepa.models import MODELS
from vmjepa.models.predictor import AttentionPredictor
from vmjepa.models.videomamba import VideoMambaClassifier
from vmjepa.models.vit import VisionTransformer


@pytest.fixture(scope="module")
def vectors(golden_dir: Path) -> Vectors:
    return Vectors(golden_dir / "init_stats.npz")


def _expected_std(expected: dict[str, float]) -> float:
    """The stored deviation without an outlier: torch puts the rare uniform draw of exactly 0 at the bound, -2."""
    outlier = max(abs(expected["min"]), abs(expected["max"]))
    if outlier < 20 * expected["std"]:
        return expected["std"]
    return math.sqrt(expected["std"] ** 2 - outlier**2 / expected["numel"])


def _compare(module: nn.Module, fixed_tables: tuple[str, ...], vectors: Vectors, prefix: str) -> None:
    """Every stored row: constants and fixed tables exactly, random weights by deviation and mean."""
    tensors: dict[str, Tensor] = module.state_dict()
    rows = dict(zip(vectors.strings(f"{prefix}/names"), vectors[f"{prefix}/stats"].tolist(), strict=True))
    assert rows
    for name, row in rows.items():
        expected = dict(zip(vectors.config["columns"], row, strict=True))
        tensor = tensors[name.removeprefix("backbone.")].double()
        numel = tensor.numel()
        assert numel == expected["numel"], name
        if expected["std"] == 0 or name.endswith(fixed_tables):
            for key, value in (("mean", tensor.mean()), ("min", tensor.min()), ("max", tensor.max())):
                assert value.item() == pytest.approx(expected[key], abs=1e-6), f"{name} {key}"
        else:
            std = _expected_std(expected)
            assert abs(tensor.std(correction=0).item() / std - 1) <= 7 / math.sqrt(2 * numel), f"{name} std"
            assert abs(tensor.mean().item() - expected["mean"]) <= 7 * std / math.sqrt(numel), f"{name} mean"


def test_videomamba(vectors: Vectors) -> None:
    torch.manual_seed(0)
    config = vectors.config["videomamba"]
    numels = vectors["videomamba/stats"][:, vectors.config["columns"].index("numel")].long().tolist()
    sizes = dict(zip(vectors.strings("videomamba/names"), numels, strict=True))
    dim = config["embed_dim"]
    model = VideoMambaClassifier(
        img_size=(16, 16 * (sizes["pos_embed"] // dim - 1)),  # only the numbers of positions are recorded
        num_frames=sizes["temporal_pos_embedding"] // dim,
        embed_dim=dim,
        depth=config["depth"],
        num_classes=sizes["head.bias"],
    )
    _compare(model, ("A_log", "A_b_log"), vectors, "videomamba")


def test_vjepa_encoder_and_predictor(vectors: Vectors) -> None:
    torch.manual_seed(0)
    config = vectors.config["vjepa"]
    size = MODELS[config["model"]]
    encoder = VisionTransformer(
        config["crop"], config["patch"], config["frames"], 2, size.embed_dim, size.depth, size.num_heads
    )  # fmt: skip
    predictor = AttentionPredictor(encoder.grid, size.embed_dim, config["pe"], config["pd"], size.num_heads)
    _compare(encoder, ("pos_embed",), vectors, "init_video_model/encoder")
    _compare(predictor, ("pos_embed",), vectors, "init_video_model/predictor")
