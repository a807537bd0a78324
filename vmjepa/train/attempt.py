"""One start of a run, on one rank: what surrounds training so that a person can see what became of it."""

from __future__ import annotations

import os
import traceback
from types import TracebackType

import psutil

from vmjepa.errors import UserError
from vmjepa.launch.local import LAUNCHED
from vmjepa.lease import Lease
from vmjepa.run_dir import ATTEMPT, RunDir
from vmjepa.run_status import StatusFile, record_error
from vmjepa.train.distributed import World, from_rank_zero
from vmjepa.train.rank_log import RankLog
from vmjepa.train.watchdog import Watchdog


def launch_time() -> float:
    """When the command that started this rank began, in seconds since the epoch: later requests are meant for it."""
    return float(os.environ.get(LAUNCHED) or psutil.Process().create_time())


class Attempt:
    """Context manager around training: takes the lease, numbers the attempt, keeps logs, heartbeat and watchdog.

    number: N of attempts/N, the same on all ranks. All ranks must enter together.

    Raises:
        LeaseError: on entering, when another job holds the run directory.
    """

    log: RankLog
    watchdog: Watchdog

    def __init__(self, run: RunDir, world: World, hang_seconds: float | None):
        self.run, self.world = run, world
        self.number = 0
        self._hang_seconds = hang_seconds
        self._lease = Lease(run)
        self._status: StatusFile | None = None

    def __enter__(self) -> Attempt:
        fault: UserError | None = None
        if self.world.rank == 0:
            try:
                self._begin()
            except UserError as error:
                fault = error
        self.number, fault = from_rank_zero((self.number, fault), self.world)
        if fault is not None:
            raise fault
        rank = self.world.rank
        self.log = RankLog(self.run.log(self.number, rank))
        self.watchdog = Watchdog(self.run, self.number, rank, self.world.size, self._hang_seconds)
        return self

    def _begin(self) -> None:
        self.run.create()
        self._lease.acquire()
        for request in (self.run.control / "stop", self.run.control / "save"):
            if ATTEMPT in os.environ:
                break  # a job script has tidied up, and may have been signalled since
            if request.exists() and request.stat().st_mtime < launch_time():  # left over from an earlier attempt
                request.unlink(missing_ok=True)
        self.number = self.run.next_attempt()
        self._status = StatusFile(self.run, self.number)

    def beat(self, state: str, step: int, total: int, values: dict[str, float]) -> None:
        """Rewrites status.json, on rank 0. step: optimizer steps done; values: metrics."""
        if self._status:
            self._status.beat(state, step, total, values)

    def tick(self, step: int) -> None:
        """Every step: keeps the heartbeat fresh where logging is rare."""
        if self._status:
            self._status.tick(step)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.watchdog.close()
        if error is not None:
            record_error(self.run, self.number, self.world.rank, error)
            short = isinstance(error, UserError)
            self.log.note(f"error: {error}" if short else "".join(traceback.format_exception(error)))
        self.log.close()
        self._lease.release()
