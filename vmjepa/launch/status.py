"""What runs are doing, told from their directories: status.json, the errors of ranks, the attempts. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vmjepa.errors import ConfigError
from vmjepa.lease import lost_holder
from vmjepa.run_dir import RunDir
from vmjepa.run_status import first_error, read_status

SILENT_S = 180.0  # the heartbeat comes every 30 s, or once a step where steps are longer
_START_S = 1800.0  # before the first step: models are built, kernels compiled, caches filled
_STYLES = {"running": "green", "done": "cyan", "failed": "bold red", "silent": "bold yellow"}


@dataclass(frozen=True)
class RunView:
    """One run. state: new, running, stopped, done, failed, or silent (no heartbeat for long). Times in seconds."""

    name: str
    folder: str
    state: str
    reason: str | None
    step: int
    total_steps: int | None
    epoch: int | None
    loss: float | None
    skill: float | None
    clips_per_s: float | None
    data_wait: float | None
    seconds_left: float | None
    restarts: int
    host: str | None
    heartbeat_age: float | None


def find_runs(paths: Sequence[Path]) -> list[RunDir]:
    """Run directories among `paths` and directly inside them, in the order given.

    Raises:
        ConfigError: when a path is no folder, or holds no run.
    """
    runs = []
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path}: no such folder; name a run directory, or a folder of them")
        found = [RunDir(path)] if _is_run(path) else [RunDir(p) for p in sorted(path.iterdir()) if _is_run(p)]
        if not found:
            raise ConfigError(f"{path}: no run here; name a run directory (it holds status.json), or a folder of them")
        runs += found
    return runs


def _is_run(path: Path) -> bool:
    run = RunDir(path)
    return run.status.is_file() or run.attempts.is_dir()


def view(run: RunDir) -> RunView:
    """Reads a run directory."""
    status = read_status(run)
    metrics: dict[str, Any] = status.get("metrics", {})
    age = max(0.0, time.time() - status["time"]) if "time" in status else None
    state, reason = _state(run, status, age)
    step, total = int(status.get("step", 0)), status.get("total_steps")
    left = (
        metrics["step_seconds"] * (total - step) if state == "running" and total and "step_seconds" in metrics else None
    )
    return RunView(
        name=run.root.resolve().name,
        folder=str(run.root),
        state=state,
        reason=reason,
        step=step,
        total_steps=total,
        epoch=metrics.get("epoch"),
        loss=metrics.get("loss"),
        skill=metrics.get("skill"),
        clips_per_s=metrics.get("clips_per_s"),
        data_wait=metrics.get("data_wait"),
        seconds_left=left,
        restarts=max(0, run.last_attempt() - 1),
        host=status.get("host"),
        heartbeat_age=age,
    )


def _state(run: RunDir, status: dict[str, Any], age: float | None) -> tuple[str, str | None]:
    if age is None:
        return "new", None
    state, attempt = status["state"], status.get("attempt")
    if state in ("running", "failed") and attempt is not None:
        error = first_error(run, attempt)
        if error is not None:
            return "failed", f"rank {error['rank']} on {error['host']}: {error['reason']}"
    lost = lost_holder(run) if state == "running" else None
    if lost is not None:
        return "silent", f"{lost} has died without a word"
    if state == "running":
        metrics = status.get("metrics", {})
        patience = _START_S if status.get("phase") == "starting" else max(SILENT_S, 10 * metrics.get("step_seconds", 0))
        if age > patience:
            return (
                "silent",
                f"no heartbeat from process {status.get('pid')} on {status.get('host')} for {duration(age)}",
            )
    return state, status.get("reason") if state == "failed" else None


def table(views: Sequence[RunView]) -> RenderableType:
    """A row per run, and below it the reasons of those that failed or fell silent."""
    grid = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    grid.add_column("run", no_wrap=True)
    grid.add_column("state", no_wrap=True)
    for name in ("step", "epoch", "loss", "skill", "clips/s", "wait", "left", "restarts"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("host", overflow="fold")
    grid.add_column("heartbeat", justify="right", no_wrap=True)
    for one in views:
        grid.add_row(
            Text(one.name),
            Text(one.state, _STYLES.get(one.state, "")),
            f"{one.step}/{one.total_steps or '?'}",
            _number(one.epoch, "d"),
            _number(one.loss, ".4f"),
            _number(one.skill, ".3f"),
            _number(one.clips_per_s, ".1f"),
            _number(one.data_wait, ".0%"),
            _seconds(one.seconds_left),
            str(one.restarts),
            Text(one.host or "-"),
            _seconds(one.heartbeat_age),
        )
    reasons = [Text.assemble((f"{one.name}: ", "bold"), one.reason) for one in views if one.reason]
    return Group(grid, *reasons)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _seconds(value: float | None) -> str:
    return "-" if value is None else duration(value)


def duration(seconds: float) -> str:
    """12 s, 3 min, 2 h 05 min or 3 d 4 h."""
    minutes = int(seconds // 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
