"""The scan benchmark: its two variants compute the same, and the command reports them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import bench

ROOT = Path(__file__).resolve().parent.parent


def test_variants_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CHANNELS", 8)
    inputs = bench._inputs(21)
    ours, loop = (scan(*inputs) for scan in bench.VARIANTS.values())
    torch.testing.assert_close(ours, loop, rtol=1e-4, atol=1e-4)


def test_the_benchmark_reports_both_variants() -> None:
    """A short run of the command; memory is repeatable, so its limit is held, times are not."""
    command = [sys.executable, "-m", "tools.bench", "scan", "--json", "--rounds", "1", "--calls", "1"]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    assert set(result["variants"]) == set(bench.VARIANTS)
    assert result["variants"]["chunked scan (ours)"]["added_gib"] <= bench.WANTED_GIB, result
