"""Models from a config, weight-decay groups, initial step sizes, stochastic depth, recomputation, weight files."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vmjepa.errors import CheckpointError, ConfigError
from vmjepa.masks import TokenSet
from vmjepa.models import MODELS, VideoMamba, VisionTransformer, build_encoder, build_predictor, checkpoints, decays
from vmjepa.models.checkpoints import load_strictly, load_weights, save_weights
from vmjepa.models.mixer import BiMamba


@dataclasses.dataclass
class Model:
    """The config's model section, small."""

    model_name: str = "videomamba_custom"
    embed_dim: int | None = 48
    depth: int | None = 2
    num_heads: int | None = None
    pred_embed_dim: int = 36
    pred_depth: int = 1
    pred_num_heads: int | None = None
    uniform_power: bool = True
    zero_init_mask_tokens: bool = True
    position_base: float = 10000.0
    drop_path: float = 0.0
    dt_init: str = "mamba"
    init_std: Any = None


def _config(**model: Any) -> SimpleNamespace:
    data = SimpleNamespace(crop_size=24, num_frames=4, patch_size=8, tubelet_size=2)
    engine = SimpleNamespace(activation_checkpointing=False)
    return SimpleNamespace(model=Model(**model), data=data, engine=engine, mask=[None, None])


def _named(name: str) -> dict[str, Any]:
    return {"model_name": name, "embed_dim": None, "depth": None}


@pytest.mark.parametrize("name", MODELS)
def test_table_sizes(name: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(_config(**_named(name)))
    layers = encoder.layers if isinstance(encoder, VideoMamba) else encoder.blocks
    assert (encoder.embed_dim, len(layers), encoder.num_tokens) == (MODELS[name].embed_dim, MODELS[name].depth, 18)


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        ({"pred_embed_dim": 384}, 12),
        ({"pred_embed_dim": 144}, 4),
        ({"pred_embed_dim": 36, "pred_num_heads": 6}, 6),
        ({"model_name": "vit_custom", "num_heads": 3}, 3),
    ],
    ids=["near 32 wide", "divides", "from the config", "the encoder's"],
)
def test_predictor_heads(model: dict[str, Any], heads: int) -> None:
    config = _config(**model)
    predictor = build_predictor(config, build_encoder(config))
    assert predictor.predictor_blocks[0].attn.num_heads == heads
    assert len(predictor.mask_tokens) == 2


def test_heads_that_do_not_fit() -> None:
    config = _config(model_name="vit_custom", num_heads=3, pred_embed_dim=40)
    with pytest.raises(ConfigError, match=r"pred_embed_dim 40 .* 3 heads"):
        build_predictor(config, build_encoder(config))


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match="videomamba_tinny"):
        build_encoder(_config(**_named("videomamba_tinny")))


def test_clips_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="25x25 pixels do not divide into patches of 8"):
        VideoMamba(25, 8, 4, 2, 48, 1)
    with pytest.raises(ConfigError, match="5 frames do not divide into tubelets of 2"):
        VisionTransformer(24, 8, 5, 2, 48, 1)


def test_what_is_decayed() -> None:
    config = _config()
    encoder = build_encoder(config)
    modules = nn.ModuleDict({"encoder": encoder, "predictor": build_predictor(config, encoder)})
    decayed = {name for name, p in modules.named_parameters() if decays(name, p)}
    official = {name for name, p in modules.named_parameters() if decays(name, p, official=True)}
    assert "encoder.layers.0.mixer.dt_proj.weight" in decayed
    assert "encoder.patch_embed.proj.weight" in decayed
    assert {name.split(".")[-1] for name in decayed} == {"weight"}
    differ = {"A_log", "A_b_log"}
    assert official - decayed == {
        *(f"encoder.layers.{i}.mixer.{name}" for i in range(2) for name in differ),
        *(f"predictor.mask_tokens.{i}" for i in range(2)),
    }
    partitioned = nn.Parameter(torch.zeros(0))
    partitioned.ds_shape = torch.Size([4, 4])
    assert decays("encoder.head.weight", partitioned)


