"""Job scripts from templates: jobs/*.sbatch.j2, a cluster profile and a config make one plain bash script.

Nothing reaches a script but through a filter below: a value that a template prints bare is an error, so no config,
path or profile can slip a command into a job.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from vmjepa.errors import ConfigError
from vmjepa.launch.cluster import ClusterProfile

TEMPLATES = Path(__file__).resolve().parents[2] / "jobs"

_JOB_VARIABLES = (
    "PYTHONSAFEPATH", "PYTHONNOUSERSITE", "VMJEPA_ATTEMPT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_NODEID",
    "SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME",
    "NCCL_IB_HCA", "TRITON_CACHE_DIR",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a script is to do, and where."""

    command: Sequence[str]
    """The vmjepa command line of each rank, e.g. ["pretrain", "/home/me/config.yaml", "logging.folder=/runs/a"]."""
    run: Path
    """Run directory, absolute."""
    needs: Sequence[Path]
    """Files and folders that the ranks read; containers get them bound, read-only."""
    workdir: Path
    """Where relative paths count from, absolute."""
    cluster: str
    """Name of the profile, for the script's header."""
    profile: ClusterProfile
    """The site."""
    nodes: int
    """Computers."""


class _Safe(str):
    """Text that a filter made safe for its place in a script."""


def shell(value: Any) -> str:
    """One word for the shell, quoted where it needs to be.

    Raises:
        ConfigError: for control characters, which make a script unreadable and hide what it does.
    """
    text = str(value)
    _refuse_control(text, "a job script")
    return _Safe(shlex.quote(text))


def words(values: Iterable[Any]) -> str:
    """Several words for the shell, quoted."""
    return _Safe(" ".join(shell(value) for value in values))


def sbatch(value: Any) -> str:
    """A value in an #SBATCH line: sbatch reads double quotes, but no escapes inside them.

    Raises:
        ConfigError: for what cannot be written there.
    """
    text = str(value)
    _refuse_control(text, "an #SBATCH line")
    if re.fullmatch(r"[\w./,:@%+=\[\]&|*()~^-]+", text, re.ASCII):
        return _Safe(text)
    if '"' in text or "\\" in text:
        raise ConfigError(f"{text!r}: a double quote or backslash cannot stand in an #SBATCH line; choose another name")
    return _Safe(f'"{text}"')


def comment(value: Any) -> str:
    """Text for a comment: control characters become question marks."""
    return _Safe("".join(character if character.isprintable() else "?" for character in str(value)))


def variable(name: str) -> str:
    """The value of the environment variable `name` (checked by the profile), or /tmp where it is not set."""
    return _Safe(f'"${{{name}:-/tmp}}"')


def _refuse_control(text: str, where: str) -> None:
    if not text.isprintable():
        raise ConfigError(f"{text!r}: line breaks and control characters cannot stand in {where}; choose another name")


def _only_safe(value: Any) -> Any:
    if isinstance(value, _Safe) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise jinja2.TemplateRuntimeError(
        f"{value!r} is printed without one of the filters sh, words, sbatch, variable, comment"
    )


def render(template: str, job: Job) -> str:
    """The script that jobs/TEMPLATE.sbatch.j2 makes for `job`.

    Raises:
        ConfigError: a path or value that cannot stand in a script, or a profile without such templates.
    """
    if not TEMPLATES.is_dir():
        raise ConfigError(f"{TEMPLATES}: no such folder; run from a source checkout, which holds the job templates")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        finalize=_only_safe,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"sh": shell, "words": words, "sbatch": sbatch, "variable": variable, "comment": comment}
    profile = job.profile
    return environment.get_template(f"{template}.sbatch.j2").render(
        job=job,
        cluster=profile,
        slurm=profile.scheduler == "slurm",
        name=job_name(template, job.run),
        output=str(job.run).replace("%", "%%") + "/slurm-%j.log",
        python=_python(profile),
        image=_image(profile, job.workdir),
        binds=_binds(job) if profile.container.runtime != "none" else [],
        patience=_patience(profile.requeue.lead_seconds),
        passed=[*_JOB_VARIABLES, *profile.environment, *profile.container.pass_environment],
    )


def job_name(template: str, run: Path) -> str:
    """Name of the job in the queue: what it does, and the run's name in characters that need no quoting."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{template}-{run.name}")


def _patience(lead: int) -> int:
    """Seconds that a run has to save once asked; the rest of the lead is for the script to requeue it."""
    return max(lead - 30, lead // 2)


def _python(profile: ClusterProfile) -> str:
    if profile.container.runtime != "none":
        return "python3"
    venv = profile.container.venv
    return f"{venv}/bin/python" if venv else sys.executable


def _image(profile: ClusterProfile, workdir: Path) -> str:
    """The image; a file's path is made absolute, because jobs may start elsewhere."""
    image = profile.container.image or ""
    is_file = profile.container.runtime in ("apptainer", "pyxis") and "://" not in image and "#" not in image
    return str(workdir / image) if image and is_file else image


def _binds(job: Job) -> list[str]:
    """What the container shows: the folders of run, config and data, the profile's; parents first, or they would hide
    what is bound inside them."""
    for path in (job.workdir, job.run, *job.needs):
        if "," in str(path) or ":" in str(path):
            raise ConfigError(f"{path}: a comma or colon in a path cannot be bound into a container; rename the folder")
    binds = {str(path): f"{path}:{path}:ro" for path in (job.workdir, *job.needs)}
    extra = [*job.profile.container.binds, str(job.run)]
    if job.profile.network.bind_infiniband:
        extra.append("/dev/infiniband")
    if job.profile.scratch.folder:
        extra.append(job.profile.scratch.folder)
    for bind in extra:
        inside = bind.split(":")[1] if ":" in bind else bind
        binds[inside] = bind if ":" in bind else f"{bind}:{bind}"
    return [binds[inside] for inside in sorted(binds)]
