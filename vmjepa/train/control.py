"""Requests to a running training: `touch control/stop`, `touch control/save`, or a signal. All ranks agree per step."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType

from vmjepa.train.distributed import World, max_over_ranks

NOTHING, SAVE, STOP = 0, 1, 2
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Control:
    """Polled once per optimizer step; the same answer on every rank, so that all save together.

    SIGTERM, SIGUSR1 and Ctrl-C ask for a stop: the step is finished and saved first. A second Ctrl-C ends at once.
    """

    def __init__(self, folder: Path, world: World):
        self._folder, self._world = folder, world
        self._signalled = False
        self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True

    def poll(self) -> int:
        """NOTHING, SAVE or STOP: the strongest request any rank has seen. The save request is taken away."""
        request = STOP if self._signalled else NOTHING
        if self._world.rank == 0 and request != STOP:
            if (self._folder / "stop").exists():
                request = STOP
            elif (self._folder / "save").exists():
                (self._folder / "save").unlink(missing_ok=True)
                request = SAVE
        return max_over_ranks(request, self._world.device)

    def close(self) -> None:
        """Gives the signals back."""
        with suppress(ValueError):
            for number, handler in self._previous.items():
                signal.signal(number, handler)
