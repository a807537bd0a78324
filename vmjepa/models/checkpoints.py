"""Weights as safetensors files with a JSON description beside them, and strict loading that says what does not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vmjepa.errors import CheckpointError, storage_error

_SHOWN = 3


def save_weights(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes state to `path` (.safetensors) and metadata to the same name with .json, each complete or not at all.

    Raises StorageError when the disk refuses.
    """
    path = Path(path)
    # safetensors refuses tensors that share memory, and views; a contiguous copy of each is what is meant
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    description = json.dumps(metadata, indent=2, sort_keys=True) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path.with_suffix(".json"), lambda temporary: temporary.write_text(description))
        _replace(path, lambda temporary: save_file(tensors, temporary))
    except OSError as error:
        raise storage_error(error, f"writing {path}") from error
    except SafetensorError as error:  # it wraps the operating system's errors in its own
        raise storage_error(OSError(0, str(error)), f"writing {path}") from error


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State and metadata ({} where no JSON lies beside). Raises CheckpointError for a missing or damaged file."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"weights {path} do not exist; check the path")
    description = path.with_suffix(".json")
    try:
        state = load_file(path)
        metadata = json.loads(description.read_text()) if description.is_file() else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"weights {path} cannot be read ({error}); use another checkpoint") from error
    return state, metadata


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads a state dict that must fit name by name and shape by shape.

    Raises CheckpointError, with the first differences, when `source` holds another model's weights.
    """
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not part of the model" for name in state if name not in own]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"{source} holds weights of another model: {', '.join(problems[:_SHOWN])}{more}; "
            "use the config that it was trained with"
        )
    module.load_state_dict(state, strict=True)


def _replace(path: Path, write: Any) -> None:
    """Writes through a temporary file in the same folder, fsynced, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
