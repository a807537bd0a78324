"""Pictures drawn from metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vmjepa.errors import DataError
from vmjepa.plots import draw_curves, read_metrics, smoothed


def test_half_written_last_line_is_ignored_and_later_lines_stand(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [rows[0], rows[2]]


def test_run_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl is missing"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="no logged step yet"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_smoothing_keeps_a_line_and_its_length() -> None:
    """The mean over a window of 5 of 40 points: a straight line stays one away from its ends."""
    line = [2.0 * i for i in range(40)]
    assert smoothed(line)[2:-2] == pytest.approx(line[2:-2])
    assert len(smoothed(line)) == 40
    assert smoothed([1.0]) == [1.0]


def test_curves_are_drawn_with_keys_missing(tmp_path: Path) -> None:
    metrics = [{"step": s, "loss": 1 / s, "skill": 0.1 * s, "grad_norm_encoder": 1e-3} for s in range(1, 30)]
    metrics[10]["rank"] = 20.0
    draw_curves(metrics, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
