"""Reads and decodes batches ahead of their use, in background threads.

Threads, not processes: FFmpeg, DALI, hashing and resizing all release the interpreter lock, and threads write straight
into the batch's memory. A batch is asked for by sample ids, so nothing here decides an order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from vmjepa.data.clips import ClipPlan, ClipSpec, VideoInfo
from vmjepa.data.decode import DecodeError, DecodeJob, Decoder, TooFewFrames
from vmjepa.data.samples import Samples
from vmjepa.errors import DataError

MAX_ATTEMPTS = 16  # replacements tried for one place of a batch before the data counts as unusable
_BATCHES_AHEAD = 2


@dataclass(frozen=True, eq=False)
class Request:
    """A batch to read: its place in the run and, per slot, the sample and the epoch (both int64 (b,))."""

    step: int
    micro: int
    samples: np.ndarray
    epochs: np.ndarray


@dataclass(eq=False)
class Batch:
    """A decoded batch.

    clips: per clip of a video one uint8 (b, T, S, S, 3) RGB tensor. labels, samples: int64 (b,), of the videos that
    were used. replaced: one sentence per clip that failed and was replaced. step: optimizer step (or batch number in an
    evaluation); micro: which micro-batch of the step.
    """

    step: int
    micro: int
    clips: list[torch.Tensor]
    labels: torch.Tensor
    samples: torch.Tensor
    replaced: list[str]


@dataclass(frozen=True)
class _Try:
    """An attempt to fill one slot; `frames` is set once the video turned out shorter than its packets say."""

    slot: int
    sample: int
    epoch: int
    attempt: int = 0
    frames: int | None = None


class _TooShort(DecodeError):
    """A video the config asks to leave out: replaced like a bad one, but no fault."""


Planner = Callable[[VideoInfo, int, int, int], list[ClipPlan]]


class BatchReader:
    """Turns requests into batches, a few ahead.

    Args:
        samples: where the bytes come from.
        spec: the clips' geometry; spec.num_clips is not used, `clips_per_video` is.
        clips_per_video: how many plans `planner` gives.
        planner: (video, sample, epoch, attempt) → the plans of one video.
        decoder: the decode backend.
        workers: decode threads.
        replace_bad: put the following sample in place of one that fails; else raise DataError naming it.
        min_frames: videos with fewer frames are replaced without counting as bad.
        pin_memory: page-locked batches, for faster copies to a GPU.
    """

    def __init__(
        self,
        samples: Samples,
        spec: ClipSpec,
        clips_per_video: int,
        planner: Planner,
        decoder: Decoder,
        workers: int,
        replace_bad: bool,
        min_frames: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self._samples, self._planner, self._decoder = samples, planner, decoder
        self._shape = (spec.num_frames, spec.crop_size, spec.crop_size, 3)
        self._clips_per_video = clips_per_video
        self._workers = 1 if decoder.whole_batches else max(1, workers)
        self._replace_bad, self._min_frames, self._pin_memory = replace_bad, min_frames, pin_memory
        self.wait_seconds = 0.0

    def batches(self, requests: Iterable[Request]) -> Generator[Batch]:
        """Yields the batches in order. Closing the generator stops the threads.

        Raises:
            DataError: a clip failed and may not be replaced, no replacement decodes, or bytes are not those packed.
        """
        remaining = iter(requests)
        queue: deque[tuple[Batch, list[Future[list[str]]]]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        try:
            while True:
                began = time.perf_counter()
                while len(queue) <= self._ahead(queue) and (request := next(remaining, None)) is not None:
                    queue.append(self._start(request, pool))
                if not queue:
                    return
                batch, parts = queue.popleft()
                for part in parts:
                    batch.replaced += part.result()
                self.wait_seconds += time.perf_counter() - began
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _ahead(self, queue: deque[tuple[Batch, list[Future[list[str]]]]]) -> int:
        """Batches to keep in the making: enough to keep every thread busy when batches are small."""
        size = len(queue[0][0].labels) if queue else self._workers
        return max(_BATCHES_AHEAD, -(-2 * self._workers // size))

    def _start(self, request: Request, pool: ThreadPoolExecutor) -> tuple[Batch, list[Future[list[str]]]]:
        size = len(request.samples)
        pin = self._pin_memory and self._decoder.device.type == "cpu"
        shape = (size, *self._shape)
        clips = [
            torch.empty(shape, dtype=torch.uint8, device=self._decoder.device, pin_memory=pin)
            for _ in range(self._clips_per_video)
        ]
        ids = [torch.empty(size, dtype=torch.int64) for _ in range(2)]
        batch = Batch(request.step, request.micro, clips, ids[0], ids[1], [])
        places = zip(request.samples.tolist(), request.epochs.tolist(), strict=True)
        tries = [_Try(slot, sample, epoch) for slot, (sample, epoch) in enumerate(places)]
        parts = [tries] if self._decoder.whole_batches else [[one] for one in tries]
        return batch, [pool.submit(self._fill, batch, part) for part in parts]

    def _fill(self, batch: Batch, tries: list[_Try]) -> list[str]:
        """Decodes until every slot holds a clip; returns a sentence per replaced clip."""
        notes: list[str] = []
        while tries:
            prepared = [self._prepare(one) for one in tries]
            decoded = iter(self._decoder.decode([job for job in prepared if isinstance(job, DecodeJob)]))
            again: list[_Try] = []
            for one, job in zip(tries, prepared, strict=True):
                result = next(decoded) if isinstance(job, DecodeJob) else job
                if not isinstance(result, DecodeError):
                    self._store(batch, one, result)
                elif isinstance(result, TooFewFrames) and result.decoded and not self._samples.counted(one.sample):
                    again.append(replace(one, frames=result.decoded))
                else:
                    again.append(self._substitute(one, result))
                    if not isinstance(result, _TooShort):
                        notes.append(
                            f"{self._samples.describe(one.sample)} cannot be decoded ({result}); "
                            f"{self._samples.describe(again[-1].sample)} takes its place"
                        )
            tries = again
        return notes

    def _prepare(self, one: _Try) -> DecodeJob | DecodeError:
        data = self._samples.read(one.sample)
        try:
            video = self._samples.video(one.sample, data)
        except DecodeError as error:
            return error
        video = video if one.frames is None else replace(video, frames=one.frames)
        if video.frames < self._min_frames:
            return _TooShort(f"{video.frames} frames")
        return DecodeJob(data, video, self._planner(video, one.sample, one.epoch, one.attempt))

    def _store(self, batch: Batch, one: _Try, clips: list[torch.Tensor]) -> None:
        for target, clip in zip(batch.clips, clips, strict=True):
            target[one.slot].copy_(clip)
        batch.samples[one.slot] = one.sample
        batch.labels[one.slot] = int(self._samples.labels[one.sample])

    def _substitute(self, one: _Try, error: DecodeError) -> _Try:
        """The following sample, in the same epoch: the same choice in every run and at every number of ranks."""
        where = self._samples.describe(one.sample)
        if not self._replace_bad:
            raise DataError(
                f"{where} cannot be decoded ({error}); an evaluation leaves out nothing: "
                "remove the clip from the data, or pack the data with `python -m tools.shard run`"
            )
        if one.attempt + 1 >= min(MAX_ATTEMPTS, len(self._samples)):
            raise DataError(
                f"{where} cannot be used ({error}), nor can the {one.attempt} clips before it; "
                "check the data with `python -m tools.shard run`, which lists every bad clip"
            )
        return _Try(one.slot, (one.sample + 1) % len(self._samples), one.epoch, one.attempt + 1)
