"""Ends a rank that makes no progress, with every thread's stack and the name of the rank that the others wait for.

The training loop calls `reach` at a few places of every step: two assignments, no file, no synchronisation. A thread
writes the place to attempts/N/alive/rank_R now and then. All ranks pass the same places in the same order, so the rank
with the lowest count holds the others up; a rank whose file stands still is stopped or dead.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vmjepa.errors import EXIT_HUNG
from vmjepa.run_dir import RunDir, read_json
from vmjepa.run_status import mark_failed, record_failure

_FIRST_STEP_FACTOR = 4  # until the first step is done: kernels are compiled, caches are cold
_LONGEST_BEAT_S = 15.0


class Watchdog:
    """Watches its own process; `hang_seconds` None leaves it off."""

    def __init__(self, run: RunDir, attempt: int, rank: int, size: int, hang_seconds: float | None):
        self._run, self._attempt, self._rank, self._size = run, attempt, rank, size
        self._alive = run.attempt(attempt) / "alive"
        self._count, self._place = 0, "starting"
        self._first_step: int | None = None
        self._patience = float("inf") if hang_seconds is None else hang_seconds
        self._starting = True
        self._beat_s = min(_LONGEST_BEAT_S, self._patience / 5)
        self._ended = threading.Event()
        if hang_seconds is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def reach(self, step: int, doing: str) -> None:
        """The rank has come to this place. step: optimizer steps done; all ranks call it in the same order."""
        if self._first_step is None:
            self._first_step = step
        self._starting = step == self._first_step
        self._place = f"{doing} step {step + 1}"
        self._count += 1

    def close(self) -> None:
        """Ends the watch."""
        self._ended.set()

    def _watch(self) -> None:
        beat, seen, still, last = 0, 0, 0.0, time.monotonic()
        while not self._ended.wait(self._beat_s):
            beat += 1
            self._write(beat)
            now = time.monotonic()
            # a job that the scheduler suspends and continues has not hung: time this thread slept through is left out
            still, last = still + min(now - last, 2 * self._beat_s), now
            if self._count != seen:
                seen, still = self._count, 0.0
            elif still >= self._patience * (_FIRST_STEP_FACTOR if self._starting else 1):
                before = self._read_all()
                for _ in range(3):
                    time.sleep(self._beat_s)
                    beat += 1
                    self._write(beat)
                if self._count == seen and not self._ended.is_set():
                    self._give_up(still, *accuse(before, self._read_all(), self._size))

    def _write(self, beat: int) -> None:
        note = {"rank": self._rank, "host": platform.node(), "pid": os.getpid(), "beat": beat}
        path = self._alive / f"rank_{self._rank}"
        with suppress(OSError):  # a sign of life that cannot be written is no reason to end
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(note | {"count": self._count, "place": self._place}))
            os.replace(temporary, path)

    def _read_all(self) -> dict[int, dict[str, Any]]:
        return {rank: note for rank in range(self._size) if (note := _read(self._alive / f"rank_{rank}"))}

    def _give_up(self, still: float, accusation: str, suspects: tuple[str, ...]) -> None:
        reason = f"no progress for {still:.0f} s while {self._place}: {accusation}"
        record_failure(self._run, self._attempt, self._rank, reason, suspects=suspects)
        if self._rank == 0:
            with suppress(Exception):
                mark_failed(self._run, reason, self._attempt)
        sys.stderr.flush()
        faulthandler.dump_traceback(2, all_threads=True)
        os.write(2, f"error (rank {self._rank}): {reason}\n".encode())
        os._exit(EXIT_HUNG)  # the main thread cannot be asked


def accuse(
    before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], size: int
) -> tuple[str, tuple[str, ...]]:
    """Who holds the others up, and on which hosts, from two readings of all signs of life, by rank.

    Returns:
        a clause, and the hosts of the accused ranks (none when every rank waits at the same place).
    """
    unheard = [rank for rank in range(size) if rank not in after]
    mute = [rank for rank in after if rank in before and after[rank]["beat"] == before[rank]["beat"]]
    if mute or unheard:
        names = [f"{_name(after[rank])} is stopped or dead (it was {after[rank]['place']})" for rank in mute]
        names += [f"rank {rank} has not shown any sign of life" for rank in unheard]
        return "; ".join(names), _hosts(after, mute)
    least, most = (choose(note["count"] for note in after.values()) for choose in (min, max))
    behind = [rank for rank, note in after.items() if note["count"] == least]
    if least == most:
        return f"no rank has come further ({size} of {size} are here)", ()
    names = [f"{_name(after[rank])} has not arrived (it is {after[rank]['place']})" for rank in behind]
    return "; ".join(names), _hosts(after, behind)


def _hosts(notes: dict[int, dict[str, Any]], ranks: list[int]) -> tuple[str, ...]:
    return tuple(sorted({notes[rank]["host"] for rank in ranks}))


def _name(note: dict[str, Any]) -> str:
    return f"rank {note['rank']} on {note['host']} (process {note['pid']})"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
