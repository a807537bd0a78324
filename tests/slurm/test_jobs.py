"""The life of a pretraining job on a real Slurm: 2 nodes x 2 ranks, submitted as a user would.

Every run here must give the losses of a local run with 4 ranks, whatever happens to it on the way.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.conftest import STEPS, ended, log, losses, submit, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


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


def wait_for_step(run: Path, step: int) -> None:
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text(), f"step {step}", 200)


def test_two_nodes_equal_one_machine(slurm, config, reference, tmp_path):
    """Finishes, with the losses of four local ranks; logs lie per attempt and rank. The folder's name is no friend."""
    run = tmp_path / "it's a $HOME `run`"
    job = submit(slurm, config, run)
    shown = ended(slurm, job, run)
    assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), log(run)
    assert losses(run) == reference
    assert (run / "attempts/latest").resolve() == (run / "attempts/1").resolve()
    names = {path.name for path in (run / "attempts/1").iterdir()}
    assert {"rank_0.out", "rank_3.log", "node_0.exit", "node_1.exit", "provenance.json"} <= names
    assert not (run / "control/lease").exists()


def test_a_preempted_job_goes_on_bit_for_bit(slurm, config, reference, tmp_path):
    """A job of higher priority takes its nodes: it saves, waits in the queue, and continues with the same losses."""
    run = tmp_path / "run"
    job = submit(slurm, config, run)
    wait_for_step(run, 3)
    slurm.run("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true")
    shown = ended(slurm, job, run)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), log(run)
    assert "asking the run to save" in log(run)
    assert "saved after step" in log(run)
    assert losses(run) == reference
    assert (run / "attempts/2/rank_0.out").exists()


def test_a_chain_survives_its_time_limit_and_a_crash(slurm, config, reference, tmp_path):
    """The signal before the time limit submits a successor; a rank that is killed there gives another one."""
    run = tmp_path / "run"
    first = submit(slurm, config, run, "--set", "requeue.mode=chain")
    wait_for_step(run, 3)
    slurm.run("scancel", "--batch", "--signal=USR1", first)
    assert ended(slurm, first, run)["JobState"] == "COMPLETED", log(run)
    second = str(int(first) + 1)
    stopped_at = json.loads((run / "status.json").read_text())["step"]
    assert 3 <= stopped_at < STEPS
    wait_for_step(run, stopped_at + 3)
    os.kill(json.loads((run / "status.json").read_text())["pid"], signal.SIGKILL)
    assert ended(slurm, second, run)["JobState"] == "COMPLETED", log(run)
    assert "rank 0 on n" in log(run)
    assert "SIGKILL" in log(run)
    third = str(int(second) + 1)
    assert ended(slurm, third, run)["JobState"] == "COMPLETED", log(run)
    assert losses(run) == reference
    assert (run / "attempts/latest").resolve() == (run / "attempts/3").resolve()


def test_what_cannot_work_is_not_retried(slurm, config, tmp_path):
    """A data set that is not there: exit code 93, one attempt, and the reason is the last line of the job's log."""
    run = tmp_path / "run"
    job = submit(slurm, config, run, "data.datasets=[/nowhere/clips.csv]", "--set", "node.ranks=1")
    shown = ended(slurm, job, run)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "93:0", "0"), log(run)
    assert "/nowhere/clips.csv" in log(run).strip().splitlines()[-1]
    assert not (run / "attempts/2").exists()
