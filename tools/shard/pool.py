"""Worker processes that may crash or hang without taking the run with them; answers come in the order of the tasks."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-P", "-m", "tools.shard.worker"]
TIMED_OUT = "time-out"
CRASHED = "decoder crashed"
_AHEAD = 32  # answers per worker that may wait for a slower clip before them
_ENDING_SECONDS = 5  # that a worker may take to end, once its output is closed
_ATTEMPTS = 2  # a worker may also die of something else: the kernel's out-of-memory killer, an operator


class _Worker:
    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "SVT_LOG": "0"},
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._input, self.output = self.process.stdin, self.process.stdout
        self.ready = False
        self.task: int | None = None
        self.seconds = 0.0  # that the task may take

    def send(self, number: int, task: dict[str, Any]) -> None:
        self.task, self.seconds = number, task["seconds"]
        with suppress(BrokenPipeError):  # it died while idle; the end of its output tells
            self._input.write(json.dumps(task) + "\n")
            self._input.flush()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):
            self._input.close()
        self.output.close()


class WorkerPool:
    """Runs tasks of tools.shard.worker on `workers` processes. A context manager: leaving it ends them all.

    waiting: called at least once a second while answers are awaited, for progress reports.
    """

    def __init__(self, workers: int, waiting: Callable[[], None]) -> None:
        self._size, self._waiting = workers, waiting
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._answers: dict[int, dict[str, Any]] = {}  # that wait for their turn
        self._unsent: deque[int] = deque()
        self._attempts: Counter[int] = Counter()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()
        self._selector.close()

    def in_order(self, count: int, make_task: Callable[[int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The answers to make_task(0), …, make_task(count - 1); see worker.answer for their form.

        A task holds "seconds", the time it may take. A clip whose worker runs out of it is answered with TIMED_OUT, one
        that ends two workers with CRASHED. Raises RuntimeError when workers cannot even start.
        """
        self._unsent.extend(range(count))
        for turn in range(count):
            while turn not in self._answers:
                self._hand_out(make_task, before=turn + _AHEAD * self._size)
                for key, _ in self._selector.select(timeout=1.0):
                    self._receive(key.data)
                self._waiting()
            self._attempts.pop(turn)
            yield self._answers.pop(turn)

    def _hand_out(self, make_task: Callable[[int], dict[str, Any]], before: int) -> None:
        """Gives idle workers the next tasks, starting workers as long as there are tasks for them."""
        for _ in range(min(self._size, len(self._unsent)) - len(self._workers)):
            worker = _Worker()
            self._workers.append(worker)
            self._selector.register(worker.output, selectors.EVENT_READ, worker)
        for worker in self._workers:
            if worker.ready and worker.task is None and self._unsent and self._unsent[0] < before:
                number = self._unsent.popleft()
                self._attempts[number] += 1
                worker.send(number, make_task(number))

    def _receive(self, worker: _Worker) -> None:
        """Takes a line of a worker, or notices its end."""
        line, number = worker.output.readline(), worker.task
        if not line.endswith("\n"):
            end = self._bury(worker)
            if number is None:
                return
            if end == TIMED_OUT:
                self._answers[number] = {"reason": TIMED_OUT, "detail": f"more than {worker.seconds:.0f} s"}
            elif self._attempts[number] >= _ATTEMPTS:
                self._answers[number] = {"reason": CRASHED, "detail": end}
            else:
                self._unsent.appendleft(number)
        elif number is None:
            worker.ready = True
        else:
            self._answers[number] = json.loads(line)
            worker.task = None

    def _bury(self, worker: _Worker) -> str:
        """Removes a worker that ended; says how."""
        self._selector.unregister(worker.output)
        self._workers.remove(worker)
        with suppress(subprocess.TimeoutExpired):  # killing it at once would hide how it ends
            worker.process.wait(_ENDING_SECONDS)
        worker.stop()
        code = worker.process.returncode
        if not worker.ready:
            raise RuntimeError(f"a worker process could not start (status {code}); see its message above")
        if code == -signal.SIGALRM:
            return TIMED_OUT
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
