"""The attentive probe against V-JEPA's: logits, pooled token and gradients at depth 1 and more. fp64 first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.golden.vectors import Vectors, assert_forward, assert_grad, assert_module_grads
from vmjepa.models.probe import AttentiveClassifier

FP64, FP32, GRADIENT = 1e-12, 1e-6, 1e-5


def test_every_case(golden_dir: Path, subtests: pytest.Subtests) -> None:
    vectors = Vectors(golden_dir / "attentive_classifier.npz")
    for number, case in enumerate(vectors.config["cases"]):
        with subtests.test(**case):
            prefix = vectors.case(number)
            probe = AttentiveClassifier(case["embed_dim"], case["num_heads"], case["num_classes"], case["depth"])
            probe.load_state_dict(vectors.state(f"{prefix}param/"))
            x = vectors[f"{prefix}x"]
            logits = probe.double()(x.double())
            assert_forward(logits, vectors[f"{prefix}fp64/logits"], FP64, "fp64/logits")
            probe.to(torch.float32)
            x.requires_grad_()
            logits = probe(x)
            (logits * vectors[f"{prefix}R"]).sum().backward()
            assert_forward(logits, vectors[f"{prefix}logits"], FP32, "logits")
            assert_forward(probe.pooler(x)[:, 0], vectors[f"{prefix}pooled"], FP32, "pooled")
            assert_grad(x.grad, vectors[f"{prefix}grad_x"], GRADIENT, "grad_x")
            assert_module_grads(probe, vectors, f"{prefix}grad/", GRADIENT)
