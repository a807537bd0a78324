"""One job at a time per run directory: a lease that a killed job cannot leave behind. Needs no torch.

Rank 0 holds an flock on lease.lock while it lives; the kernel drops it at any kind of death. Some cluster file systems
keep flocks on one machine only, so the holder also touches the file every 10 s: whoever gets the lock but reads another
machine's name in the file first sees whether the touching goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmjepa.errors import UserError, storage_error
from vmjepa.run_dir import RunDir

TOUCH_S = 10.0
STALE_S = 45.0
_RETRY_S = 2.0  # long enough for a `vmjepa status` that looks at the lock


class LeaseError(UserError):
    """Another job is training in this run directory."""


@dataclass(frozen=True)
class Holder:
    """Who holds, or held, a lease. machine: the boot id, the same in all containers of a machine."""

    host: str
    pid: int
    since: str
    machine: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class Lease:
    """Taken by `acquire`, held until `release` or the end of the process."""

    def __init__(self, run: RunDir):
        self._run, self._path = run, lease_file(run)
        self._file: Any = None
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Takes the lease, at once unless a job on another machine must first be seen to be silent (45 s at most).

        Raises:
            LeaseError: when another job holds it, saying which.
            StorageError: when the file system refuses.
        """
        try:
            self._file = open(self._path, "a+")  # noqa: SIM115 - held for the life of the process
        except OSError as error:
            raise storage_error(error, f"opening {self._path}") from error
        locks_work = self._lock()
        holder = _read(self._path)
        if holder is not None and not (locks_work and holder.machine == _machine()):
            self._wait_for_silence()
        here = Holder(platform.node(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"), _machine())
        self._file.truncate(0)
        self._file.write(json.dumps(here.__dict__))
        self._file.flush()
        threading.Thread(target=self._keep_touching, name="lease", daemon=True).start()

    def _lock(self) -> bool:
        """True when the lock is ours, False when this file system has no locks."""
        deadline = time.monotonic() + _RETRY_S
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._file.close()
                    raise _refusal(self._run) from None
                time.sleep(0.1)
            except OSError:
                return False

    def _wait_for_silence(self) -> None:
        # the age is measured by the file system's clock; machines' own clocks may differ
        probe = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        probe.touch()
        seen = self._path.stat().st_mtime
        age = probe.stat().st_mtime - seen
        probe.unlink()
        deadline = time.monotonic() + STALE_S - age
        while time.monotonic() < deadline:
            time.sleep(min(1.0, TOUCH_S / 10))
            if self._path.stat().st_mtime != seen:
                self._file.close()
                raise _refusal(self._run)

    def _keep_touching(self) -> None:
        while not self._ended.wait(TOUCH_S):
            with suppress(OSError):
                os.utime(self._path)

    def release(self) -> None:
        """Gives the lease back."""
        self._ended.set()
        if self._file is not None and not self._file.closed:
            with suppress(OSError):
                self._file.truncate(0)
            self._file.close()


def lease_file(run: RunDir) -> Path:
    """The file that is locked, and names the holder."""
    return run.root / "lease.lock"


def refuse_if_held(run: RunDir) -> None:
    """For a launcher, before it starts anything. Raises LeaseError when a process here holds the lease."""
    if is_held(run):
        raise _refusal(run)


def _refusal(run: RunDir) -> LeaseError:
    holder = _read(lease_file(run)) or "another process"
    return LeaseError(
        f"{run.root} is in use by {holder}; stop that job first (vmjepa stop {run.root}), or choose another "
        "logging.folder"
    )


def lost_holder(run: RunDir) -> Holder | None:
    """The holder, when it was on this machine and has died without giving the lease back."""
    path = lease_file(run)
    holder = _read(path)
    if holder is None or holder.machine != _machine():
        return None
    return holder if is_held(run) is False else None


def in_use(run: RunDir) -> bool:
    """True when a job is training in the run directory, here or, as far as the file's age tells, elsewhere."""
    held = is_held(run)
    holder = _read(lease_file(run))
    if held or holder is None:
        return bool(held)
    if held is False and holder.machine == _machine():
        return False
    return time.time() - lease_file(run).stat().st_mtime < STALE_S


def is_held(run: RunDir) -> bool | None:
    """Whether a process holds the lock, as far as this machine can tell; None where the file system has no locks."""
    try:
        with open(lease_file(run)) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()
