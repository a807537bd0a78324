"""The bidirectional mixer against reference outputs and gradients, fp64 first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.golden.vectors import Vectors, assert_forward, assert_grad, assert_module_grads
from vmjepa.models.mixer import BiMamba

# dtype: (largest difference of the output, of a gradient relative to its maximum)
TOLERANCES = {torch.float64: (1e-12, 1e-12), torch.float32: (5e-6, 1e-5)}


@pytest.fixture(scope="module")
def vectors(golden_dir: Path) -> Vectors:
    return Vectors(golden_dir / "bimamba_block.npz")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp64", "fp32"])
def test_output_and_gradients(vectors: Vectors, subtests: pytest.Subtests, dtype: torch.dtype) -> None:
    config, (forward, gradient) = vectors.config, TOLERANCES[dtype]
    for number, case in enumerate(config["cases"]):
        with subtests.test(**case):
            prefix = vectors.case(number)
            stored = f"{prefix}{'fp64' if dtype == torch.float64 else 'fp32'}/"
            mixer = BiMamba(case["d_model"], case["d_state"], config["d_conv"], config["expand"])
            mixer.load_state_dict(vectors.state(f"{prefix}param/"))
            mixer.to(dtype)
            x = vectors[f"{prefix}x"].to(dtype).requires_grad_()
            out = mixer(x)
            (out * vectors[f"{prefix}R"].to(dtype)).sum().backward()
            assert_forward(out, vectors[f"{stored}out"], forward, f"{stored}out")
            assert_grad(x.grad, vectors[f"{stored}grad_x"], gradient, f"{stored}grad_x")
            assert_module_grads(mixer, vectors, f"{stored}grad/", gradient)
