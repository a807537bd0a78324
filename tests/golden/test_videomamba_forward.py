"""The VideoMamba classifier against the published network: tokens, residuals, logits and gradients, fp64 first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.golden.vectors import Vectors, assert_forward, assert_grad, assert_module_grads
from vmjepa.models.videomamba import VideoMambaClassifier

FP64, LOGITS, TOKENS, RESIDUAL, GRADIENT = 1e-12, 3e-6, 2e-5, 3e-5, 4e-5


@pytest.fixture(scope="module")
def vectors(golden_dir: Path) -> Vectors:
    return Vectors(golden_dir / "videomamba_forward.npz")


@pytest.fixture
def model(vectors: Vectors) -> VideoMambaClassifier:
    config = vectors.config
    model = VideoMambaClassifier(
        config["img_size"], config["patch_size"], config["num_frames"], config["kernel_size"], config["embed_dim"],
        config["depth"], config["num_classes"], config["d_state"], config["d_conv"], config["expand"],
        drop_path=config["drop_path_rate"],
    )  # fmt: skip
    model.load_state_dict(vectors.state("param/"))
    return model.eval()


def test_fp64(vectors: Vectors, model: VideoMambaClassifier) -> None:
    model.double()
    x = vectors["x"].double()
    assert_forward(model.features(x), vectors["fp64/tokens_after_norm_f"], FP64, "tokens_after_norm_f")
    assert_forward(model(x), vectors["fp64/logits"], FP64, "logits")


def test_fp32_and_gradients(vectors: Vectors, model: VideoMambaClassifier) -> None:
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(model.layers):
        block.norm.register_forward_hook(lambda _, inputs, __, i=i: seen.update({f"layer{i}/residual": inputs[0]}))
        block.mixer.register_forward_hook(lambda _, __, out, i=i: seen.update({f"layer{i}/mixer_out": out}))
    model.norm_f.register_forward_hook(lambda _, __, out: seen.update(tokens_after_norm_f=out))
    x = vectors["x"].requires_grad_()
    logits = model(x)
    tokens = seen["tokens_after_norm_f"]
    loss = (logits * vectors["R_logits"]).sum() + (tokens * vectors["R_tokens"]).sum()
    loss.backward()
    assert_forward(logits, vectors["logits"], LOGITS, "logits")
    assert_forward(tokens, vectors["tokens_after_norm_f"], TOKENS, "tokens_after_norm_f")
    assert_forward(tokens[:, 0], vectors["cls_feature"], TOKENS, "cls_feature")
    assert_forward(seen["layer0/residual"], vectors["tokens_input_to_layers"], RESIDUAL, "tokens_input_to_layers")
    stored = [name for name in vectors.names("layer") if name in seen]
    assert len(stored) == 2 * vectors.config["depth"]
    for name in stored:
        assert_forward(seen[name], vectors[name], RESIDUAL, name)
    assert x.grad is not None
    corner = vectors["grad_x_crop16"]
    assert_grad(x.grad[..., : corner.shape[-2], : corner.shape[-1]], corner, GRADIENT, "grad_x_crop16")
    assert_module_grads(model, vectors, "grad/", GRADIENT)


def test_drop_path_rates(vectors: Vectors, model: VideoMambaClassifier) -> None:
    rates = [block.drop_path.rate for block in model.layers] + [model.drop_path.rate]
    assert torch.allclose(torch.tensor(rates).double(), vectors["drop_path_rates"], atol=1e-7)
