"""Pictures for reports, drawn from metrics.jsonl.

python -m vmjepa.plots runs/NAME curves.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmjepa.errors import DataError, handle_errors

# Panel title, axis scale, and the curves in it as (key in metrics.jsonl, legend).
PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("loss", "linear", (("loss", "mean |prediction - target|"),)),
    ("prediction skill (0: batch mean, 1: perfect)", "linear", (("skill", "skill"),)),
    ("rank of target features (RankMe)", "linear", (("rank", "features"), ("rank_content", "position means removed"))),
    ("gradient norm", "log", (("grad_norm_encoder", "encoder"), ("grad_norm_predictor", "predictor"))),
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps, in order, the last line of each step standing (a resumed run logs some steps twice).

    Raises DataError when the file is missing or holds no step.
    """
    steps: dict[int, dict[str, Any]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):  # a killed run may leave half a line
                row = json.loads(line)
                steps[row["step"]] = row
    except FileNotFoundError:
        raise DataError(f"{path} is missing; give the directory of a run that has logged at least one step") from None
    if not steps:
        raise DataError(f"{path} holds no logged step yet; wait until the run has made monitor.every_steps steps")
    return [steps[step] for step in sorted(steps)]


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred means over about a tenth of the curve; at the ends over what is there."""
    half = len(values) // 20
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw_curves(metrics: list[dict[str, Any]], png: Path, title: str) -> None:
    """Four panels over the optimizer step, each curve as logged (thin) and smoothed; keys never logged are left out."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    for axis, (name, scale, curves) in zip(axes.flat, PANELS, strict=True):
        for key, legend in curves:
            points = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                (line,) = axis.plot(steps, values, linewidth=0.8, alpha=0.35)
                axis.plot(steps, smoothed(values), label=legend, color=line.get_color(), linewidth=1.8)
        axis.set(title=name, xlabel="optimizer step", yscale=scale)
        axis.grid(alpha=0.3)
        if len(curves) > 1 and axis.lines:
            axis.legend()
    figure.suptitle(title)
    figure.savefig(png, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory that holds metrics.jsonl")
    parser.add_argument("png", type=Path, help="picture to write")
    arguments = parser.parse_args()
    with handle_errors():
        draw_curves(read_metrics(arguments.run / "metrics.jsonl"), arguments.png, arguments.run.name)


if __name__ == "__main__":
    main()
