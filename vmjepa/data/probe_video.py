"""Proving that a video can be trained on: opens it, decodes every frame, and says what it is or what is wrong with it.

    clip = probe("walking/a.mp4")           # ClipInfo(frames=45, fps=30.0, width=456, …), or raises BadClipError

A clip passes when a decoder gives all of its frames, unharmed. It fails ("reason" of the quarantine list) when
- there is no file, it cannot be read, it is empty, it is larger than a tar member may be, or no demuxer knows it;
- it has no video stream, or only a picture attached to audio;
- the demuxer or the decoder reports an error or flags a packet or a frame as corrupt, or no frame comes out at all;
- it starts in the middle of a stream (its first packet is no key frame: what comes before the next one is lost);
- it ends clearly before the duration that its container claims (truncated);
- its frame size changes on the way (crops are planned in pixels of one size).
Messages that FFmpeg merely logs do not count, except a demuxer's word that the file ended too early: many sound
videos make decoders grumble. What no container claims cannot be missed: an Ogg or GIF file, or a transport stream cut
between two pictures, passes with the frames it has.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import av
import av.logging
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

MISSING = "missing file"
UNREADABLE = "cannot be read"
EMPTY = "empty file"
TOO_LARGE = "too large"
NOT_VIDEO = "not a video"
NO_STREAM = "no video stream"
COVER_ART = "cover art only"
NO_FRAMES = "no frames"
DECODER_ERROR = "decoder error"
MID_STREAM = "starts mid-stream"
TRUNCATED = "truncated"
SIZE_CHANGES = "frame size changes"

# Container (FFmpeg's name, or the first of its names) -> extensions kept as they are; the first replaces any other.
_EXTENSIONS = {
    "mov": ("mp4", "mov", "m4v", "3gp", "3g2"),
    "matroska": ("mkv", "webm"),
    "avi": ("avi",),
    "flv": ("flv",),
    "mpegts": ("ts", "mts", "m2ts"),
    "mpeg": ("mpg", "mpeg", "vob", "ps"),
    "asf": ("wmv", "asf"),
    "ogg": ("ogv", "ogg"),
}


class BadClipError(Exception):
    """A clip that cannot be trained on: a reason of the list above, and the detail behind it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class ClipInfo:
    """What decoding a whole clip told. Field names are the manifest's columns."""

    ext: str  # without dot
    frames: int
    fps: float  # frames per second, 0 when the timestamps do not tell
    width: int  # pixels of the decoded frames, before rotation
    height: int
    rotation: int  # degrees counter-clockwise to turn frames for display, in (-180, 180]
    codec: str
    pix_fmt: str


def best_video_stream(container: InputContainer) -> VideoStream | None:
    """The stream to decode: FFmpeg's choice (DALI's too), but no picture attached to audio; None when there is none."""
    moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    return best if best in moving else next(iter(moving), None)  # type: ignore[return-value]


def probe(source: str | os.PathLike[str] | bytes | BinaryIO) -> ClipInfo:
    """Decodes all of a video and returns what it is.

    source: a path, the encoded bytes, or a seekable binary file at its beginning. The file's name tells the decoder
    nothing (a shard member has none), it only keeps its extension where that fits the container.
    Raises BadClipError. Takes as long as decoding takes: callers who do not trust the file bound the time and the
    memory of the process (tools/shard does).
    """
    if isinstance(source, bytes):
        return _probe(io.BytesIO(source), "")
    if isinstance(source, str | os.PathLike):
        with open_clip(source) as file:
            return _probe(file, os.path.splitext(os.fspath(source))[1])
    return _probe(source, os.path.splitext(str(getattr(source, "name", "")))[1])


