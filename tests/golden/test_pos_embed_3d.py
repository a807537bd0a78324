"""Sin-cos tables against reference tables, in fp64 and after the cast to fp32."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.golden.vectors import Vectors, assert_forward
from vmjepa.errors import ConfigError
from vmjepa.models.positions import sincos_1d, sincos_2d, sincos_3d

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def vectors(golden_dir: Path) -> Vectors:
    return Vectors(golden_dir / "pos_embed_3d.npz")


def _table(name: str) -> torch.Tensor:
    """Our table for an array whose name tells its kind and sizes."""
    size = {key: int(value) for key, value in re.findall(r"(dim|grid|depth|up|_n)(\d+)", name)}
    if name.startswith("sincos1d"):
        return sincos_1d(size["dim"], size["_n"])
    if name.startswith("sincos2d"):
        return sincos_2d(size["dim"], size["grid"], size["grid"])
    grid = (size["depth"], size["grid"], size["grid"])
    return sincos_3d(size["dim"], *grid, uniform_power=bool(size["up"]), cls_token="_cls" in name)


def test_every_table(vectors: Vectors, subtests: pytest.Subtests) -> None:
    names = [name for name in vectors.names() if re.match(r"sincos|paper_grid", name)]
    assert names
    for name in names:
        with subtests.test(table=name):
            expected, table = vectors[name], _table(name)
            if name.endswith("_rows"):
                table = table[vectors["paper_rows"].long()]
            assert table.dtype == torch.float64
            assert_forward(table, expected, TOLERANCE, name)
            assert torch.equal(table.float(), expected.float()), f"{name}: differs after the cast to fp32"


def test_axes_that_raise(vectors: Vectors) -> None:
    for note in vectors.config["notes"]:
        with pytest.raises(ConfigError, match="odd"):
            sincos_3d(note["dim"], note["depth"], note["grid"], note["grid"], uniform_power=note["uniform_power"])