@pytest.mark.parametrize(("dt_init", "low", "high"), [("mamba", 1e-3, 1e-1), ("official", 0.69, 0.70)])
def test_initial_step_sizes(dt_init: str, low: float, high: float) -> None:
    torch.manual_seed(0)
    mixer = BiMamba(64)
    mixer.reset_parameters(4, dt_init, None)
    for projection in (mixer.dt_proj, mixer.dt_proj_b):
        steps = F.softplus(projection.bias.double())
        assert steps.min() >= low * (1 - 1e-3)
        assert steps.max() <= high * (1 + 1e-3)
        assert dt_init == "official" or steps.max() / steps.min() > 20, "log-uniform"


def test_fan_in_initialisation() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(_config(init_std="fan_in"))
    weight = encoder.layers[0].mixer.in_proj.weight
    assert weight.std().item() == pytest.approx(0.64 / 48**0.5, rel=0.05)


@pytest.mark.parametrize("family", ["videomamba", "vit"])
def test_drop_path_only_in_training(family: str) -> None:
    torch.manual_seed(0)
    heads = {"num_heads": 3} if family == "vit" else {}
    encoder = build_encoder(_config(model_name=f"{family}_custom", drop_path=0.9, init_std=0.2, **heads))
    clips = torch.randn(4, 3, 4, 24, 24)
    assert not torch.equal(encoder(clips), encoder(clips))
    encoder.eval()
    assert torch.equal(encoder(clips), encoder(clips))


@pytest.mark.parametrize("family", ["videomamba", "vit"])
def test_recomputed_activations_change_nothing(family: str) -> None:
    heads = {"num_heads": 3} if family == "vit" else {}
    encoder = build_encoder(_config(model_name=f"{family}_custom", **heads))
    clips, context = torch.randn(2, 3, 4, 24, 24), TokenSet(torch.arange(5).expand(2, -1), torch.tensor([5, 2]))
    gradients = []
    for recompute in (False, True):
        encoder.activation_checkpointing = recompute
        encoder.zero_grad()
        encoder(clips, context).square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", ["videomamba", "vit"])
def test_autocast_keeps_fp32_tokens_near(family: str) -> None:
    """Under bf16 autocast the residual stream, and so the output, stays fp32 and near the fp32 result."""
    torch.manual_seed(0)
    heads = {"num_heads": 3} if family == "vit" else {}
    encoder = build_encoder(_config(model_name=f"{family}_custom", **heads))
    clips = torch.randn(2, 3, 4, 24, 24)
    expected = encoder(clips)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = encoder(clips)
    assert tokens.dtype == torch.float32
    assert (tokens - expected).abs().max() < 0.05 * expected.abs().max()


def test_weights_round_trip(tmp_path: Path) -> None:
    encoder = build_encoder(_config())
    path = tmp_path / "run" / "model.safetensors"
    save_weights(path, encoder.state_dict(), {"step": 3, "model_name": "videomamba_custom"})
    state, metadata = load_weights(path)
    other = build_encoder(_config())
    load_strictly(other, state, str(path))
    assert metadata == {"step": 3, "model_name": "videomamba_custom"}
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.json", "model.safetensors"]


def test_weights_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(path, build_encoder(_config(embed_dim=24)).state_dict(), {})
    with pytest.raises(CheckpointError, match=r"another model: .* has shape .* and \d+ more"):
        load_strictly(build_encoder(_config()), load_weights(path)[0], str(path))


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not exist"):
        load_weights(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"bad\.safetensors cannot be read"):
        load_weights(tmp_path / "bad.safetensors")


def test_full_disk_leaves_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(path, {"a": torch.zeros(3)}, {})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(Exception, match="the disk is full"):
        save_weights(path, {"a": torch.ones(3)}, {})
    assert torch.equal(load_weights(path)[0]["a"], torch.zeros(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
