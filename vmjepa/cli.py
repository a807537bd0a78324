"""The `vmjepa` command. Thin: each subcommand loads its config, then calls the part that does the work."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from vmjepa.errors import handle_errors
from vmjepa.launch import local, watch
from vmjepa.lease import refuse_if_held
from vmjepa.run_dir import RunDir
from vmjepa.run_status import failures_shown

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Config = Annotated[Path, typer.Argument(help="YAML file, e.g. configs/pretrain/demo.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, e.g. optimization.lr=1e-4")]
Devices = Annotated[list[str] | None, typer.Option(help="one rank per device: --devices cuda:0 cuda:1, or cpu cpu")]


@app.callback()
def root() -> None:
    """Pretrains VideoMamba encoders with V-JEPA and probes what they learned."""


@app.command()
def pretrain(config: Config, overrides: Overrides = None, devices: Devices = None) -> None:
    """Pretrain, or resume, the run that CONFIG describes.

    Example: vmjepa pretrain configs/pretrain/demo.yaml optimization.epochs=2 --devices cpu cpu
    """
    from vmjepa.config import load_pretrain
    from vmjepa.config_load import run_folder

    with failures_shown(run_folder(config, overrides or [])):
        cfg = load_pretrain(config, overrides or [])
        if devices and not local.is_rank():
            local.check_devices(devices)
    _say_once(cfg.notices)
    run_dir = RunDir(cfg.logging.folder)
    if not local.is_rank():
        refuse_if_held(run_dir)  # before Ctrl-C can reach the job that runs there
    if devices and not local.is_rank() and len(devices) > 1:
        stop_file = run_dir.control / "stop"
        sys.exit(local.launch(devices, ["pretrain", str(config), *(overrides or [])], stop_file))
    from vmjepa.train.pretrain import pretrain as run

    sys.exit(run(cfg, devices[0] if devices else local.rank_device()))


@app.command()
def evaluate(config: Config, overrides: Overrides = None, device: Annotated[str | None, typer.Option()] = None) -> None:
    """Probe the frozen target encoder that CONFIG names, beside a randomly initialised one.

    Example: vmjepa evaluate configs/evals/demo.yaml pretrain.folder=runs/demo
    """
    from vmjepa.config import load_eval

    cfg = load_eval(config, overrides or [])
    _say_once(cfg.notices)
    from vmjepa.evals.video import evaluate as run

    run(cfg, device)


for command in (watch.status, watch.stop, watch.save, watch.logs):
    app.command()(command)


submit_app = typer.Typer(no_args_is_help=True)
app.add_typer(submit_app, name="submit", help="Submit a job to a cluster: one profile per site, see configs/clusters/.")


@submit_app.command("pretrain")
def submit_pretrain(
    config: Config,
    overrides: Overrides = None,
    cluster: Annotated[str, typer.Option(help="profile in configs/clusters/, or the path of one")] = "local",
    nodes: Annotated[int | None, typer.Option(min=1, help="computers; the profile's number when left out")] = None,
    folder: Annotated[Path | None, typer.Option(help="run directory, instead of the config's logging.folder")] = None,
    partition: Annotated[str | None, typer.Option(help="partition, instead of the profile's")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key.sub=value for the profile")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the job script and do nothing else")] = False,
) -> None:
    """Pretrain as a job that saves before its time is up, goes back into the queue, and goes on.

    Example: vmjepa submit pretrain configs/pretrain/demo.yaml --cluster slurm-bare --nodes 2 --partition gpu
    """
    from vmjepa.launch import submit
    from vmjepa.launch.render import render

    changes = [*(settings or []), *([f"slurm.partition={partition}"] if partition is not None else [])]
    request = submit.Request(config, overrides or [], cluster, changes, nodes, folder)
    cfg, job = submit.pretrain_job(request, Path.cwd())
    _say_once(cfg.notices)
    if dry_run:
        print(render("pretrain", job), end="")
    else:
        sys.exit(submit.submit(job, cfg))


def _say_once(notices: list[str]) -> None:
    if os.environ.get("RANK", "0") == "0":
        for notice in notices:
            print(f"note: {notice}", file=sys.stderr)


def spread_devices(arguments: list[str]) -> list[str]:
    """Turns `--devices a b` into `--devices a --devices b`, which the parser understands."""
    spread: list[str] = []
    listing = False
    for word in arguments:
        if word == "--devices":
            listing = True
        elif listing and not word.startswith("-") and "=" not in word:
            spread += ["--devices", word]
        else:
            listing = False
            spread.append(word)
    if arguments and "--devices" in arguments and "--devices" not in spread:
        spread.append("--devices")  # nothing followed it: let the parser say so
    return spread


def main() -> None:
    """Entry point of the `vmjepa` script."""
    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    prefix = f"rank {rank}: " if rank else ""
    logging.basicConfig(level=logging.WARNING, format=f"{prefix}%(levelname)s: %(message)s", stream=sys.stderr)
    with handle_errors():
        app(spread_devices(sys.argv[1:]))


if __name__ == "__main__":
    main()