def open_clip(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular, non-empty file for reading. Raises BadClipError where it is none."""
    try:
        if not os.path.isfile(path):
            raise BadClipError(MISSING, "not a regular file" if os.path.exists(path) else "")
        file = open(path, "rb")  # noqa: SIM115 - handed to the caller
    except OSError as error:
        raise BadClipError(UNREADABLE, error.strerror or str(error)) from None
    if os.fstat(file.fileno()).st_size == 0:
        file.close()
        raise BadClipError(EMPTY)
    return file


def _probe(file: BinaryIO, suffix: str) -> ClipInfo:
    level, skip_repeated = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # two truncated files in a row give the same message
    try:
        with av.logging.Capture() as messages, _open(file) as container:
            clip = _decode_all(container, suffix)
    except av.FFmpegError as error:  # an OSError of the disk below is one of these, too
        raise BadClipError(DECODER_ERROR, _plain(error)) from None
    except MemoryError:
        raise BadClipError(DECODER_ERROR, "needs more memory than a worker may use") from None
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip_repeated)
    for _, _, message in messages:
        if "ended prematurely" in message or "partial file" in message:
            raise BadClipError(TRUNCATED, message.strip())
    return clip


def _plain(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _open(file: BinaryIO) -> InputContainer:
    try:
        # Playlists would send FFmpeg to other files or hosts; a clip has to be complete in itself.
        return av.open(file, "r", buffer_size=1 << 18, container_options={"protocol_whitelist": "none"})
    except (av.FFmpegError, ValueError) as error:
        raise BadClipError(NOT_VIDEO, _plain(error)) from None


def _decode_all(container: InputContainer, suffix: str) -> ClipInfo:
    name = container.format.name.split(",")[0]
    stream = best_video_stream(container)
    if stream is None:
        kinds = sorted({s.type for s in container.streams})
        if "video" in kinds:
            raise BadClipError(COVER_ART)
        raise BadClipError(NO_STREAM, f"only {', '.join(kinds)}" if kinds else "no streams at all")
    if name.endswith("_pipe") or name == "image2":
        raise BadClipError(NOT_VIDEO, f"still image ({name.removesuffix('_pipe')})")
    if stream.codec_context is None:
        raise BadClipError(DECODER_ERROR, "this FFmpeg has no decoder for the stream")
    stream.codec_context.thread_count = 1  # workers are the parallelism; and an error stays with its packet

    packets, first_is_key, ends = 0, True, _Ends(stream)
    frames, span = 0, (math.inf, -math.inf)
    size, rotation, pix_fmt = (0, 0), 0, ""
    for packet in container.demux():
        ends.see(packet)
        if packet.stream.index != stream.index:  # packet.stream_index is 0 in the packets that flush a decoder
            continue
        if packet.is_corrupt:
            raise BadClipError(TRUNCATED, f"packet {packets} is incomplete")
        if packet.size and not packet.is_discard:
            first_is_key = first_is_key and (packets > 0 or packet.is_keyframe)
            packets += 1
        for frame in _frames(packet, frames):
            if frames == 0:
                size, rotation, pix_fmt = (frame.width, frame.height), frame.rotation, frame.format.name
            elif (frame.width, frame.height) != size:
                now = f"{frame.width}x{frame.height}"
                raise BadClipError(SIZE_CHANGES, f"{size[0]}x{size[1]} until frame {frames}, then {now}")
            frames += 1
            if frame.pts is not None:
                span = min(span[0], frame.time), max(span[1], frame.time)
    if not frames:
        raise BadClipError(NO_FRAMES, f"{packets} packets of {stream.codec_context.codec.canonical_name}")
    if not first_is_key and frames < packets:
        raise BadClipError(MID_STREAM, f"{packets - frames} of {packets} packets give no frame")
    ends.check(container, name)
    return ClipInfo(
        ext=_extension(name, suffix),
        frames=frames,
        fps=_frame_rate(stream, frames, span[1] - span[0]),
        width=size[0],
        height=size[1],
        rotation=rotation,
        codec=stream.codec_context.codec.canonical_name,
        pix_fmt=pix_fmt,
    )


def _frames(packet: Packet, before: int) -> Iterator[VideoFrame]:
    """The frames that a packet completes. `before` frames came out already."""
    try:
        for frame in packet.decode():
            if frame.is_corrupt:
                raise BadClipError(DECODER_ERROR, f"frame {before} is damaged")
            before += 1
            yield frame
    except av.FFmpegError as error:
        if before == 0 and packet.size == 0:
            raise BadClipError(NO_FRAMES, _plain(error)) from None
        raise BadClipError(DECODER_ERROR, f"after {before} frames: {_plain(error)}") from None


def _frame_rate(stream: VideoStream, frames: int, seconds: float) -> float:
    """Frames per second: the container's average where the decoded timestamps agree, else what they say.

    Containers may claim anything (1000 per second in some Matroska files); millisecond timestamps round.
    """
    claimed = float(stream.average_rate or 0)
    if frames < 2 or not seconds > 0:
        return claimed
    measured = (frames - 1) / seconds
    return claimed if abs(claimed - measured) < 0.05 * measured else measured


def _extension(container: str, suffix: str) -> str:
    known = _EXTENSIONS.get(container, (container,))
    suffix = suffix.lower().removeprefix(".")
    return suffix if suffix in known else known[0]


class _Ends:
    """Compares the end of what is there with the duration that the container claims."""

    # Elsewhere FFmpeg's duration is itself derived from what is there, or from a bit rate.
    _CLAIMING = frozenset({"mov", "matroska", "avi", "flv", "asf"})

    def __init__(self, stream: VideoStream) -> None:
        self._stream = stream
        self._video = self._any = -math.inf  # latest end of a packet of the video, of any stream; seconds

    def see(self, packet: Packet) -> None:
        if packet.pts is None or not packet.size:
            return
        end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
        self._any = max(self._any, end)
        if packet.stream.index == self._stream.index:
            self._video = max(self._video, end)

    def check(self, container: InputContainer, name: str) -> None:
        if name not in self._CLAIMING or self._video == -math.inf:
            return
        stream = self._stream
        if name == "avi" and stream.average_rate:  # its demuxer already shortened the duration to what is there
            claimed, end = float(stream.frames / stream.average_rate), self._video
        elif stream.duration is not None:
            start = float((stream.start_time or 0) * (stream.time_base or 0))
            claimed, end = float(stream.duration * (stream.time_base or 0)), self._video - min(start, 0.0)
        elif container.duration is not None:  # sound and subtitles may well end after the video
            claimed, end = container.duration / av.time_base, self._any
        else:
            return
        if claimed - end > max(0.5, 0.05 * claimed):
            raise BadClipError(TRUNCATED, f"ends at {end:.2f} s of {claimed:.2f} s")
