"""attempts/N/rank_R.log: all that this rank writes to stderr, by whatever library, kept beside the run."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO


class RankLog:
    """Sends file descriptor 2 through `tee` until closed.

    A process of its own does the copying, so that the last words of a crash (a fatal signal, C++ aborting) arrive too.
    `console` is the real stderr: a live progress bar goes there, past the log.
    """

    def __init__(self, path: Path):
        self._path = path
        self.console: TextIO = os.fdopen(os.dup(2), "w", buffering=1)
        self._tee = subprocess.Popen(
            ["tee", "-ai", str(path)],
            stdin=subprocess.PIPE,
            stdout=self.console,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # outlives signals to the rank's process group, and ends when the rank has
        )
        assert self._tee.stdin is not None
        os.dup2(self._tee.stdin.fileno(), 2)
        self._tee.stdin.close()

    def note(self, text: str) -> None:
        """Appends text to the log only."""
        with open(self._path, "a") as file:
            file.write(text.rstrip("\n") + "\n")

    def close(self) -> None:
        """Gives stderr back."""
        sys.stderr.flush()
        os.dup2(self.console.fileno(), 2)
        with suppress(subprocess.TimeoutExpired):  # a helper process that lives on keeps the pipe open
            self._tee.wait(timeout=2)
        self.console.close()
