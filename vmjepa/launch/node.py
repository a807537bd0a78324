"""One node of a cluster job: starts this node's ranks, and says truly how they ended.

    python -m vmjepa.launch.node --nodes 2 --ranks 4 --head n1:20017 --run runs/a --logs runs/a/attempts/1 \\
        -- pretrain config.yaml

The job script starts it once per node. torchrun itself exits with 1 whatever a rank's exit code was; the job must tell
"saved, requeue me" (85) from "never retry" (93) and from a crash, so the launcher behind torchrun is called directly.
The code also goes to LOGS/node_NUMBER.exit: srun reports only the highest of all nodes, where a node that was
killed (137) would hide the one that knows why (93).
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import signal
import sys
import tempfile
from pathlib import Path

from vmjepa.errors import EXIT_NEVER_RETRY, EXIT_REQUEUE
from vmjepa.launch import local
from vmjepa.launch.rank import output_of
from vmjepa.run_dir import ATTEMPT


def main(arguments: list[str] | None = None) -> int:
    """Runs this node's share of a job; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m vmjepa.launch.node", description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, required=True, help="nodes of the job")
    parser.add_argument("--ranks", type=int, required=True, help="ranks on each node")
    parser.add_argument("--cpu", action="store_true", help="ranks run on the CPU even where there is a GPU")
    parser.add_argument("--head", required=True, help="host:port at which the nodes find each other")
    parser.add_argument("--run", type=Path, required=True, help="run directory; the stop request goes to its control/")
    parser.add_argument("--logs", type=Path, required=True, help="folder for the ranks' logs and the exit code")
    parser.add_argument("command", nargs="+", help="the vmjepa command that each rank runs")
    args = parser.parse_args(arguments)
    number = int(os.environ.get("SLURM_NODEID", "0"))
    os.environ[ATTEMPT] = str(args.logs)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # peers that end first are no news
    if args.cpu:
        os.environ[local.DEVICES] = ",".join(["cpu"] * args.ranks)
    for caught in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(caught, lambda got, _: ask_to_stop(args.run, signal.Signals(got).name))
    code, reason = launch(args.nodes, args.ranks, args.head, number, args.logs, args.command)
    if reason:
        print(reason, file=sys.stderr, flush=True)
    (args.logs / f"node_{number}.exit").write_text(f"{code}\n{reason}\n")
    return code


def launch(nodes: int, ranks: int, head: str, number: int, logs: Path, command: list[str]) -> tuple[int, str]:
    """Starts this node's ranks, waits for them all, and returns (exit code, reason in one line)."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # said below, in one line
    try:
        with tempfile.TemporaryDirectory(prefix="vmjepa-launch-") as scratch:
            config = LaunchConfig(
                min_nodes=nodes,
                max_nodes=nodes,
                nproc_per_node=ranks,
                # one id per start, so that a late process of the attempt before cannot join
                run_id="-".join(os.environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")),
                rdzv_backend="c10d",
                rdzv_endpoint=head,
                # without it the nodes guess from their host names who serves, and may all wait for each other
                rdzv_configs={"is_host": number == 0},
                max_restarts=0,
                signals_to_handle="SIGHUP",
                logs_specs=DefaultLogsSpecs(log_dir=scratch),
            )
            elastic_launch(config, sys.executable)("-m", "vmjepa.launch.rank", *command)
    except ChildFailedError as failure:
        codes = {rank: child.exitcode for rank, child in failure.failures.items()}
        rank = telling_rank(codes, failure.get_first_failure()[0])
        code = codes[rank]
        if code == EXIT_REQUEUE:
            return code, ""
        host = os.environ.get("SLURMD_NODENAME", platform.node())
        how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        reason = f"error: rank {rank} on {host} ended with {how}: {last_line(output_of(rank, logs))}"
        return (code if 0 < code < 256 else 1), reason
    return 0, ""


def telling_rank(codes: dict[int, int], first: int) -> int:
    """The rank whose exit code speaks for the node.

    Ranks that lose a peer crash, and may be seen before the one that knows better: 93 wins, then 85, then `first`.
    """
    for wanted in (EXIT_NEVER_RETRY, EXIT_REQUEUE):
        for rank, code in sorted(codes.items()):
            if code == wanted:
                return rank
    return first


def last_line(log: Path) -> str:
    """The last line of a rank's log that is not empty."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "it printed nothing"
    return f"{lines[-1]} ({log})" if lines else "it printed nothing"


def ask_to_stop(run: Path, why: str) -> None:
    """Asks the run to save and end. The text tells the job script that no person asked, so it goes on later."""
    stop = run / "control" / "stop"
    if stop.parent.is_dir() and not stop.exists():
        stop.write_text(f"{why}\n")


if __name__ == "__main__":
    sys.exit(main())
