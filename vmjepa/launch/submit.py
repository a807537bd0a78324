"""Submitting: from a config and a cluster profile to a queued job. Needs neither torch nor, for a dry run, Slurm."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from vmjepa.config import PretrainConfig, load_pretrain
from vmjepa.errors import ConfigError
from vmjepa.launch.cluster import load_cluster
from vmjepa.launch.render import Job, render
from vmjepa.run_dir import RunDir, write_atomic


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    config: Path
    """YAML file."""
    overrides: Sequence[str]
    """key.sub=value for the config."""
    cluster: str
    """Profile name or path."""
    settings: Sequence[str] = ()
    """key.sub=value for the profile."""
    nodes: int | None = None
    """Computers; None takes the profile's."""
    folder: Path | None = None
    """Run directory; None takes the config's logging.folder."""


def pretrain_job(request: Request, workdir: Path) -> tuple[PretrainConfig, Job]:
    """The checked config, and the job that pretrains it.

    Raises:
        ConfigError: config or profile that cannot be used, or that do not fit each other.
    """
    profile = load_cluster(request.cluster, request.settings)
    nodes = request.nodes or profile.nodes
    if nodes > 1 and profile.scheduler == "none":
        raise ConfigError(f"--nodes {nodes}: cluster profile {request.cluster} is one machine; use a Slurm profile")
    overrides = list(request.overrides)
    if request.folder is not None:
        overrides = [word for word in overrides if not word.startswith("logging.folder=")]
    cfg = load_pretrain(request.config, overrides)
    run = workdir / (request.folder or cfg.logging.folder)
    cfg.micro_batch(nodes * profile.ranks_per_node)  # refuses a global batch that does not divide by these ranks
    config = workdir / request.config
    overrides = [word for word in overrides if not word.startswith("logging.folder=")]
    command = ["pretrain", str(config), *overrides, _folder_override(run)]
    needs = [config.parent, *(workdir / path for path in cfg.data.datasets)]
    if cfg.meta.read_checkpoint:
        needs.append(workdir / cfg.meta.read_checkpoint)
    return cfg, Job(command, run, needs, workdir, request.cluster, profile, nodes)


def _folder_override(run: Path) -> str:
    """logging.folder=RUN, as YAML that reads back as this very path."""
    try:
        plain = yaml.safe_load(str(run)) == str(run)
    except yaml.YAMLError:
        plain = False
    quoted = str(run).replace("'", "''")
    return f"logging.folder={run}" if plain else f"logging.folder='{quoted}'"


def submit(job: Job, cfg: PretrainConfig) -> int:
    """Queues the job and says so, or runs it here without a scheduler; returns the exit code.

    The config is frozen into the run directory first: a job may wait for days while its file is edited.

    Raises:
        ConfigError: the scheduler is not there or refuses, or another job is at work on the run directory.
        StorageError: the run directory cannot be written.
    """
    queued = job.profile.scheduler == "slurm"
    for program in ("sbatch", "squeue", "scontrol", "srun") if queued else ("bash",):
        if shutil.which(program) is None:
            raise ConfigError(f"{program} is not on this machine; submit from a login node, or look with --dry-run")
    run = RunDir(job.run)
    if queued:
        _refuse_second_job(run)
    frozen, script = job.run / "submitted.yaml", job.run / "pretrain.sbatch"
    text = render("pretrain", replace(job, command=["pretrain", str(frozen)]))
    logging = cfg.logging.model_copy(update={"folder": str(job.run)})
    run.create()
    write_atomic(frozen, cfg.model_copy(update={"logging": logging}).to_yaml())
    write_atomic(script, text)
    if not queued:
        return subprocess.run(["bash", str(script)], cwd=job.workdir).returncode
    number = sbatch(script, job.workdir)
    print(f"job {number}: {job.nodes} node(s) x {job.profile.ranks_per_node} rank(s), run directory {job.run}")
    return 0


def sbatch(script: Path, workdir: Path) -> str:
    """Submits a script; returns the job's number. Raises ConfigError with sbatch's own words when it refuses."""
    done = subprocess.run(["sbatch", "--parsable", str(script)], cwd=workdir, capture_output=True, text=True)
    if done.returncode:
        words = " ".join(done.stderr.removeprefix("sbatch: error: ").split())
        raise ConfigError(f"sbatch refuses {script}: {words}; change the cluster profile, or --set slurm.partition=…")
    return done.stdout.strip().partition(";")[0]


def _refuse_second_job(run: RunDir) -> None:
    lease = run.control / "lease"
    holder = lease.read_text().strip() if lease.exists() else ""
    if not holder:
        return
    found = subprocess.run(["squeue", "--noheader", f"--jobs={holder}", "--format=%i"], capture_output=True, text=True)
    if found.stdout.strip():
        raise ConfigError(f"{run.root}: job {holder} is at work on it; wait, `scancel {holder}`, or choose --folder")
