"""Cluster profiles: what a site is like, written down once (configs/clusters/*.yaml), typed and checked.

    profile = load_cluster("slurm-apptainer", ["slurm.partition=gpu"])

Profiles are read like training configs: unknown keys are refused with the nearest known one. Needs no torch, so it
works on a login node.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from vmjepa.config_base import Count, KeyProblem, Section, Text
from vmjepa.config_load import load
from vmjepa.errors import ConfigError

PROFILES = Path(__file__).resolve().parents[2] / "configs" / "clusters"

_TIME = re.compile(r"\d+|\d+:\d{2}(:\d{2})?|\d+-\d{1,2}(:\d{2}){0,2}")


def _plain(value: str) -> str:
    """sbatch has its own ideas of quoting, so names in its lines are kept to characters that need none."""
    if not re.fullmatch(r"[\w.,:+@/=\[\]&|*()%-]+", value, re.ASCII) or value.startswith("-"):
        raise ValueError(f"given {value!r}, expected a name without spaces, quotes or shell characters")
    return value


def _time(value: object) -> str:
    """YAML reads 24:00:00 as the number 86400, so only text can be trusted."""
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        text = f'given {value!r}, expected a time in quotation marks, such as "24:00:00" or "2-00:00:00"'
        raise ValueError(text)
    return value


def _sbatch_line(value: str) -> str:
    if not re.fullmatch(r"--[a-z][a-z-]*(=[^\s\"'\\#]+)?", value, re.ASCII):
        raise ValueError(f"given {value!r}, expected one sbatch option such as --exclusive or --licenses=scratch:1")
    return value


def _absolute(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError(f"given {value!r}, expected a path that starts with /")
    return value


def _bind(value: str) -> str:
    """HOST, HOST:INSIDE or HOST:INSIDE:ro, each an absolute path."""
    parts = value.split(":")
    options = parts[2:] or ["rw"]
    if not all(part.startswith("/") for part in parts[:2]) or len(options) > 1 or options[0] not in ("ro", "rw"):
        raise ValueError(f"given {value!r}, expected /host, /host:/inside or /host:/inside:ro")
    if "," in value:
        raise ValueError(f"given {value!r}, which holds a comma: container runtimes split binds there; bind its parent")
    return value


def _variable(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", value, re.ASCII):
        raise ValueError(f"given {value!r}, expected the name of an environment variable")
    return value


SlurmName = Annotated[str, AfterValidator(_plain)]
TimeLimit = Annotated[str, BeforeValidator(_time)]
SbatchLine = Annotated[str, AfterValidator(_sbatch_line)]
AbsolutePath = Annotated[str, AfterValidator(_absolute)]
Bind = Annotated[str, AfterValidator(_bind)]
Variable = Annotated[str, AfterValidator(_variable)]


class SlurmSection(Section):
    """What sbatch is asked for, besides nodes."""

    partition: SlurmName | None = None
    """Partition, or several with commas; null for the site's default."""
    account: SlurmName | None = None
    """Account that pays."""
    qos: SlurmName | None = None
    """Quality of service."""
    time_limit: TimeLimit = "24:00:00"
    """Longest time of one attempt, as sbatch writes it: [days-]hours:minutes:seconds."""
    constraint: SlurmName | None = None
    """Node features, e.g. a100&nvlink."""
    exclude: SlurmName | None = None
    """Nodes to leave out, e.g. gpu[07,12]."""
    mail_user: SlurmName | None = None
    """Address for mail about the job."""
    mail_type: SlurmName = "END,FAIL,REQUEUE"
    """When mail is sent (with mail_user)."""
    extra: list[SbatchLine] = Field(default=[])
    """Further sbatch options, one per entry, e.g. --exclusive."""


class NodeSection(Section):
    """One computer of the cluster, as much of it as a job uses."""

    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs per computer; 0 trains on the CPU."""
    gpu_type: SlurmName | None = None
    """GPU type where the site has several, e.g. a100."""
    ranks: Count | None = None
    """Training processes per computer; null means one per GPU."""
    cpus: Count | None = None
    """CPU cores per computer; null for the site's default."""
    memory: SlurmName | None = None
    """Memory per computer, e.g. 480G; "0" means all of it."""

    @model_validator(mode="after")
    def _one_rank_per_gpu(self) -> NodeSection:
        if self.gpus and self.ranks not in (None, self.gpus):
            text = f"{self.ranks} ranks do not fit {self.gpus} GPUs: each GPU runs one rank; remove ranks"
            raise KeyProblem("ranks", text)
        if not self.gpus and self.gpu_type:
            raise KeyProblem("gpu_type", f"{self.gpu_type} without GPUs; set gpus")
        return self


