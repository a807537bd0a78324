"""The attention predictor against V-JEPA's: two masks, mask tokens, loss and gradients. fp64 first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.golden.vectors import Vectors, assert_forward, assert_grad, assert_module_grads
from vmjepa.masks import TokenSet
from vmjepa.models.predictor import AttentionPredictor

FP64, FP32, GRADIENT = 1e-12, 3e-6, 5e-6


@pytest.fixture(scope="module")
def vectors(golden_dir: Path) -> Vectors:
    return Vectors(golden_dir / "vjepa_vit_predictor.npz")


@pytest.fixture
def predictor(vectors: Vectors) -> AttentionPredictor:
    config = vectors.config
    side = config["img_size"] // config["patch_size"]
    predictor = AttentionPredictor(
        (config["num_frames"] // config["tubelet_size"], side, side), config["embed_dim"], config["pred_dim"],
        config["pred_depth"], config["num_heads"], config["num_mask_tokens"], uniform_power=config["uniform_power"],
    )  # fmt: skip
    own_table = predictor.predictor_pos_embed.clone()
    predictor.load_state_dict(vectors.state("predictor/"))
    assert torch.equal(own_table, predictor.predictor_pos_embed), "our position table is not the stored one"
    return predictor


def _pair(vectors: Vectors, i: int) -> tuple[Tensor, TokenSet, TokenSet]:
    return vectors[f"ctxt{i}"], TokenSet(vectors[f"mask_enc{i}"].long()), TokenSet(vectors[f"mask_pred{i}"].long())


def test_fp64(vectors: Vectors, predictor: AttentionPredictor) -> None:
    predictor.double()
    for i in range(vectors.config["num_mask_tokens"]):
        features, context, target = _pair(vectors, i)
        out = predictor(features.double(), context, target, i)
        assert_forward(out, vectors[f"fp64/out{i}"], FP64, f"out{i}")


def test_fp32_and_gradients(vectors: Vectors, predictor: AttentionPredictor) -> None:
    masks = vectors.config["num_mask_tokens"]
    losses, inputs = [], []
    for i in range(masks):
        features, context, target = _pair(vectors, i)
        inputs.append(features.requires_grad_())
        out = predictor(features, context, target, i)
        assert_forward(out, vectors[f"out{i}"], FP32, f"out{i}")
        losses.append((out - vectors[f"tgt{i}"]).abs().mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    assert_forward(loss, vectors["loss_l1"], FP32, "loss_l1")
    for i, features in enumerate(inputs):
        assert_grad(features.grad, vectors[f"grad_ctxt{i}"], GRADIENT, f"grad_ctxt{i}")
    assert_module_grads(predictor, vectors, "grad/", GRADIENT)


def test_other_mask_token(vectors: Vectors, predictor: AttentionPredictor) -> None:
    features, context, target = _pair(vectors, 0)
    out = predictor(features, context, target, 1)
    assert_forward(out, vectors["mask_index1_on_pair0"], FP32, "mask_index1_on_pair0")


def test_targets_are_normalised_features(vectors: Vectors) -> None:
    full = vectors["target_full_unnormalised"]
    normalised = torch.nn.functional.layer_norm(full, full.shape[-1:])
    for i in range(vectors.config["num_mask_tokens"]):
        index = vectors[f"mask_pred{i}"].long()[..., None].expand(-1, -1, full.shape[-1])
        assert_forward(normalised.gather(1, index), vectors[f"tgt{i}"], FP32, f"tgt{i}")
