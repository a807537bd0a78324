"""What the job script makes of exit codes, signals and requests, on a real Slurm.

The ranks are played by a stand-in for Python, whose behaviour each test writes in bash; so a whole job takes a second.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.slurm.conftest import PROFILE, ended, log, submit, wait_for
from vmjepa.launch.render import render
from vmjepa.launch.submit import Request, pretrain_job

_STAND_IN = """#!/bin/bash
# python -m vmjepa.launch.node --nodes N --ranks R [--cpu] --head H --run RUN --logs LOGS -- ...
while [[ $1 != -- ]]; do
    case $1 in --run) run=$2 ;; --logs) logs=$2 ;; esac
    shift
done
end() { printf '%s\\n%s\\n' "$1" "error: $2" >"$logs/node_$SLURM_NODEID.exit"; exit "$1"; }
step() { printf '{\\n "step": %s,\\n "total_steps": 9\\n}\\n' "$1" >"$run/status.json"; }
attempt=${logs##*/}
source "$run/behaviour"
"""


@pytest.fixture
def venv(tmp_path) -> Path:
    """A virtual environment whose Python does what RUN/behaviour says."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(_STAND_IN)
    python.chmod(0o755)
    return tmp_path / "venv"


@pytest.fixture
def start(slurm, config, venv, tmp_path):
    """Submits a job whose nodes behave as told; returns (job, run)."""

    def _start(behaviour: str, *settings: str) -> tuple[str, Path]:
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        (run / "behaviour").write_text(behaviour)
        changes = [word for setting in (f"container.venv={venv}", *settings) for word in ("--set", setting)]
        return submit(slurm, config, run, *changes), run

    return _start


@pytest.mark.parametrize(
    ("behaviour", "state", "code", "restarts", "words"),
    [
        ("end 0", "COMPLETED", "0:0", "0", "done"),
        ("end 93 'no such key'", "FAILED", "93:0", "0", "never retried: error: no such key"),
        ("[[ $SLURM_NODEID == 0 ]] && end 93 bad; kill -9 $$", "FAILED", "93:0", "0", "never retried: error: bad"),
        ("end 1 'bad luck'", "FAILED", "1:0", "0", "no step was done: error: bad luck"),
        ("step $attempt; end 7 boom", "FAILED", "7:0", "2", "given up after 2 retries: error: boom"),
        ("[[ $attempt == 2 ]] && end 0; step 5; end 1 x", "COMPLETED", "0:0", "1", "done, step 5"),
        ("[[ $attempt == 1 ]] && { step 5; end 1 x; }; step 4; end 1 x", "FAILED", "1:0", "1", "no step was done"),
        ("[[ $attempt == 2 ]] && end 0; end 85", "COMPLETED", "0:0", "1", "saved"),
        ("[[ $attempt$SLURM_NODEID == 10 ]] && end 85; end $((attempt == 1))", "COMPLETED", "0:0", "1", "saved"),
    ],
    ids=[
        "done", "never-retry", "killed-node-hides-nothing", "crash-at-start", "crashes-on-and-on", "one-crash",
        "crash-before-the-same-step", "saved", "saved-though-a-node-crashed",
    ],
)  # fmt: skip
def test_exit_codes(slurm, start, behaviour, state, code, restarts, words):
    job, run = start(behaviour, "requeue.crashes=2")
    shown = ended(slurm, job, run)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == (state, code, restarts), log(run)
    assert words in log(run)
    assert len([path for path in (run / "attempts").iterdir() if path.name.isdigit()]) == int(restarts) + 1


_UNTIL_STOPPED = "trap : TERM USR1; step 3; until [[ -e $run/control/stop ]]; do sleep 0.1; done; end 85"


def test_a_person_may_stop_a_run(slurm, start):
    """An empty control/stop ends the job for good; it is not requeued."""
    job, run = start(_UNTIL_STOPPED)
    wait_for((run / "status.json").exists, "the job to run")
    (run / "control/stop").touch()
    shown = ended(slurm, job, run)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "0")
    assert "stopped by request after step 3" in log(run)


def test_the_time_limit_is_announced(slurm, start):
    """Slurm's own signal before the limit reaches the script; the run saves, and goes on in a second attempt."""
    ends_on_request = "[[ $attempt == 2 ]] && end 0; " + _UNTIL_STOPPED
    job, run = start(ends_on_request, "slurm.time_limit=00:01:00", "requeue.lead_seconds=45")
    shown = ended(slurm, job, run)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), log(run)
    assert "signal USR1: asking the run to save" in log(run)


def test_a_run_that_hangs_at_its_time_limit_is_requeued(slurm, start):
    """It does not answer the signal, so its ranks are killed while there is still time to put the job back."""
    hangs = "[[ $attempt == 2 ]] && end 0; trap : TERM USR1; step 3; while :; do sleep 0.1; done"
    job, run = start(hangs, "requeue.lead_seconds=15")
    wait_for((run / "status.json").exists, "the job to run")
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    shown = ended(slurm, job, run)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), log(run)
    assert "giving up this attempt" in log(run)


