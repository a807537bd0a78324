"""Decodes planned clips on the CPU with PyAV (FFmpeg): every codec FFmpeg knows, one pass per video.

Frames are counted in the order shown, as the shard tool counted them. A late clip is reached by a seek only where the
packets' time stamps prove which frame is which; otherwise the video is decoded from its start.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from vmjepa.data.clips import ClipPlan, VideoInfo, stored_crop
from vmjepa.data.decode import DecodeError, DecodeJob, TooFewFrames, upright
from vmjepa.data.probe_video import best_video_stream

_READ_BUFFER = 1 << 20  # FFmpeg's 32 KiB default costs 15 % more CPU time on clips of 100 kB
_SEEK_SAVES = 24  # frames a seek must save; reading all packets first costs about as much as decoding these


def video_info(data: bytes) -> VideoInfo:
    """The facts of a loose file: its frames counted by packets (which edit lists and damage can belie), one decoded.

    Raises:
        DecodeError: no video stream, no packet, or not a video.
    """
    with _ffmpeg_errors(), _open(data) as container:
        stream = _video_stream(container)
        frames = len(_packets(container, stream)[0])
    with _ffmpeg_errors(), _open(data) as container:
        for frame in container.decode(_video_stream(container)):
            return VideoInfo(frames, frame.width, frame.height, frame.rotation)
    raise DecodeError("no frame decodes")


def decode(data: bytes, video: VideoInfo, plans: Sequence[ClipPlan], size: int) -> list[torch.Tensor]:
    """Decodes the planned clips of one video in one pass.

    Args:
        data: the encoded file.
        video: its frame count and stored size, from the manifest or from `probe`.
        plans: the clips, in the shown picture's pixels.
        size: side of the square output in pixels.

    Returns:
        One contiguous uint8 (T, size, size, 3) RGB tensor per plan.

    Raises:
        TooFewFrames: the video is shorter than `video` says.
        DecodeError: FFmpeg refuses the video.
    """
    wanted = np.unique(np.concatenate([plan.frame_index for plan in plans])).tolist()
    with _ffmpeg_errors():
        pictures = _seek_and_read(data, video, wanted)
        if pictures is None:
            pictures = _read_from_start(data, video, wanted)
    return [_cut(pictures, plan, video, size) for plan in plans]


class PyavDecoder:
    """The PyAV decode backend: clips of `size` × `size` pixels. Safe to share between threads."""

    device = torch.device("cpu")
    whole_batches = False

    def __init__(self, size: int) -> None:
        self._size = size

    def decode(self, jobs: Sequence[DecodeJob]) -> list[list[torch.Tensor] | DecodeError]:
        """Per job its clips, uint8 (T, size, size, 3), or why that video failed."""
        results: list[list[torch.Tensor] | DecodeError] = []
        for job in jobs:
            try:
                results.append(decode(job.data, job.video, job.plans, self._size))
            except DecodeError as error:
                results.append(error)
        return results


@contextmanager
def _ffmpeg_errors() -> Iterator[None]:
    """Turns what FFmpeg raises into DecodeError."""
    try:
        yield
    except (av.FFmpegError, ValueError) as error:
        raise DecodeError(f"FFmpeg: {getattr(error, 'strerror', None) or error}") from error


def _open(data: bytes) -> InputContainer:
    # Playlists would send FFmpeg to other files or hosts; a clip has to be complete in itself.
    options = {"protocol_whitelist": "none"}
    return av.open(io.BytesIO(data), mode="r", buffer_size=_READ_BUFFER, container_options=options)


def _video_stream(container: InputContainer) -> VideoStream:
    stream = best_video_stream(container)
    if stream is None or stream.codec_context is None:
        raise DecodeError("no video stream that FFmpeg can decode")
    stream.thread_type = "NONE"  # the loader runs one video per thread; threads inside FFmpeg only add overhead
    stream.codec_context.thread_count = 1
    return stream


def _packets(container: InputContainer, stream: VideoStream) -> tuple[list[tuple[int | None, bool]], bool]:
    """(time stamp, key frame) of each packet that shows a frame, and whether an edit list hides others."""
    shown: list[tuple[int | None, bool]] = []
    hidden = False
    for packet in container.demux(stream):
        if packet.is_discard:
            hidden = True
        elif packet.size:
            shown.append((packet.pts, packet.is_keyframe))
    return shown, hidden


def _read_from_start(data: bytes, video: VideoInfo, wanted: list[int]) -> dict[int, np.ndarray]:
    with _open(data) as container:
        pictures, decoded = _read(enumerate(container.decode(_video_stream(container))), video, wanted)
    if len(pictures) < len(wanted):
        raise TooFewFrames(decoded, wanted[-1])
    return pictures


def _seek_and_read(data: bytes, video: VideoInfo, wanted: list[int]) -> dict[int, np.ndarray] | None:
    """Reads after a seek to the key frame before the first wanted frame; None where that saves little or is not exact.

    The sorted time stamps of the packets give each frame's ordinal, if there are as many as there are frames.
    """
    if wanted[0] < _SEEK_SAVES:
        return None
    with _open(data) as container:
        stream = _video_stream(container)
        packets, hidden = _packets(container, stream)
        times = sorted({time for time, _ in packets if time is not None})
        if hidden or not len(times) == len(packets) == video.frames:
            return None
        ordinal = {time: place for place, time in enumerate(times)}
        keys = [ordinal[time] for time, key in packets if key and time is not None]
        start = max((place for place in keys if place <= wanted[0]), default=0)
        if start < _SEEK_SAVES:
            return None
        container.seek(times[start], stream=stream, backward=True)
        numbered = ((ordinal.get(_time(frame), -1), frame) for frame in container.decode(stream))
        pictures, _ = _read(numbered, video, wanted)
    return pictures if len(pictures) == len(wanted) else None


def _time(frame: av.VideoFrame) -> int:
    return -1 << 62 if frame.pts is None else frame.pts


def _read(
    numbered: Iterable[tuple[int, av.VideoFrame]], video: VideoInfo, wanted: list[int]
) -> tuple[dict[int, np.ndarray], int]:
    """RGB pictures (height, width, 3) of the wanted frames by ordinal, and how many frames came by."""
    missing = set(wanted)
    pictures: dict[int, np.ndarray] = {}
    converter = VideoReformatter()
    count = 0
    for number, frame in numbered:
        count += 1
        if number in missing:
            missing.remove(number)
            # The size is given because a stream may change its picture size half way.
            rgb = converter.reformat(frame, width=video.width, height=video.height, format="rgb24", threads=1)
            pictures[number] = rgb.to_ndarray()
        if number >= wanted[-1]:
            break
    return pictures, count


def _cut(pictures: dict[int, np.ndarray], plan: ClipPlan, video: VideoInfo, size: int) -> torch.Tensor:
    """Crop, resize, turn upright, mirror. Cropping and resizing commute with quarter turns, so they come first."""
    top, left, height, width = stored_crop(plan.crop, video)
    numbers, place = np.unique(plan.frame_index, return_inverse=True)
    crops = np.stack([pictures[number][top : top + height, left : left + width] for number in numbers.tolist()])
    clip = resize(torch.from_numpy(crops), size)
    return upright(clip[torch.from_numpy(place)], video, plan.flip)


def resize(clip: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear with antialiasing: uint8 (T, h, w, 3) to uint8 (T, size, size, 3)."""
    if clip.shape[1] == clip.shape[2] == size:
        return clip
    # (T, h, w, 3) seen as (T, 3, h, w) is torch's channels_last, for which it has a fast uint8 kernel.
    planar = torch.nn.functional.interpolate(clip.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True)
    return planar.permute(0, 2, 3, 1)
