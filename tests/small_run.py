"""A pretraining small enough for tests of what surrounds it, and commands that start it."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

CONFIG = {
    "data": {"datasets": [], "batch_size": 2, "num_frames": 4, "tubelet_size": 2, "crop_size": 32, "patch_size": 16},
    "mask": [{"num_blocks": 1, "spatial_scale": [0.4, 0.4]}],
    "model": {"model_name": "vit_custom", "embed_dim": 32, "depth": 1, "num_heads": 2, "pred_depth": 1},
    "optimization": {"ipe": 4, "epochs": 2, "warmup": 1, "lr": 1e-3, "start_lr": 1e-4, "final_lr": 1e-5},
    "engine": {"zero_stage": 0, "threads_per_rank": 1},
    "monitor": {"every_steps": 1, "tensorboard": False},
    "logging": {"folder": "set by the test"},
}
CONFIG["data"] |= {"sampling_rate": 1}
CONFIG["model"] |= {"pred_embed_dim": 32, "pred_num_heads": 2}


def write_config(folder: Path, data_dir: Path) -> Path:
    """config.yaml in `folder`, on four real clips."""
    clips = sorted((data_dir / "actions").rglob("*.mp4"))[:4]
    (folder / "clips.csv").write_text("".join(f"{clip} 0\n" for clip in clips))
    content = CONFIG | {"data": CONFIG["data"] | {"datasets": [str(folder / "clips.csv")]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


def command_of(config: Path, run: Path, *more: str) -> list[str]:
    """The `vmjepa pretrain` command, as a list of words."""
    return [sys.executable, "-m", "vmjepa.cli", "pretrain", str(config), f"logging.folder={run}", *more]