def test_scancel_ends_a_run_for_good(slurm, start):
    """The ranks save, but the script does not put a cancelled job back."""
    job, run = start(_UNTIL_STOPPED)
    wait_for((run / "status.json").exists, "the job to run")
    slurm.run("scancel", job)
    assert ended(slurm, job, run)["JobState"] == "CANCELLED"
    wait_for(lambda: "saved after step 3" in log(run), "the run to save", 20)
    assert slurm.job(job)["Restarts"] == "0"


def test_one_job_per_run_directory(slurm, start):
    """A second job for a run directory at work refuses: at submission, and when its script starts by hand."""
    job, run = start(_UNTIL_STOPPED)
    wait_for((run / "status.json").exists, "the job to run")
    command = [sys.executable, "-m", "vmjepa.cli", "submit", "pretrain", str(run / "submitted.yaml"), *PROFILE]
    again = subprocess.run(
        [*command, "--cluster", "slurm-bare"], cwd=ROOT, env=slurm.environment, capture_output=True, text=True
    )
    assert (again.returncode, f"job {job} is at work on it" in again.stderr) == (93, True)
    second = slurm.run("sbatch", "--parsable", str(run / "pretrain.sbatch"))
    assert ended(slurm, second, run)["ExitCode"] == "93:0"
    assert f"job {job} is at work" in log(run)
    (run / "control/stop").touch()
    assert ended(slurm, job, run)["JobState"] == "COMPLETED"


def test_sbatch_refusals_are_one_sentence(slurm, config, tmp_path):
    command = [sys.executable, "-m", "vmjepa.cli", "submit", "pretrain", str(config), *PROFILE]
    done = subprocess.run(
        [*command, "--cluster", "slurm-bare", "--folder", str(tmp_path / "run"), "--partition", "no-such"],
        cwd=ROOT, env=slurm.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 93
    assert "sbatch refuses" in done.stderr
    assert "no-such" in done.stderr or "artition" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dead_node_is_left_behind(slurm, start):
    """slurmd and all it started on a node are killed: Slurm requeues the job, which goes on where nodes are alive."""
    job, run = start("[[ $attempt == 2 ]] && end 0; trap : TERM USR1; step 3; while :; do sleep 0.1; done")
    wait_for((run / "status.json").exists, "the job to run")
    victim = slurm.job(job)["BatchHost"]
    slurm.kill_node(victim)
    try:
        shown = ended(slurm, job, run)
        assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), log(run)
        assert victim not in slurm.run("scontrol", "show", "hostnames", shown["NodeList"]).split()
    finally:
        slurm.start_node(victim)
        slurm.run("scontrol", "update", "nodename=n[1-4]", "state=resume", check=False)  # if Slurm has drained one
        slurm.wait_until_idle()
        for process in psutil.process_iter():  # stand-ins of the first attempt on the node that stayed alive
            with contextlib.suppress(psutil.Error):
                if "vmjepa.launch.node" in process.cmdline() and str(run) in process.cmdline():
                    process.kill()


_FITTING = {
    "slurm-bare": [],
    "slurm-apptainer": [],
    "slurm-pyxis": [],
    "example-university": ["slurm.partition=main", "slurm.constraint=null", "slurm.exclude=n4", "node.gpu_type=null",
                           "node.memory=2G"],
    "example-large-site": ["slurm.partition=main", "nodes=4", "node.cpus=64"],
}  # fmt: skip


@pytest.mark.parametrize("cluster", _FITTING)
def test_sbatch_accepts_every_profile(slurm, config, tmp_path, cluster):
    """Up to names that only the site has, which become this cluster's."""
    request = Request(config, ["data.global_batch_size=null"], cluster, _FITTING[cluster], folder=tmp_path / "a run")
    _, job = pretrain_job(request, tmp_path)
    script = tmp_path / "script.sh"
    script.write_text(render("pretrain", job))
    slurm.run("sbatch", "--test-only", str(script))


@pytest.mark.parametrize("setting", ["node.gpus=9", "slurm.constraint=a100", "slurm.time_limit=3-00:00:00", "nodes=5"])
def test_sbatch_refuses_what_does_not_fit(slurm, config, tmp_path, setting):
    """The options of a profile reach Slurm: asking for more than there is fails."""
    _, job = pretrain_job(Request(config, ["data.global_batch_size=null"], "slurm-bare", [setting]), tmp_path)
    script = tmp_path / "script.sh"
    script.write_text(render("pretrain", job))
    with pytest.raises(RuntimeError, match="sbatch --test-only"):
        slurm.run("sbatch", "--test-only", str(script))
