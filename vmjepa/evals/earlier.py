"""What an evaluation's folder holds from before: results not to be overwritten, and the state to resume from."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from vmjepa.config import EvalConfig
from vmjepa.errors import CheckpointError, ConfigError
from vmjepa.evals.features import Pretrained
from vmjepa.run_dir import read_json
from vmjepa.train import checkpoint

PROBES, RESULTS, CONFIG = "probes.pt", "results.json", "config.yaml"
# Keys that change neither clips nor probes. The folder counts among them: results lie in it, however it is spelled.
_NO_MATTER = {
    "nodes",
    "tasks_per_node",
    "resume_checkpoint",
    "data.num_workers",
    "optimization.threads_per_rank",
    "pretrain.folder",
    "pretrain.checkpoint",  # what it stands for is compared
}
_STATE = {"config", "checkpoint", "epochs", "result", "statistics", "heads"}


def output_folder(cfg: EvalConfig) -> Path:
    """Where an evaluation writes.

    Raises:
        ConfigError: `tag` is not the name of one folder.
    """
    name = cfg.tag or cfg.eval_name
    if name in (".", "..") or not name.isprintable() or set(name) & set("/\\"):
        raise ConfigError(
            f"tag: {name!r} is not the name of a folder inside {cfg.pretrain.folder}/evals; "
            "use letters, digits, - and _, such as ssv2-16x2x3"
        )
    return Path(cfg.pretrain.folder) / "evals" / name


def identity(pretrained: Pretrained) -> dict[str, str]:
    """What tells a checkpoint from all others: its name and its weights' SHA-256."""
    files = read_json(pretrained.checkpoint / checkpoint.STATE)["files"]
    return {"name": pretrained.checkpoint.name, "sha256": files[checkpoint.MODEL]["sha256"]}


def protect_results(out: Path, cfg: EvalConfig, pretrained: Pretrained) -> None:
    """Refuses to go on where `out` holds results of another evaluation.

    Raises:
        ConfigError: it does, or they cannot be read.
    """
    if not (out / RESULTS).exists():
        return
    try:
        results = read_json(out / RESULTS)
        before = {"name": results["checkpoint"], "sha256": results["checkpoint_sha256"]}
        text = (out / CONFIG).read_text(encoding="utf-8")
        differing = differences(text, before, cfg, pretrained)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"tag: {out} holds earlier results, but not legibly with what they were made from "
            f"({type(error).__name__}: {' '.join(str(error).split())}); use another tag, or move that folder away"
        ) from error
    if differing:
        raise ConfigError(f"tag: {out} holds results of another evaluation ({differing}); use another tag")


def saved_state(out: Path, cfg: EvalConfig, pretrained: Pretrained, device: torch.device) -> dict[str, Any] | None:
    """The probes to resume from, tensors on `device`; None when none were saved.

    Raises:
        CheckpointError: the file is damaged.
        ConfigError: it belongs to another config or checkpoint.
    """
    path = out / PROBES
    if not path.exists():
        return None
    data = path.read_bytes()
    try:
        damaged = zipfile.ZipFile(io.BytesIO(data)).testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise ValueError(f"{damaged} does not match its checksum")
        state = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        if state.keys() != _STATE:
            raise ValueError(f"it does not hold {', '.join(sorted(_STATE))}")
        differing = differences(state["config"], state["checkpoint"], cfg, pretrained)
    except Exception as error:  # damaged bytes fail in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{path} is damaged ({reason[:200]}); remove it, or set resume_checkpoint=false, to train the probes anew"
        ) from error
    if differing:
        raise ConfigError(
            f"resume_checkpoint: {path} belongs to another evaluation ({differing}); "
            "use another tag, or resume_checkpoint=false to start over"
        )
    return state


def differences(config: str, checkpoint_before: dict[str, str], cfg: EvalConfig, pretrained: Pretrained) -> str:
    """How an earlier evaluation (its config as YAML, its checkpoint's identity) differs from this one; "" if nowise."""
    before, now = dict(_leaves(yaml.safe_load(config))), dict(_leaves(cfg.model_dump(mode="json")))
    found = [
        f"{key} was {_shown(before, key)} and is {_shown(now, key)}"
        for key in dict.fromkeys([*now, *before])
        if key not in _NO_MATTER and _shown(before, key) != _shown(now, key)
    ]
    this = identity(pretrained)
    if checkpoint_before != this:
        name = checkpoint_before["name"]
        same = f"the weights of {name} have changed"
        found.insert(0, same if name == this["name"] else f"the checkpoint was {name} and is {this['name']}")
    return "; ".join(found[:3]) + (f"; {len(found) - 3} more" if found[3:] else "")


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "not set"
