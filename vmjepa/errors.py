"""Errors that say what is wrong, where, and what to do about it; and the exit codes jobs rely on.

Exit codes (the batch scripts act on them): 0 done, 85 saved and resumable (requeue), 93 never retry (bad
config, bad data, unusable checkpoint, run directory in use), 87 hung (a crash whose suspects are named in the run
directory); anything else is a crash.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

EXIT_REQUEUE = 85
EXIT_HUNG = 87
EXIT_NEVER_RETRY = 93


class UserError(Exception):
    """A mistake the user can mend. The message is one sentence: what, where, and the remedy."""

    exit_code = EXIT_NEVER_RETRY


class ConfigError(UserError):
    """A config file, key or override that cannot be used."""


class DataError(UserError):
    """A CSV, shard, manifest or clip that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used for this run."""


class DivergedError(UserError):
    """The loss or a weight is no finite number any more. The same config would diverge again, so it is not retried."""


class StorageError(UserError):
    """The disk is full or refuses to be written. Retrying after making room is sensible, so it counts as a crash."""

    exit_code = 1


class PeerLostError(UserError):
    """Another rank has ended. A crash here: that rank's own exit code says whether a retry makes sense."""

    exit_code = 1


_OS_REMEDIES = {
    errno.ENOSPC: "the disk is full; make room or choose another folder, then run the same command again",
    errno.EDQUOT: "the disk quota is used up; make room or choose another folder, then run the same command again",
    errno.EACCES: "permission denied; choose a folder you may write to, or change its permissions",
    errno.EROFS: "the file system is read-only; choose another folder",
}


def storage_error(error: OSError, doing: str) -> StorageError:
    """Turns an OSError into a sentence. `doing` says what was being attempted, e.g. "writing shard-000003.tar"."""
    remedy = _OS_REMEDIES.get(error.errno or 0, f"{error.strerror or error}; check the path and the file system")
    where = f" ({error.filename})" if error.filename else ""
    return StorageError(f"{doing}{where}: {remedy}")


@contextmanager
def handle_errors() -> Iterator[None]:
    """Wraps a command: a UserError becomes one line on stderr and its exit code; others keep their traceback."""
    try:
        yield
    except UserError as error:
        _stop(error)
    except OSError as error:
        if error.errno not in _OS_REMEDIES:
            raise
        _stop(storage_error(error, "could not finish"))


def _stop(error: UserError) -> NoReturn:
    rank = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""
    print(f"error{rank}: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
