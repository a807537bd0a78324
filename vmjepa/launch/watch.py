"""The commands that watch and steer runs by way of their directories; each is registered in vmjepa/cli.py."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vmjepa.errors import ConfigError
from vmjepa.launch.status import RunView, find_runs, table, view
from vmjepa.lease import lost_holder
from vmjepa.run_dir import RunDir

Run = Annotated[Path, typer.Argument(help="run directory, e.g. runs/mine")]
_POLL_S = 0.5


def status(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="run directories, or folders of them (default: runs)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Show what runs are doing, and why those that failed did.

    Example: vmjepa status runs/mine
    """
    views = [view(run) for run in find_runs(runs or [Path("runs")])]
    if as_json:
        print(json.dumps([asdict(view) for view in views], indent=1))
    else:
        in_pipe = None if sys.stdout.isatty() else 200  # a table cut at 80 columns would lose what `grep` looks for
        Console(width=in_pipe).print(table(views))


def stop(run: Run) -> None:
    """Ask a running job to save and end; the command that started it continues it.

    Example: vmjepa stop runs/mine
    """
    found = _running(run)
    (RunDir(run).control / "stop").touch()
    print(f"{run}: will finish its step after {_place(found)}, save and end with exit code 85 (resumable)")


def save(run: Run) -> None:
    """Ask a running job for a checkpoint; it goes on afterwards.

    Example: vmjepa save runs/mine
    """
    found = _running(run)
    (RunDir(run).control / "save").touch()
    print(f"{run}: will finish its step after {_place(found)}, save and go on")


def _running(run: Path) -> RunView:
    """The run's view. Raises ConfigError unless a job may be there to see a request."""
    one = RunDir(run)
    if [found.root for found in find_runs([run])] != [one.root]:
        raise ConfigError(f"{run}: this is a folder of runs; name one of them")
    found = view(one)
    if found.state not in ("running", "silent") or lost_holder(one) is not None:
        reason = f": {found.reason}" if found.reason else ""
        raise ConfigError(f"{run}: no job is running there ({found.state}{reason}), so nothing was asked for")
    return found


def _place(found: RunView) -> str:
    silent = f" (if it is alive: {found.reason})" if found.state == "silent" else ""
    return f"{found.step} of {found.total_steps or '?'}{silent}"


def logs(
    run: Run,
    rank: Annotated[int, typer.Option(help="whose log")] = 0,
    attempt: Annotated[int | None, typer.Option(help="number of the start (default: the newest)")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until the job ends")] = False,
) -> None:
    """Print what a rank of a job wrote to stderr.

    Example: vmjepa logs runs/mine --rank 1 --follow
    """
    folder = RunDir(run)
    number = attempt or folder.last_attempt()
    path = folder.log(number, rank)
    if not path.is_file():
        there = sorted(p.stem.removeprefix("rank_") for p in path.parent.glob("rank_*.log"))
        known = f"attempt {number} has logs of rank {', '.join(there)}" if there else f"{folder.attempts} has none"
        raise ConfigError(f"{path}: no such log; {known}")
    with open(path, errors="replace") as file, suppress(KeyboardInterrupt):
        while True:
            goes_on = follow and number == folder.last_attempt() and view(folder).state in ("running", "silent")
            sys.stdout.write(file.read())
            sys.stdout.flush()
            if not goes_on:
                return
            time.sleep(_POLL_S)
