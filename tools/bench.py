"""Benchmarks of the library's own kernels.

    python -m tools.bench scan            # the CPU selective scan against a plain loop over time steps
    python -m tools.bench scan --json     # the same as JSON

Forward and backward at batch 2, 384 channels, 16 states, length 1568, fp32, one thread. Each variant runs in processes
of its own, in turn. Reported: the least CPU time of a call (other load on the machine only ever adds) and the peak
memory that the first call adds to a process that holds the inputs and has PyTorch warmed up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vmjepa.models.scan import selective_scan

BATCH, CHANNELS, STATES, LENGTH = 2, 384, 16, 1568
WANTED_RATIO, WANTED_GIB = 1.5, 0.2
_GIB = 1 << 30


def loop_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The scan as a plain loop over time steps that autograd differentiates. Same arguments as selective_scan."""
    delta, u_first = F.softplus(delta).permute(2, 0, 1), u.permute(2, 0, 1)  # time first: contiguous steps
    decay = torch.exp(delta[..., None] * A)  # (L, batch, channels, n)
    drive = (delta * u_first)[..., None] * B.permute(2, 0, 1)[:, :, None]
    state, states = torch.zeros_like(decay[0]), []
    for a, x in zip(decay.unbind(), drive.unbind(), strict=True):
        state = a * state + x
        states.append(state)
    y = torch.einsum("lbdn,bnl->bdl", torch.stack(states), C)
    return y + D[:, None] * u


def _ours(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    out = selective_scan(u, delta, A, B, C, D, delta_softplus=True, backend="cpu")
    assert isinstance(out, Tensor)
    return out


VARIANTS: dict[str, Callable[..., Tensor]] = {"chunked scan (ours)": _ours, "loop over time steps": loop_scan}


def _inputs(length: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(BATCH, CHANNELS, length)] * 2 + [(CHANNELS, STATES)] + [(BATCH, STATES, length)] * 2 + [(CHANNELS,)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[2] = -tensors[2].exp()
    return [tensor.requires_grad_() for tensor in tensors]


def _peak_memory() -> int:
    """Bytes of the process's largest resident size since the last reset."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match.group(1)) * 1024


def measure(variant: str, calls: int) -> dict[str, float]:
    """CPU seconds per call and added memory of one variant, in this process."""
    torch.set_num_threads(1)
    scan = VARIANTS[variant]
    small = _inputs(16)
    scan(*small).sum().backward()
    inputs = _inputs(LENGTH)
    cotangent = torch.randn(BATCH, CHANNELS, LENGTH)
    with contextlib.suppress(OSError):  # resets the peak to the present size, where the kernel lets us
        Path("/proc/self/clear_refs").write_text("5")
    before, seconds, memory = _peak_memory(), [], 0
    for _ in range(calls):
        start = time.process_time()
        scan(*inputs).backward(cotangent)
        seconds.append(time.process_time() - start)
        memory = memory or _peak_memory() - before
        for tensor in inputs:
            tensor.grad = None
    return {"cpu_seconds": min(seconds), "added_gib": memory / _GIB}


def bench_scan(rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Every variant in `rounds` processes of `calls` calls each."""
    results: dict[str, dict[str, float]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for _ in range(rounds):
        for variant in VARIANTS:
            command = [sys.executable, "-m", "tools.bench", "scan", "--variant", variant, "--calls", str(calls)]
            out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            figures, best = json.loads(out), results.get(variant)
            results[variant] = figures if best is None else {key: min(figures[key], best[key]) for key in figures}
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scan"], help="which benchmark")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=2, help="processes per variant (default 2)")
    parser.add_argument("--calls", type=int, default=5, help="calls per process (default 5)")
    parser.add_argument("--variant", choices=list(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.variant, args.calls)))
        return
    results = bench_scan(args.rounds, args.calls)
    ours, loop = (results[variant] for variant in VARIANTS)
    ratio = loop["cpu_seconds"] / ours["cpu_seconds"]
    met = ratio >= WANTED_RATIO and ours["added_gib"] <= WANTED_GIB
    if args.json:
        print(json.dumps({"variants": results, "ratio": ratio, "met": met}, indent=2))
        return
    table = Table(title=f"selective scan, forward + backward, {BATCH} x {CHANNELS} x {LENGTH}, {STATES} states, fp32")
    for column in ("variant", "CPU s", "added GiB"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for variant, figures in results.items():
        table.add_row(variant, f"{figures['cpu_seconds']:.3f}", f"{figures['added_gib']:.3f}")
    console = Console()
    console.print(table)
    console.print(
        f"{ratio:.2f} times faster than the loop (wanted {WANTED_RATIO}), "
        f"{ours['added_gib']:.3f} GiB added (at most {WANTED_GIB}): {'met' if met else 'NOT met'}"
    )


if __name__ == "__main__":
    main()
