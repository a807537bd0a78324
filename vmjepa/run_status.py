"""What a run says about itself: the heartbeat in status.json, and why a rank ended by an error. Needs no torch."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vmjepa.errors import PeerLostError, StorageError, UserError
from vmjepa.lease import in_use
from vmjepa.run_dir import RunDir, read_json, write_atomic

TICK_S = 30.0


class StatusFile:
    """Rank 0's writer of status.json: state, step, metrics and the time of the last sign of life."""

    def __init__(self, run: RunDir, attempt: int):
        self._run = run
        before = read_status(run)
        self._beat: dict[str, Any] = {
            "state": "running",
            "phase": "starting",
            "step": before.get("step", 0),
            "total_steps": before.get("total_steps"),
            "attempt": attempt,
            "host": platform.node(),
            "pid": os.getpid(),
            "metrics": before.get("metrics", {}),
        }
        self._write()

    def beat(self, state: str, step: int, total: int, values: dict[str, float]) -> None:
        """Rewrites the file. step: optimizer steps done; values: the newest metrics, empty to keep the ones before."""
        self._beat |= {"state": state, "step": step, "total_steps": total}
        if values:
            self._beat |= {"phase": "training", "metrics": values}
        self._write()

    def tick(self, step: int) -> None:
        """To be called every step: refreshes a file older than 30 s, so that rare logging is not taken for silence."""
        if time.monotonic() - self._written >= TICK_S:
            self._beat |= {"phase": "training", "step": step}
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        write_atomic(self._run.status, json.dumps(self._beat | {"time": time.time()}, indent=1))


def read_status(run: RunDir) -> dict[str, Any]:
    """Content of status.json; empty when there is none that can be read."""
    try:
        return read_json(run.status)
    except (OSError, ValueError):
        return {}


def mark_failed(run: RunDir, reason: str, attempt: int | None) -> None:
    """Sets the state to failed, with the reason, and keeps the rest. attempt: None when none had begun."""
    before = {"step": 0, "total_steps": None, "metrics": {}} | read_status(run)
    here = {"attempt": attempt, "host": platform.node(), "pid": os.getpid(), "time": time.time()}
    write_atomic(run.status, json.dumps(before | here | {"state": "failed", "reason": reason}, indent=1))


@contextmanager
def failures_shown(folder: str | Path | None) -> Iterator[None]:
    """Around what comes before an attempt: a UserError is noted in status.json, if the run's folder exists.

    Under torchrun only rank 0 writes. A run that another process is training stays as it is.
    """
    try:
        yield
    except UserError as error:
        leads = os.environ.get("RANK", "0") == "0"
        if leads and folder is not None and Path(folder).is_dir() and not in_use(RunDir(folder)):
            _try_to_mark(RunDir(folder), str(error), None)
        raise


def record_error(run: RunDir, attempt: int, rank: int, error: BaseException) -> None:
    """Writes attempts/N/error-rankR.json, and on rank 0 the state "failed". A disk that refuses is passed over."""
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".strip(": ")
    reason = "ended from the keyboard" if isinstance(error, KeyboardInterrupt) else reason
    record_failure(run, attempt, rank, reason, follows=isinstance(error, PeerLostError))
    if rank == 0:
        _try_to_mark(run, reason, attempt)


def record_failure(
    run: RunDir, attempt: int, rank: int, reason: str, follows: bool = False, suspects: tuple[str, ...] = ()
) -> None:
    """Writes attempts/N/error-rankR.json.

    Args:
        follows: whether another rank's end caused it.
        suspects: hosts that may be at fault.
    """
    note = {"rank": rank, "host": platform.node(), "pid": os.getpid(), "time": time.time(), "reason": reason}
    content = json.dumps(note | {"follows": follows, "suspects": list(suspects)}, indent=1)
    with suppress(StorageError):  # the error itself goes to stderr in any case
        write_atomic(run.attempt(attempt) / f"error-rank{rank}.json", content)


def _try_to_mark(run: RunDir, reason: str, attempt: int | None) -> None:
    with suppress(StorageError):
        mark_failed(run, reason, attempt)


def first_error(run: RunDir, attempt: int) -> dict[str, Any] | None:
    """The record of the rank whose error ended the attempt: the earliest that does not follow from another's end."""
    records = []
    for path in run.attempt(attempt).glob("error-rank*.json"):
        with suppress(OSError, ValueError):
            records.append(read_json(path))
    return min(records, key=lambda record: (record["follows"], record["time"]), default=None)
