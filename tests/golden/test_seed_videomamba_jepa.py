"""VideoMamba under V-JEPA masks and the Mamba predictor against videoMamba-jepa's intended outputs, fp64 first.

As published, that project's training call gathers every row of the batch from clip 0; the last test recognises it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.golden.vectors import Vectors, assert_forward, assert_grad, assert_module_grads
from vmjepa.masks import TokenSet
from vmjepa.models.predictor import MambaPredictor
from vmjepa.models.videomamba import VideoMamba

FP64, ENCODER, PREDICTOR, GRADIENT = 1e-12, 1.5e-5, 3e-6, 2e-5


@pytest.fixture(scope="module")
def vectors(golden_dir: Path) -> Vectors:
    return Vectors(golden_dir / "seed_videomamba_jepa.npz")


@pytest.fixture
def encoder(vectors: Vectors) -> VideoMamba:
    config = vectors.config
    encoder = VideoMamba(
        config["img_size"], config["patch_size"], config["num_frames"], config["tubelet_size"], config["embed_dim"],
        config["depth"], config["d_state"], config["d_conv"], config["expand"],
        uniform_power=config["encoder_uniform_power"],
    )  # fmt: skip
    encoder.load_state_dict(vectors.state("encoder/"))
    return encoder.eval()


@pytest.fixture
def predictor(vectors: Vectors, encoder: VideoMamba) -> MambaPredictor:
    config = vectors.config
    predictor = MambaPredictor(
        encoder.grid, config["embed_dim"], config["pred_dim"], config["pred_depth"], config["num_mask_tokens"],
        uniform_power=config["predictor_uniform_power"], d_state=config["d_state"], d_conv=config["d_conv"],
        expand=config["expand"],
    )  # fmt: skip
    state = vectors.state("predictor/")  # its patch embedding is never used, and ours has none
    predictor.load_state_dict({k: v for k, v in state.items() if not k.startswith("patch_embed.")})
    return predictor.eval()


def _pairs(vectors: Vectors) -> list[tuple[TokenSet, TokenSet]]:
    numbers = range(vectors.config["num_mask_tokens"])
    return [(TokenSet(vectors[f"mask_enc{i}"].long()), TokenSet(vectors[f"mask_pred{i}"].long())) for i in numbers]


def test_encoder_fp64(vectors: Vectors, encoder: VideoMamba) -> None:
    encoder.double()
    for i, (context, _) in enumerate(_pairs(vectors)):
        out = encoder(vectors["x"].double(), context)
        assert_forward(out, vectors[f"fp64/enc/out_mask{i}"], FP64, f"out_mask{i}")


def test_encoder_fp32_and_gradients(vectors: Vectors, encoder: VideoMamba) -> None:
    assert_forward(encoder(vectors["x"]), vectors["enc/out_full"], ENCODER, "out_full")
    for i, (context, _) in enumerate(_pairs(vectors)):
        out = encoder(vectors["x"], context)
        assert_forward(out, vectors[f"enc/out_mask{i}"], ENCODER, f"out_mask{i}")
        (out * vectors[f"enc/R{i}"]).sum().backward()
    assert_module_grads(encoder, vectors, "enc/grad/", GRADIENT)


def test_predictor_fp64(vectors: Vectors, predictor: MambaPredictor) -> None:
    predictor.double()
    for i, (context, target) in enumerate(_pairs(vectors)):
        out = predictor(vectors[f"enc/out_mask{i}"].double(), context, target, i)
        assert_forward(out, vectors[f"fp64/pred/out{i}"], FP64, f"out{i}")


def test_predictor_fp32_and_gradients(vectors: Vectors, predictor: MambaPredictor) -> None:
    inputs: list[Tensor] = []
    for i, (context, target) in enumerate(_pairs(vectors)):
        inputs.append(vectors[f"enc/out_mask{i}"].requires_grad_())
        out = predictor(inputs[i], context, target, i)
        assert_forward(out, vectors[f"pred/out{i}"], PREDICTOR, f"out{i}")
        (out * vectors[f"pred/R{i}"]).sum().backward()
    for i, features in enumerate(inputs):
        assert_grad(features.grad, vectors[f"pred/grad_ctxt{i}"], GRADIENT, f"grad_ctxt{i}")
    assert_module_grads(predictor, vectors, "pred/grad/", GRADIENT)


def test_not_the_published_gather(vectors: Vectors, encoder: VideoMamba) -> None:
    for i, (context, _) in enumerate(_pairs(vectors)):
        out = encoder(vectors["x"], context)
        published = vectors[f"enc_as_published/out_mask{i}"]
        assert torch.allclose(out[0], published[0], atol=ENCODER), "clip 0 is what the published call computes"
        assert (out[1:] - published[1:]).abs().amax(dim=(1, 2)).min() > 0.1, "other clips are their own"
