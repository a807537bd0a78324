"""Decodes planned clips with NVIDIA DALI: on a GPU (NVDEC) every usual codec, on a CPU only VP8, VP9 and MJPEG.

DALI is handed encoded bytes, frame numbers and crops, so the order and the windows stay ours and equal PyAV's. The GPU
path is the CPU path with other device names; it has not been run yet, for want of a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch

from vmjepa.data.clips import ClipPlan, stored_crop
from vmjepa.data.decode import DecodeError, DecodeJob, upright


class _Entry(NamedTuple):
    """One clip of one job, as DALI gets it."""

    job: DecodeJob
    plan: ClipPlan


class DaliDecoder:
    """The DALI decode backend: clips of `size` × `size` pixels on `device`.

    One bad video makes DALI fail its whole batch, so a failed batch is decoded again clip by clip to name the culprit.
    To be used from one thread at a time.
    """

    whole_batches = True

    def __init__(self, size: int, batch_size: int, threads: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._size, self._batch_size, self._threads = size, batch_size, threads
        self._pipeline: Any = None

    def decode(self, jobs: Sequence[DecodeJob]) -> list[list[torch.Tensor] | DecodeError]:
        """Per job its clips, uint8 (T, size, size, 3), or why that video failed."""
        entries = [_Entry(job, plan) for job in jobs for plan in job.plans]
        clips: list[torch.Tensor | DecodeError] = []
        for start in range(0, len(entries), self._batch_size):
            clips += self._decode_entries(entries[start : start + self._batch_size])
        results: list[list[torch.Tensor] | DecodeError] = []
        for job in jobs:
            own, clips = clips[: len(job.plans)], clips[len(job.plans) :]
            errors = [clip for clip in own if isinstance(clip, DecodeError)]
            results.append(errors[0] if errors else [clip for clip in own if isinstance(clip, torch.Tensor)])
        return results

    def _decode_entries(self, entries: list[_Entry]) -> list[torch.Tensor | DecodeError]:
        try:
            return list(self._run(entries))
        except RuntimeError as error:
            self._pipeline = None  # what a failed pipeline still holds is not documented: start a new one
            if len(entries) == 1:
                return [DecodeError(f"DALI: {_reason(error)}")]
        return [clip for entry in entries for clip in self._decode_entries([entry])]

    def _run(self, entries: list[_Entry]) -> list[torch.Tensor]:
        if self._pipeline is None:
            self._pipeline = self._build()
        crops = [stored_crop(entry.plan.crop, entry.job.video) for entry in entries]
        feeds = {
            "encoded": [np.frombuffer(entry.job.data, np.uint8) for entry in entries],
            "frames": [entry.plan.frame_index.astype(np.int32) for entry in entries],
            "roi_start": [np.array([crop.top, crop.left], np.float32) for crop in crops],
            "roi_end": [np.array([crop.top + crop.height, crop.left + crop.width], np.float32) for crop in crops],
        }
        for name, samples in feeds.items():
            self._pipeline.feed_input(name, samples)
        (output,) = self._pipeline.run()
        stored = [self._to_torch(output[place]) for place in range(len(entries))]
        return [upright(clip, job.video, plan.flip) for clip, (job, plan) in zip(stored, entries, strict=True)]

    def _to_torch(self, sample: Any) -> torch.Tensor:
        """A copy: DALI reuses its output memory in the next run."""
        if self.device.type == "cpu":
            return torch.from_numpy(np.array(sample))
        clip = torch.from_dlpack(sample).clone()
        torch.cuda.current_stream(self.device).synchronize()
        return clip

    def _build(self) -> Any:
        # Imported here: a large package that installations without it must not need. It has no usable type hints.
        dali: Any = import_module("nvidia.dali")
        fn, types = dali.fn, dali.types
        gpu = self.device.type == "cuda"
        pipeline = dali.Pipeline(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=(self.device.index or 0) if gpu else None,
            prefetch_queue_depth=1,
            exec_pipelined=False,
            exec_async=False,
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            roi_start = fn.external_source(name="roi_start", dtype=types.FLOAT, ndim=1)
            roi_end = fn.external_source(name="roi_end", dtype=types.FLOAT, ndim=1)
            video = fn.decoders.video(encoded, frames=frames, device="mixed" if gpu else "cpu")
            video = fn.resize(
                video,
                size=[self._size, self._size],
                roi_start=roi_start,
                roi_end=roi_end,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            pipeline.set_outputs(video)
        pipeline.build()
        return pipeline


def _reason(error: RuntimeError) -> str:
    """The telling line of DALI's long message: the one after "encountered:"."""
    text = str(error)
    lines = [line.strip() for line in (text.partition("encountered:")[2] or text).splitlines() if line.strip()]
    return lines[0] if lines else "unknown error"
