"""Process group set-up and the few collectives the trainer needs, on gloo (CPU) or NCCL (GPU)."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import warnings
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vmjepa.errors import ConfigError

T = TypeVar("T")
_TIMEOUT = datetime.timedelta(hours=2)  # the watchdog, which names the rank that hangs, should come first
_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run."""

    rank: int
    size: int
    device: torch.device


def init_world(device: str | None = None) -> World:
    """Joins the processes that torchrun started, or makes a world of one when none did.

    Args:
        device: "cpu", "cuda:1", …; None picks cuda:LOCAL_RANK when there is a GPU.

    Raises:
        ConfigError: when only some of torchrun's variables are set (a world of one would then train N times
            independently), or the processes cannot find each other.
    """
    launched = [name for name in _LAUNCH_VARIABLES if name in os.environ]
    if not launched:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    elif len(launched) < len(_LAUNCH_VARIABLES):
        missing = ", ".join(sorted(set(_LAUNCH_VARIABLES) - set(launched)))
        raise ConfigError(
            f"the environment has {', '.join(launched)} but not {missing}; start all ranks with torchrun, or unset them"
        )
    rank, size, local_rank = (_whole_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank >= size:
        raise ConfigError(f"RANK is {rank} but WORLD_SIZE is {size}; ranks count from 0: start them with torchrun")
    chosen = torch.device(device or (f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    _start_deepspeed(chosen, int(os.environ["WORLD_SIZE"]))
    return World(dist.get_rank(), dist.get_world_size(), chosen)


def _start_deepspeed(device: torch.device, size: int) -> None:
    """Initialises DeepSpeed's process group without compiling anything.

    DeepSpeed's CPU start-up probes every op with the compiler and builds a shared-memory one; a killed build leaves a
    lock on which the next process hangs. Gloo's own collectives serve, so no op is declared buildable first.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*`torch\.distributed\..*` is deprecated", category=FutureWarning)
    deepspeed.ops.__compatible_ops__ = {}
    if dist.is_initialized():
        return
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            timeout=_TIMEOUT,
            verbose=False,
        )
    except (RuntimeError, ValueError, dist.DistNetworkError) as error:
        raise ConfigError(
            f"rank {os.environ['RANK']} of {size} could not join the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({error}); check that every rank was started and can reach that address"
        ) from error


def peer_lost(error: RuntimeError) -> bool:
    """True when a collective failed because another rank has ended."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "Socket Timeout", "remote process exited")
    return isinstance(error, dist.DistBackendError) or any(sign in str(error) for sign in signs)


def _whole_number(name: str) -> int:
    value = os.environ[name]
    if not value.isdecimal():
        raise ConfigError(f"the environment variable {name} is {value!r}, no whole number; start ranks with torchrun")
    return int(value)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def sum_over_ranks(values: Tensor) -> Tensor:
    """All-reduced sum, in place; returns `values`."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest `value` of all ranks."""
    tensor = torch.tensor([value], device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def from_rank_zero(value: T, world: World) -> T:
    """Rank 0's `value` (picklable), on every rank."""
    values = [value]
    if world.size > 1:
        dist.broadcast_object_list(values, src=0, device=world.device)
    return values[0]


def barrier() -> None:
    """Waits for all ranks."""
    if dist.get_world_size() > 1:
        dist.barrier()
