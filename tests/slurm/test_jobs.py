"""The life of a pretraining job on a real Slurm: 2 nodes x 2 ranks, submitted as a user would.

Every run here must give the losses of a local run with 4 ranks, whatever happens to it on the way.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.conftest import STEPS, losses, wait_for

PROFILE = [
    "--set",
    "node.gpus=0",
    "--set",
    "node.ranks=2",
    "--set",
    "node.cpus=2",
    "--set",
    "slurm.time_limit=00:10:00",
]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory) -> dict[int, float]:
    """Losses of the same run on this machine, 4 ranks, unbroken."""
    run = tmp_path_factory.mktemp("local") / "run"
    command = [sys.executable, "-m", "vmjepa.cli", "pretrain", str(config), f"logging.folder={run}", "--devices"]
    done = subprocess.run([*command, *["cpu"] * 4], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = losses(run)
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


def submit(slurm, config: Path, run: Path, *more: str) -> str:
    """Submits a pretraining on 2 nodes x 2 ranks; returns the job's number."""
    command = [sys.executable, "-m", "vmjepa.cli", "submit", "pretrain", str(config), "--cluster", "slurm-bare"]
    done = subprocess.run(
        [*command, "--nodes", "2", "--folder", str(run), *PROFILE, *more],
        cwd=ROOT, env=slurm.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1].rstrip(":")


def ended(slurm, job: str, run: Path) -> dict[str, str]:
    """What Slurm says of the job once it is over; skips the two minutes that a requeued job must wait."""

    def over() -> bool:
        shown = slurm.job(job)
        if shown["JobState"] == "PENDING" and shown["Reason"] == "BeginTime":
            slurm.run("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)
        return shown["JobState"] in ENDED

    try:
        wait_for(over, f"job {job} to end")
    except AssertionError:
        raise AssertionError(f"{slurm.job(job)}\n{log(run)}") from None
    return slurm.job(job)


def log(run: Path) -> str:
    """What the batch scripts of a run printed."""
    return "".join(path.read_text() for path in sorted(run.glob("slurm-*.log")))


@pytest.mark.slow
def test_two_nodes_equal_one_machine(slurm, config, reference, tmp_path):
    """Finishes, with the losses of four local ranks; logs lie per attempt and rank. The folder's name is no friend."""
    run = tmp_path / "it's a $HOME `run`"
    job = submit(slurm, config, run)
    shown = ended(slurm, job, run)
    assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), log(run)
    assert losses(run) == reference
    assert (run / "attempts/latest").resolve() == (run / "attempts/1").resolve()
    names = {path.name for path in (run / "attempts/1").iterdir()}
    assert {"rank_0000.log", "rank_0003.log", "node_0.exit", "node_1.exit", "provenance.json"} <= names
    assert not (run / "control/lease").exists()
