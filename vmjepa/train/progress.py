"""Progress on rank 0: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vmjepa.train.rank_log import RankLog

_PLAIN_EVERY_S = 10.0


class TrainProgress:
    """Context manager. `shown` is False on ranks that stay silent. rank_log: gets plain lines while the bar is live."""

    def __init__(self, name: str, total: int, done: int, shown: bool, rank_log: RankLog | None = None):
        self._name, self._total, self._shown = name, total, shown
        on_terminal = rank_log is not None and rank_log.console.isatty()
        self._log = rank_log if on_terminal else None  # elsewhere the plain lines reach it through stderr
        self._console = Console(file=rank_log.console) if rank_log and on_terminal else Console(stderr=True)
        self._live: Progress | None = None
        self._text = ""
        self._first, self._started, self._spoke = done, time.monotonic(), 0.0
        if shown and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._live = Progress(*columns, TextColumn("{task.fields[text]}"), console=self._console)
            self._task = self._live.add_task(name, total=total, completed=done, text="")

    def __enter__(self) -> TrainProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def update(self, done: int, text: str = "") -> None:
        """done: steps finished. text: metrics to show, empty to keep the last ones."""
        if self._live:
            self._text = text or self._text
            self._live.update(self._task, completed=done, text=self._text)
        plain = self._shown and (self._log is not None or self._live is None)
        if plain and text and (done == self._total or time.monotonic() - self._spoke > _PLAIN_EVERY_S):
            self._spoke = time.monotonic()
            left = (self._spoke - self._started) / max(1, done - self._first) * (self._total - done)
            line = f"{self._name}: step {done}/{self._total}  {text}  {left:.0f} s left"
            if self._log:
                self._log.note(line)
            else:
                self.say(line)

    def say(self, line: str) -> None:
        """One line of its own."""
        if self._shown:
            console = self._live.console if self._live else self._console
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            sys.stderr.flush()