class ContainerSection(Section):
    """What the ranks run in."""

    runtime: Literal["none", "apptainer", "pyxis", "docker", "podman"] = "none"
    """none runs the virtual environment `venv`; pyxis is enroot through srun."""
    image: Text | None = None
    """Image file (apptainer, pyxis .sqsh) or name (docker, podman, pyxis docker://…)."""
    venv: AbsolutePath | None = None
    """With runtime none: the virtual environment; null means the one that runs `vmjepa submit`."""
    binds: list[Bind] = Field(default=[])
    """Folders to show inside, /host[:/inside[:ro]]; the run directory and the config's folder are added."""
    pass_environment: list[Variable] = Field(default=[])
    """Variables of the job that the container may see; what the job itself needs is added."""

    @model_validator(mode="after")
    def _image_and_venv(self) -> ContainerSection:
        if self.runtime == "none" and self.image:
            raise KeyProblem("image", "given, but runtime is none; set runtime to apptainer, pyxis, docker or podman")
        if self.runtime != "none" and not self.image:
            raise KeyProblem("image", f"missing; {self.runtime} needs it, so add it")
        if self.runtime != "none" and self.venv:
            raise KeyProblem("venv", f"given, but the Python of the {self.runtime} image is used; remove it")
        return self


class NetworkSection(Section):
    """How ranks on different computers reach each other; null leaves the choice to NCCL and gloo."""

    socket_ifname: SlurmName | None = None
    """Network interface for NCCL and gloo (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), e.g. ib0."""
    ib_hca: SlurmName | None = None
    """InfiniBand adapters for NCCL (NCCL_IB_HCA), e.g. mlx5_0,mlx5_1."""
    bind_infiniband: bool = False
    """Show /dev/infiniband inside the container; without it NCCL silently falls back to sockets."""


class ScratchSection(Section):
    """Fast disk of each computer, for caches that must not lie on a shared file system."""

    folder: AbsolutePath | None = None
    """A folder that exists on every computer, e.g. /scratch/local."""
    variable: Variable | None = None
    """Or the variable in which the site names it for each job, e.g. SLURM_TMPDIR."""

    @model_validator(mode="after")
    def _one_of_them(self) -> ScratchSection:
        if self.folder and self.variable:
            raise KeyProblem("variable", "given together with folder; keep one")
        return self


class RequeueSection(Section):
    """What happens when an attempt ends before the run is done."""

    mode: Literal["requeue", "chain", "none"] = "requeue"
    """requeue puts the same job back; chain submits a successor (for sites that forbid requeueing)."""
    lead_seconds: Annotated[int, Field(ge=15, le=65535)] = 180
    """How long before the time limit the run is asked to save: one step, one checkpoint and a margin."""
    crashes: Annotated[int, Field(ge=0)] = 3
    """How often a crash is retried in all; a crash without progress since the last one never is."""


class ClusterProfile(Section):
    """A site."""

    scheduler: Literal["slurm", "none"] = "slurm"
    """none is this machine alone: the script is run, not queued."""
    nodes: Count = 1
    """Computers of a job when --nodes does not say."""
    slurm: SlurmSection = SlurmSection()
    """What sbatch is asked for."""
    node: NodeSection = NodeSection()
    """One computer."""
    container: ContainerSection = ContainerSection()
    """What the ranks run in."""
    modules: list[SlurmName] = Field(default=[])
    """Environment modules to load, in this order."""
    environment: dict[Variable, str] = Field(default={})
    """Variables to set for the ranks."""
    network: NetworkSection = NetworkSection()
    """How ranks reach each other."""
    scratch: ScratchSection = ScratchSection()
    """Fast disk of each computer."""
    requeue: RequeueSection = RequeueSection()
    """What happens when an attempt ends early."""

    @property
    def ranks_per_node(self) -> int:
        """Training processes per computer."""
        return self.node.ranks or self.node.gpus or 1

    @model_validator(mode="after")
    def _fits_the_scheduler(self) -> ClusterProfile:
        if self.scheduler == "none":
            if self.nodes > 1:
                raise KeyProblem("nodes", f"{self.nodes} computers need a scheduler; set scheduler to slurm")
            if self.container.runtime == "pyxis":
                raise KeyProblem("container.runtime", "pyxis works through Slurm's srun; use docker or podman here")
        elif self.container.runtime == "pyxis" and self.scratch.variable:
            raise KeyProblem(
                "scratch.variable", "a pyxis container does not see that folder; name it as scratch.folder"
            )
        elif self.container.runtime in ("docker", "podman"):
            text = f"{self.container.runtime} is for one machine (scheduler: none); use apptainer or pyxis with Slurm"
            raise KeyProblem("container.runtime", text)
        return self


def load_cluster(name: str, overrides: Sequence[str] = ()) -> ClusterProfile:
    """The profile called `name`, or in the YAML file `name`, with "key.sub=value" overrides.

    Raises:
        ConfigError: no such profile, or one that cannot be used; one sentence naming file, key and remedy.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml"))) or f"none in {PROFILES}"
        raise ConfigError(f"--cluster {name}: no such profile; use one of {known}, or the path of a YAML file")
    return load(ClusterProfile, path, overrides)[0]
