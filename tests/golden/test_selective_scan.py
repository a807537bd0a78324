"""The selective scan against reference outputs, last states and gradients, in fp64, every layout of B and C."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.golden.vectors import Vectors, assert_forward, assert_grad
from vmjepa.models.scan import selective_scan

TOLERANCE = 1e-12
INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


@pytest.fixture(scope="module")
def vectors(golden_dir: Path) -> Vectors:
    return Vectors(golden_dir / "selective_scan.npz")


def test_every_case(vectors: Vectors, subtests: pytest.Subtests) -> None:
    for case in vectors.config["cases"]:
        prefix = vectors.case(case["case"])
        with subtests.test(**case):
            inputs = {k: vectors[prefix + k].requires_grad_() for k in INPUTS if prefix + k in vectors}
            out, last = selective_scan(**inputs, delta_softplus=bool(case["delta_softplus"]), return_last_state=True)
            (out * vectors[prefix + "R"]).sum().backward()
            assert out.dtype == torch.float64
            assert_forward(out, vectors[prefix + "out"], TOLERANCE, prefix + "out")
            assert_forward(last, vectors[prefix + "last_state"], TOLERANCE, prefix + "last_state")
            for name, tensor in inputs.items():
                assert_grad(tensor.grad, vectors[f"{prefix}grad_{name}"], TOLERANCE, f"{prefix}grad_{name}")
