"""How far a run is: a bar with clips/s and the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_LINE_EVERY = 10.0  # seconds, without a terminal


class Progress:
    """Reports settled clips on the standard error stream; silent when not `enabled`."""

    def __init__(self, enabled: bool = True) -> None:
        console = Console(stderr=True)
        self._enabled = enabled
        self._bar: Bar | None = None
        if enabled and console.is_terminal:
            self._bar = Bar(
                TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[notes]}"),
                TimeRemainingColumn(), console=console,
            )  # fmt: skip
        self._total = self._first = self._done = 0
        self._bad = 0
        self._began = self._last_line = time.monotonic()

    def start(self, total: int, done: int) -> None:
        """total: clips of the run; done: settled by an earlier one."""
        self._total, self._first, self._done = total, done, done
        self._began = self._last_line = time.monotonic()
        if self._bar:
            self._bar.add_task("packing", total=total, completed=done, notes="")
            self._bar.start()

    def advance(self, packed: int, quarantined: int) -> None:
        """Says how many clips are settled by now."""
        self._done, self._bad = packed + quarantined, quarantined
        self.tick()

    def rate(self) -> float:
        """Clips per second of this run."""
        return (self._done - self._first) / max(time.monotonic() - self._began, 1e-9)

    def tick(self) -> None:
        """Shows the state, if it is time to."""
        if self._bar:
            notes = f"{self.rate():.1f} clips/s" + (f", {self._bad} quarantined" if self._bad else "")
            self._bar.update(self._bar.task_ids[0], completed=self._done, notes=notes)
        elif self._enabled and time.monotonic() - self._last_line >= _LINE_EVERY:
            self._last_line = time.monotonic()
            left = f"{(self._total - self._done) / self.rate():.0f} s left" if self.rate() else "time left unknown"
            bad = f", {self._bad} quarantined" if self._bad else ""
            Console(stderr=True).print(
                f"packing: {self._done} of {self._total} clips{bad}, {self.rate():.1f} clips/s, {left}", soft_wrap=True
            )

    def stop(self) -> None:
        """Ends the display."""
        if self._bar:
            self._bar.stop()
