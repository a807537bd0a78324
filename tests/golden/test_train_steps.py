"""V-JEPA's own training loop, run for six steps, against our engine, schedules, clipping and EMA (DeepSpeed, one rank).

Compared at every step: loss, gradient norms, lr, weight decay, momentum; after three and six steps: every parameter of
encoder, predictor and target.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from vmjepa.jepa import JEPA
from vmjepa.masks import StepMask, TokenSet
from vmjepa.models import decays
from vmjepa.models.predictor import AttentionPredictor
from vmjepa.models.vit import VisionTransformer
from vmjepa.train.ema import TargetEncoder
from vmjepa.train.engine import MODULES, Engine, EngineSettings
from vmjepa.train.schedules import Schedule


@pytest.fixture(scope="module")
def vectors(golden_dir):
    with np.load(golden_dir / "train_steps.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def config(vectors):
    return json.loads(str(vectors["config_json"]))


def weights(vectors, prefix: str) -> dict[str, torch.Tensor]:
    """Official arrays under `prefix`, without the wrapper's `backbone.`."""
    return {
        key.removeprefix(prefix).removeprefix("backbone."): torch.from_numpy(value)
        for key, value in vectors.items()
        if key.startswith(prefix)
    }


def build(vectors, config) -> JEPA:
    grid = (config["frames"] // config["tubelet"], *[config["img"] // config["patch"]] * 2)
    encoder = VisionTransformer(
        img_size=config["img"], patch_size=config["patch"], num_frames=config["frames"], tubelet_size=config["tubelet"],
        embed_dim=config["dim"], depth=config["depth"], num_heads=config["heads"], uniform_power=True,
    )  # fmt: skip
    predictor = AttentionPredictor(
        grid=grid, embed_dim=config["dim"], pred_dim=config["pred_dim"], depth=config["pred_depth"],
        num_heads=config["heads"], uniform_power=True, num_mask_tokens=len(config["mask"]),
    )  # fmt: skip
    model = JEPA(encoder, predictor, config["loss_exp"])
    model.encoder.load_state_dict(weights(vectors, "init/encoder/"))
    model.predictor.load_state_dict(weights(vectors, "init/predictor/"))
    return model


def key_third(name: str, value: torch.Tensor) -> torch.Tensor:
    """Drops the key part of qkv biases: its gradient is zero in exact arithmetic, so Adam normalises rounding noise."""
    if not name.endswith("qkv.bias"):
        return value
    third = value.shape[0] // 3
    return torch.cat([value[:third], value[2 * third :]])


def check_parameters(found: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], where: str) -> None:
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        worst = (key_third(name, found[name]) - key_third(name, value)).abs().max()
        assert worst < 1e-4, f"{where} {name}: {worst:.1e}"


def test_six_official_steps(vectors, config, single_world):
    """Schedules, separate clipping after warmup, decoupled decay, EMA after the step: all as the original does them."""
    model = build(vectors, config)
    target = TargetEncoder(model.encoder, single_world.device)
    settings = EngineSettings(config["batch"], 1, 0, tuple(config["betas"]), config["eps"])
    engine = Engine(model, settings, single_world, lambda name, value: decays(name, value, official=True))
    schedule = Schedule(
        config["ipe"], config["epochs"], config["warmup"], config["ipe_scale"], config["start_lr"], config["lr"],
        config["final_lr"], config["wd"], config["final_wd"], tuple(config["ema"]),
    )  # fmt: skip
    for step in range(config["ipe"] * config["epochs"]):
        clips = torch.cat(
            [torch.from_numpy(vectors[f"step{step}/clip{j}"]).float() / 64 for j in range(config["num_clips"])]
        )
        masks = []
        for number in range(len(config["mask"])):
            context, predicted = (
                torch.from_numpy(vectors[f"step{step}/mask_{part}{number}"]).long().repeat(config["num_clips"], 1)
                for part in ("enc", "pred")
            )
            masks.append(StepMask(TokenSet(context), TokenSet(predicted), predicted.numel(), len(predicted)))
        loss, _ = engine.micro_step(clips, masks, target.features(clips))
        if step == 0:
            check_first_gradients(engine, vectors)
        clipping = step // config["ipe"] > config["warmup"]
        norms = engine.clip(dict.fromkeys(MODULES, config["clip_grad"] if clipping else None)).tolist()
        lr, decay, momentum = schedule.lr_at(step), schedule.weight_decay_at(step), schedule.momentum_at(step)
        engine.step(lr, decay)
        target.update(engine.model.encoder, momentum)

        for name, value in (("lr", lr), ("wd", decay), ("momentum", momentum)):
            assert value == pytest.approx(stored(vectors, name, step), rel=1e-12)
        assert loss.item() == pytest.approx(stored(vectors, "loss", step), abs=1e-6)
        for name, norm in zip(("enc", "pred"), norms, strict=True):
            applied = norm * min(1.0, config["clip_grad"] / (norm + 1e-6)) if clipping else norm
            assert applied == pytest.approx(stored(vectors, f"{name}_grad_norm_applied", step), rel=1e-5)
        prefix = f"after_step{step}"
        if any(key.startswith(f"{prefix}/") for key in vectors):
            for module, state in (
                ("encoder", engine.model.encoder.state_dict()),
                ("predictor", engine.model.predictor.state_dict()),
                ("target", target.state_dict()),
            ):
                check_parameters(state, weights(vectors, f"{prefix}/{module}/"), f"{prefix} {module}")


def stored(vectors, name: str, step: int) -> float:
    return float(vectors[name][step])


def check_first_gradients(engine: Engine, vectors) -> None:
    for module in MODULES:
        gradients = {name: p.grad for name, p in getattr(engine.model, module).named_parameters() if p.requires_grad}
        for name, value in weights(vectors, f"step0_grad/{module}/").items():
            assert (gradients[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
