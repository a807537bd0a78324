"""The commands that watch and steer runs by way of their directories; each is registered in vmjepa/cli.py."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vmjepa.launch import status as run_views


def status(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="run directories, or folders of them (default: runs)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Show what runs are doing, and why those that failed did.

    Example: vmjepa status runs/mine
    """
    views = [run_views.view(run) for run in run_views.find_runs(runs or [Path("runs")])]
    if as_json:
        print(json.dumps([asdict(view) for view in views], indent=1))
    else:
        in_pipe = None if sys.stdout.isatty() else 200  # a table cut at 80 columns would lose what `grep` looks for
        Console(width=in_pipe).print(run_views.table(views))
