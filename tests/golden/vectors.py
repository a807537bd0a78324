"""Reads reference vectors and compares with them by the rule of the vectors' own description.

A forward array passes when its largest absolute difference is below a tolerance, a gradient array when its largest
difference relative to the largest entry of the whole array is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Vectors:
    """One file of vectors: config (the dict in config_json) and arrays as tensors."""

    def __init__(self, path: Path) -> None:
        self._arrays = np.load(path, allow_pickle=False)
        self.config: dict[str, Any] = json.loads(str(self._arrays["config_json"]))

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def names(self, prefix: str = "") -> list[str]:
        """Array names that start with prefix."""
        return [name for name in self._arrays.files if name.startswith(prefix)]

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self._arrays[name]))

    def case(self, number: int) -> str:
        """The prefix of a numbered case, however many digits its name pads the number to."""
        heads = {name.split("/")[0] for name in self.names("case")}
        return next(f"{head}/" for head in heads if int(head.removeprefix("case")) == number)

    def strings(self, name: str) -> list[str]:
        """An array of text."""
        return [str(text) for text in self._arrays[name]]

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        """A state dict: the arrays below prefix, the prefix and wrappers' `backbone.` removed from their names."""
        cut = len(prefix)
        return {name[cut:].removeprefix("backbone."): self[name] for name in self.names(prefix)}


def assert_forward(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """Largest absolute difference at most tolerance; shapes equal."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error = (actual.detach().double() - expected.double()).abs().max().item()
    assert error <= tolerance, f"{name}: differs by {error:.3g}, more than {tolerance:.1g}"


def assert_grad(actual: torch.Tensor | None, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """Largest difference at most tolerance times the largest entry of the expected gradient; shapes equal."""
    assert actual is not None, f"{name}: no gradient"
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    scale = expected.double().abs().max().item()
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * scale, f"{name}: differs by {error / scale:.3g} of its maximum, above {tolerance:.1g}"


def assert_module_grads(module: torch.nn.Module, vectors: Vectors, prefix: str, tolerance: float) -> None:
    """Every gradient stored below prefix against the gradient of the parameter of that name."""
    parameters = dict(module.named_parameters())
    stored = vectors.state(prefix)
    assert stored, f"no gradients below {prefix}"
    for name, expected in stored.items():
        assert_grad(parameters[name].grad, expected, tolerance, f"{prefix}{name}")
