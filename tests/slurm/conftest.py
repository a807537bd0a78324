"""A real Slurm for the tests of this folder, and a small run to submit to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.clip_maker import make_clip
from tests.conftest import ROOT
from tests.slurm.cluster import SlurmCluster

STEPS = 40

CONFIG = {
    "data": {
        "datasets": [], "batch_size": 1, "global_batch_size": 8, "num_frames": 4, "tubelet_size": 2, "num_workers": 1,
        "sampling_rate": 1, "crop_size": 32, "patch_size": 8,
    },
    "mask": [{"num_blocks": 2, "spatial_scale": [0.3, 0.3]}],
    "model": {"model_name": "videomamba_custom", "embed_dim": 32, "depth": 1, "pred_depth": 1, "pred_embed_dim": 32,
              "pred_num_heads": 4},
    "optimization": {"ipe": 20, "epochs": 2, "warmup": 1, "lr": 1e-3, "start_lr": 1e-4, "final_lr": 1e-5},
    "meta": {"seed": 5},
    "engine": {"zero_stage": 1, "threads_per_rank": 1},
    "monitor": {"every_steps": 1, "rank_every_steps": 20, "tensorboard": False},
    "checkpoint": {"every_steps": 20, "keep": 2},
    "logging": {"folder": "set by the test"},
}  # fmt: skip


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[SlurmCluster]:
    """The cluster, up; its clients find it through SLURM_CONF in `slurm.environment`."""
    missing = SlurmCluster.missing()
    if missing:
        reason = f"no {', '.join(missing)} here; on Debian: apt install slurmctld slurmd slurm-client munge"
        if os.environ.get("VMJEPA_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    """A pretraining of seconds, on videos made here."""
    folder = tmp_path_factory.mktemp("job config")  # with a space, as users' folders have
    lines = []
    for number in range(8):
        clip = folder / f"{number}.webm"
        clip.write_bytes(make_clip(frames=8, seed=number))
        lines.append(f"{clip} {number % 2}\n")
    (folder / "clips.csv").write_text("".join(lines))
    content = CONFIG | {"data": CONFIG["data"] | {"datasets": [str(folder / "clips.csv")]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


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


def submit(slurm: SlurmCluster, config: Path, run: Path, *more: str) -> str:
    """Submits a pretraining on 2 nodes x 2 ranks as a user would; returns the job's number."""
    command = [sys.executable, "-m", "vmjepa.cli", "submit", "pretrain", str(config), "--cluster", "slurm-bare"]
    command += ["--nodes", "2", "--folder", str(run), *PROFILE, *more]
    done = subprocess.run(command, cwd=ROOT, env=slurm.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1].rstrip(":")


def ended(slurm: SlurmCluster, job: str, run: Path, seconds: float = 200) -> dict[str, str]:
    """What Slurm says of the job once it is over; skips the two minutes that a requeued job must wait."""

    def over() -> bool:
        shown = slurm.job(job)
        if shown["JobState"] == "PENDING" and shown["Reason"] == "BeginTime":
            slurm.run("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)
        return shown["JobState"] in ENDED

    try:
        wait_for(over, f"job {job} to end", seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}: {slurm.job(job)}\n{log(run)}") from None
    return slurm.job(job)


def log(run: Path) -> str:
    """What the batch scripts of a run printed."""
    return "".join(path.read_text() for path in sorted(run.glob("slurm-*.log")))


def losses(run: Path) -> dict[int, float]:
    """Logged loss by step; every step stands once."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row["loss"] for row in rows}


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Returns once `condition()` is true; fails, saying `what` was awaited, after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)
