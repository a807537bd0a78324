"""The run directory: what lies where, and writes that are either whole or absent."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from vmjepa.errors import storage_error

PACKAGES = ("torch", "deepspeed", "mamba-ssm", "causal-conv1d", "nvidia-dali-cuda130", "av", "webdataset", "numpy")

ATTEMPT = "VMJEPA_ATTEMPT"
"""Variable in which a job script names the folder attempts/N that it made for this start."""


class RunDir:
    """Paths inside runs/NAME. Creating the object touches nothing; `create` makes the folders."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    @property
    def config(self) -> Path:
        """The resolved config of the run."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged optimizer step."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Folder of step_XXXXXXXX folders."""
        return self.root / "checkpoints"

    @property
    def control(self) -> Path:
        """`touch control/stop` saves and ends the run, `touch control/save` saves."""
        return self.root / "control"

    @property
    def status(self) -> Path:
        """Heartbeat of rank 0, and the reason of a failure."""
        return self.root / "status.json"

    @property
    def attempts(self) -> Path:
        """Folder of attempts/N, one per start of the run, and the link `latest`."""
        return self.root / "attempts"

    def attempt(self, number: int) -> Path:
        """Folder of one start of the run: logs and errors per rank, provenance."""
        return self.attempts / str(number)

    def log(self, number: int, rank: int) -> Path:
        """What a rank wrote to stderr in an attempt."""
        return self.attempt(number) / f"rank_{rank}.log"

    def last_attempt(self) -> int:
        """Number of the newest attempt; 0 when there is none."""
        return max((int(p.name) for p in self.attempts.glob("*") if p.name.isdigit()), default=0)

    def create(self) -> None:
        """Makes the folders.

        Raises:
            StorageError: when the file system refuses.
        """
        try:
            for folder in (self.tensorboard, self.checkpoints, self.control):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"creating the run directory {self.root}") from error

    def next_attempt(self) -> int:
        """Creates attempts/N for this start of the run, points attempts/latest at it, and returns N, from 1.

        In a job it is the folder that the job script has made.

        Raises:
            StorageError: when the file system refuses.
        """
        number = int(Path(os.environ[ATTEMPT]).name) if ATTEMPT in os.environ else self.last_attempt() + 1
        try:
            (self.attempt(number) / "alive").mkdir(parents=True)
        except OSError as error:
            raise storage_error(error, f"creating {self.attempt(number)}") from error
        link = self.attempts / ".latest.tmp"
        with suppress(OSError):  # a file system without links: the numbers tell
            link.unlink(missing_ok=True)
            link.symlink_to(str(number))
            os.replace(link, self.attempts / "latest")
        return number


def write_atomic(path: Path, data: str | bytes) -> None:
    """Writes a file under a temporary name, syncs it and renames it: a reader sees the old file or the new one.

    Raises:
        StorageError: when the disk is full or refuses; the old file is then intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise storage_error(error, f"writing {path}") from error


def sync_folder(folder: Path) -> None:
    """Makes renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def provenance(world: int) -> dict[str, Any]:
    """Where, when and with what a run was started: JSON-ready."""
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "host": platform.node(),
        "world_size": world,
        "python": platform.python_version(),
        "git": _git_revision(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "image": os.environ.get("VMJEPA_IMAGE_DIGEST"),
        "packages": versions,
    }


def _git_revision() -> str | None:
    """Revision of the source tree, with "+changes" when it has uncommitted ones; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that this package wrote."""
    return json.loads(path.read_text())
