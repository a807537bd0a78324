"""Local launch: one process per device of this machine, through torchrun's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from pathlib import Path

from vmjepa.errors import EXIT_REQUEUE, ConfigError

DEVICES = "VMJEPA_DEVICES"
"""Variable that names the device of each local rank, with commas."""
LAUNCHED = "VMJEPA_LAUNCHED"
"""Environment variable: when a launcher of several ranks began, in seconds since the epoch."""


def is_rank() -> bool:
    """True inside a process that torchrun (or this launcher) started."""
    return "RANK" in os.environ


def rank_device() -> str | None:
    """The device the launcher chose for this rank; None leaves the choice to the rank."""
    devices = os.environ.get(DEVICES)
    return devices.split(",")[int(os.environ.get("LOCAL_RANK", "0"))] if devices else None


def launch(devices: list[str], arguments: list[str], stop_file: Path) -> int:
    """Runs `python -m vmjepa.cli ARGUMENTS` once per device and waits.

    SIGTERM, SIGUSR1 or Ctrl-C make `stop_file`, on which the ranks save and end together; a second Ctrl-C ends at once.

    Args:
        devices: names that `check_devices` has passed.

    Returns:
        0 when all ranks succeed, else the exit code of the rank that failed first (85 stays 85, 93 stays 93).
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[DEVICES] = ",".join(devices)
    os.environ[LAUNCHED] = str(time.time())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # said below, in one line
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda got, _: _ask_to_stop(got, stop_file))
    try:
        with tempfile.TemporaryDirectory(prefix="vmjepa-launch-") as scratch:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=len(devices),
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0",
                max_restarts=0,
                signals_to_handle="SIGHUP",
                logs_specs=DefaultLogsSpecs(log_dir=scratch),
            )
            elastic_launch(config, sys.executable)("-m", "vmjepa.cli", *arguments)
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        code = first.exitcode
        if code != EXIT_REQUEUE:
            print(f"error: rank {rank} ({devices[rank]}) ended first, with exit code {code}", file=sys.stderr)
        return code if 0 < code < 256 else 1
    return 0


def _ask_to_stop(number: int, stop_file: Path) -> None:
    if (stop_file.exists() and number == signal.SIGINT) or not stop_file.parent.is_dir():
        raise KeyboardInterrupt  # asked for twice, or nothing has begun
    stop_file.touch()


def check_devices(devices: list[str]) -> None:
    """Raises ConfigError unless every name is `cpu` or a GPU that exists, each GPU once, and all of one kind."""
    import torch

    for name in devices:
        kind, _, index = name.partition(":")
        if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or (kind == "cuda" and not index):
            raise ConfigError(f"--devices: {name!r} is no device; name cpu, or GPUs such as cuda:0 cuda:1")
        if kind == "cuda" and int(index) >= torch.cuda.device_count():
            raise ConfigError(f"--devices: there is no {name} here ({torch.cuda.device_count()} GPUs visible)")
        if kind == "cuda" and devices.count(name) > 1:
            raise ConfigError(f"--devices: {name} is named twice; give each rank a GPU of its own")
    if len({name.partition(":")[0] for name in devices}) > 1:
        raise ConfigError(f"--devices: {' '.join(devices)} mixes CPU and GPUs; name devices of one kind")
