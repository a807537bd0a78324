"""The ViT encoder against V-JEPA's: all tokens, two context masks, gradients, another clip size. fp64 first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.golden.vectors import Vectors, assert_forward, assert_grad, assert_module_grads
from vmjepa.masks import TokenSet
from vmjepa.models.vit import VisionTransformer

FP64, FP32, GRADIENT = 1e-12, 1.5e-5, 1e-5


@pytest.fixture(scope="module")
def vectors(golden_dir: Path) -> Vectors:
    return Vectors(golden_dir / "vjepa_vit_encoder.npz")


@pytest.fixture
def encoder(vectors: Vectors) -> VisionTransformer:
    config = vectors.config
    encoder = VisionTransformer(
        config["img_size"], config["patch_size"], config["num_frames"], config["tubelet_size"], config["embed_dim"],
        config["depth"], config["num_heads"], config["mlp_ratio"], uniform_power=config["uniform_power"],
    )  # fmt: skip
    own_table = encoder.pos_embed.clone()
    encoder.load_state_dict(vectors.state("encoder/"))
    assert torch.equal(own_table, encoder.pos_embed), "our position table is not the stored one"
    return encoder


def _masks(vectors: Vectors) -> list[TokenSet]:
    return [TokenSet(vectors[name].long()) for name in sorted(vectors.names("mask_enc"))]


def test_fp64(vectors: Vectors, encoder: VisionTransformer) -> None:
    encoder.double()
    x = vectors["x"].double()
    assert_forward(encoder(x), vectors["fp64/out_full"], FP64, "out_full")
    for i, mask in enumerate(_masks(vectors)):
        assert_forward(encoder(x, mask), vectors[f"fp64/out_mask{i}"], FP64, f"out_mask{i}")


def test_fp32_and_gradients(vectors: Vectors, encoder: VisionTransformer) -> None:
    x = vectors["x"].requires_grad_()
    assert_forward(encoder(x), vectors["out_full"], FP32, "out_full")
    for i, mask in enumerate(_masks(vectors)):
        out = encoder(x, mask)
        assert_forward(out, vectors[f"out_mask{i}"], FP32, f"out_mask{i}")
        (out * vectors[f"R{i}"]).sum().backward()
    assert_grad(x.grad, vectors["grad_x"], GRADIENT, "grad_x")
    assert_module_grads(encoder, vectors, "grad/", GRADIENT)


def test_clip_of_another_size(vectors: Vectors, encoder: VisionTransformer) -> None:
    assert_forward(encoder(vectors["interp/x"]), vectors["interp/out"], FP32, "interp/out")
