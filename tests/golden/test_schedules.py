"""Schedules against V-JEPA's, step by step, to 1e-12 relative."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vmjepa.train.schedules import Schedule


def schedule_of(config: dict) -> Schedule:
    return Schedule(
        ipe=config["ipe"], epochs=config["epochs"], warmup=config["warmup"], ipe_scale=config["ipe_scale"],
        start_lr=config["start_lr"], lr=config["lr"], final_lr=config["final_lr"], weight_decay=config["wd"],
        final_weight_decay=config["final_wd"], ema=tuple(config["ema"]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def vectors(golden_dir):
    return np.load(golden_dir / "schedules.npz")


def close(ours, theirs) -> None:
    np.testing.assert_allclose(np.array(ours), theirs, rtol=1e-12, atol=0)


def test_small_schedule_matches_at_every_step(vectors):
    """Every step of a short run and a few beyond the horizon, where the cosines turn."""
    schedule = schedule_of(json.loads(str(vectors["config_json"]))["small"])
    close([schedule.lr_at(i) for i in range(len(vectors["lr"]))], vectors["lr"])
    close([schedule.weight_decay_at(i) for i in range(len(vectors["wd"]))], vectors["wd"])
    close([schedule.momentum_at(i) for i in range(len(vectors["momentum"]))], vectors["momentum"])


def test_published_schedule_matches_at_stored_steps(vectors):
    """The published ViT-L/16 run: 90 000 steps on a horizon of 112 500."""
    schedule = schedule_of(json.loads(str(vectors["config_json"]))["paper"])
    steps = vectors["paper/step_index"].tolist()
    close([schedule.lr_at(i) for i in steps], vectors["paper/lr"])
    close([schedule.weight_decay_at(i) for i in steps], vectors["paper/wd"])
    kept = vectors["paper/momentum"].shape[0]
    close([schedule.momentum_at(i) for i in steps[:kept]], vectors["paper/momentum"])
