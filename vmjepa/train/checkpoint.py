"""Checkpoints that are whole or absent, verify when loaded, and resume at any number of ranks and any ZeRO stage.

checkpoints/step_XXXXXXXX/ holds model.safetensors (encoder.*, predictor.*, target_encoder.*), optimizer.safetensors
(exp_avg.NAME, exp_avg_sq.NAME) and state.json (step, sizes and SHA-256 of the files). Writing goes to a temporary
folder that is synced and renamed; loading walks back from the newest to the first that verifies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from vmjepa.errors import CheckpointError, storage_error
from vmjepa.run_dir import RunDir, read_json, sync_folder

log = logging.getLogger(__name__)
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """What a run continues from.

    step: optimizer steps done. model: encoder.*, predictor.*, target_encoder.*. optimizer: as Engine.optimizer_state.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]


def save(run: RunDir, checkpoint: Checkpoint, extra: dict[str, Any], keep: int) -> Path:
    """Publishes a checkpoint and removes all but the newest `keep`. Call on one rank.

    Raises:
        StorageError: when the disk is full or refuses; earlier checkpoints are then intact.
    """
    final = run.checkpoints / f"step_{checkpoint.step:08d}"
    temporary = run.checkpoints / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        moments = {
            f"{key}.{name}": value
            for key, values in checkpoint.optimizer.items()
            if key != "step"
            for name, value in values.items()
        }
        _write_tensors(temporary / MODEL, checkpoint.model)
        _write_tensors(temporary / OPTIMIZER, moments)
        files = {name: _fingerprint(temporary / name) for name in (MODEL, OPTIMIZER)}
        state = {"version": _VERSION, "step": checkpoint.step, "optimizer_step": checkpoint.optimizer["step"]}
        _write_text(temporary / STATE, json.dumps(state | {"files": files} | extra, indent=1))
        sync_folder(temporary)
        if final.exists():  # an earlier one of this step that did not verify
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync_folder(run.checkpoints)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise storage_error(error, f"saving the checkpoint of step {checkpoint.step} to {final}") from error
    for old in _folders(run)[keep:]:
        if old != final:  # damaged ones with higher numbers must not push out the only good one
            shutil.rmtree(old, ignore_errors=True)
    return final


def latest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint folder of a run directory whose files verify; None when there is no checkpoint at all.

    Raises:
        CheckpointError: when there are checkpoints but none verifies.
    """
    run = RunDir(run_dir)
    folders = _folders(run)
    for folder in folders:
        fault = verify(folder)
        if fault is None:
            return folder
        log.warning("checkpoint %s does not verify (%s); trying the one before", folder, fault)
    if folders:
        raise CheckpointError(
            f"none of the {len(folders)} checkpoints in {run.checkpoints} verifies ({folders[0].name}: "
            f"{verify(folders[0])}); restore one from a backup, or move the folder away to start anew"
        )
    return None


def verify(folder: Path) -> str | None:
    """None when all files are there with the recorded size and SHA-256, else what is wrong."""
    try:
        files = dict(read_json(folder / STATE)["files"])
        files = {name: {"size": int(entry["size"]), "sha256": entry["sha256"]} for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE} is missing or unreadable: {error}"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        if _fingerprint(path) != expected:
            return f"{name} does not match its SHA-256"
    return None


def load(folder: Path) -> Checkpoint:
    """Reads a verified checkpoint folder."""
    state = read_json(folder / STATE)
    if state.get("version") != _VERSION:
        raise CheckpointError(
            f"{folder}: checkpoint version {state.get('version')} is not {_VERSION}; use the vmjepa that wrote it"
        )
    optimizer: dict[str, Any] = {"step": state["optimizer_step"], "exp_avg": {}, "exp_avg_sq": {}}
    for key, value in load_file(folder / OPTIMIZER).items():
        moment, _, name = key.partition(".")
        optimizer[moment][name] = value
    return Checkpoint(state["step"], load_file(folder / MODEL), optimizer)


def resolve(path: str | Path) -> Path:
    """A checkpoint folder, from the folder itself or a run directory (then its newest).

    Raises:
        CheckpointError: when there is none, or it does not verify.
    """
    folder = Path(path)
    if not (folder / STATE).is_file():
        newest = latest(folder)
        if newest is None:
            raise CheckpointError(f"{folder}: no checkpoint there; name a step_XXXXXXXX folder or a run directory")
        return newest
    fault = verify(folder)
    if fault is not None:
        raise CheckpointError(f"{folder} does not verify ({fault}); choose another checkpoint")
    return folder


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The entries under `name.`, without that prefix."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def check_fits(folder: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compares names and shapes.

    Raises:
        CheckpointError: naming the first parameters that differ, when the checkpoint is of another model.
    """
    differences = [f"{n} missing" for n in expected if n not in found] + [
        f"{n} unknown" for n in found if n not in expected
    ]
    differences += [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if differences:
        shown = "; ".join(differences[:3]) + (f"; {len(differences) - 3} more" if len(differences) > 3 else "")
        raise CheckpointError(
            f"{folder} is a checkpoint of another model ({shown}); use the config it was trained with, or another "
            "logging.folder"
        )


def load_encoder_state(folder: Path, key: str = "target_encoder") -> dict[str, Tensor]:
    """Weights of one encoder of a checkpoint folder, without prefix. key: target_encoder or encoder."""
    state = part(load_file(folder / MODEL), key)
    if not state:
        raise CheckpointError(f"{folder}: holds no {key}; checkpoint_key is target_encoder or encoder")
    return state


def _folders(run: RunDir) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in run.checkpoints.glob("step_*") if p.is_dir()), key=lambda p: p.name, reverse=True)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # safetensors reports a full disk as its own error type; the file is rebuilt from the OS error it carries
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    except Exception as error:
        _raise_os_error(error)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _raise_os_error(error: Exception) -> None:
    code = re.search(r"os error (\d+)", str(error))
    if code is None:
        raise error
    number = int(code.group(1))
    raise OSError(number, os.strerror(number)) from error


def _write_text(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}
