"""Shared fixtures. Test data lies outside the repository; tests that need it skip, saying so, where it is absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # numeric tests compare runs bit by bit


def _outside(variable: str, default: str, what: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT / ".." / "shared" / default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"{what} not found at {folder}; set {variable} to its folder")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of reference vectors (*.npz), from VMJEPA_GOLDEN."""
    return _outside("VMJEPA_GOLDEN", "golden", "golden vectors")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real clips (actions/, zoo/), from VMJEPA_DATA."""
    return _outside("VMJEPA_DATA", "data", "real clips")


@pytest.fixture(scope="session")
def _joined_world():
    """Joins a world of one rank once; returns it and the variables that name it."""
    from vmjepa.train.distributed import init_world

    before = dict(os.environ)
    world = init_world("cpu")
    names = {name: value for name, value in os.environ.items() if before.get(name) != value}
    os.environ.clear()  # else commands started by other tests would take themselves for ranks
    os.environ.update(before)
    return world, names


@pytest.fixture
def single_world(_joined_world, monkeypatch):
    """A world of one rank on the CPU, inside the test process."""
    world, names = _joined_world
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    return world
