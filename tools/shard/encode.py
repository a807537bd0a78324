"""Encoding a clip anew, on request: another codec, a smaller picture, key frames at a fixed distance; no sound.

One thread per clip and no library versions in the file, so that the same clip and options give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, cast

import av
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vmjepa.data.probe_video import DECODER_ERROR, BadClipError, ClipInfo, best_video_stream


@dataclass(frozen=True)
class Codec:
    """An encoder: FFmpeg's name, the container it goes into, and options for a good picture at moderate size."""

    encoder: str
    container: str
    extension: str
    options: dict[str, str]
    pix_fmt: str = "yuv420p"


# On pictures a few blocks wide, the tree rate control of x264 gives now these bytes, now those, and that of x265 writes
# outside its memory (seen with the versions in PyAV 18.1), so both do without.
_X264 = {"crf": "20", "sc_threshold": "0", "x264-params": "mbtree=0"}
_X265 = {"crf": "22", "x265-params": "pools=none:frame-threads=1:cutree=0:scenecut=0:open-gop=0:log-level=none"}

CODECS = {
    "h264": Codec("libx264", "mp4", "mp4", _X264),
    "hevc": Codec("libx265", "mp4", "mp4", _X265),
    "vp8": Codec("libvpx", "webm", "webm", {"crf": "10", "b": "4M", "deadline": "good", "cpu-used": "2"}),
    "vp9": Codec("libvpx-vp9", "webm", "webm", {"crf": "28", "b": "0", "deadline": "good", "cpu-used": "2"}),
    "av1": Codec("libsvtav1", "mp4", "mp4", {"crf": "30", "preset": "8", "svtav1-params": "lp=1"}),
    "mjpeg": Codec("mjpeg", "matroska", "mkv", {"qmin": "3", "qmax": "3"}, pix_fmt="yuvj420p"),
}


@dataclass(frozen=True)
class EncodeOptions:
    """codec: a name of CODECS; short_side: pixels, never enlarged, None = keep; gop: frames, None = the encoder's."""

    codec: str
    short_side: int | None = None
    gop: int | None = None


def encode(video: BinaryIO, clip: ClipInfo, target: Path, options: EncodeOptions) -> None:
    """Writes all frames of `video` (known as `clip`) to `target`, upright and with even sides, at their times.

    Raises BadClipError when it cannot be decoded, OSError when `target` cannot be written.
    """
    codec = CODECS[options.codec]
    rate = Fraction(clip.fps or 25.0).limit_denominator(1001)
    with (
        open(target, "wb") as file,
        av.open(video, "r") as source,
        av.open(file, "w", format=codec.container, container_options={"fflags": "+bitexact"}) as result,
    ):
        stream = best_video_stream(source)
        if stream is None:
            raise BadClipError(DECODER_ERROR, "the video stream is gone")
        stream.codec_context.thread_count = 1
        out = cast(VideoStream, result.add_stream(codec.encoder, rate=rate, options=codec.options))
        context = out.codec_context
        context.pix_fmt = codec.pix_fmt
        context.thread_count = 1
        context.flags |= av.codec.context.Flags.bitexact
        if options.gop is not None:
            context.gop_size = options.gop
        time_base = stream.time_base or 1 / rate
        for frame in _timed(_filtered(stream, source.decode(stream), clip, codec, options), rate, time_base):
            if not context.is_open:
                context.width, context.height, context.time_base = frame.width, frame.height, time_base
            result.mux(out.encode(frame))
        result.mux(out.encode(None))


def _filtered(
    stream: VideoStream, frames: Iterator[VideoFrame], clip: ClipInfo, codec: Codec, options: EncodeOptions
) -> Iterator[VideoFrame]:
    """Turned upright, scaled, in the encoder's pixel format."""
    turns = round(clip.rotation / 90) % 4  # counter-clockwise
    width, height = (clip.height, clip.width) if turns % 2 else (clip.width, clip.height)
    scale = min(1.0, (options.short_side or min(width, height)) / min(width, height))
    width, height = (max(2, 2 * round(side * scale / 2)) for side in (width, height))
    steps = [("transpose", "cclock")] * (turns % 2) + [("hflip", ""), ("vflip", "")] * (turns // 2)
    steps += [("scale", f"{width}:{height}:flags=area"), ("format", codec.pix_fmt)]
    graph = Graph()
    graph.threads = 1
    chain = [graph.add_buffer(template=stream)]
    chain += [graph.add(name, arguments) for name, arguments in steps]
    chain.append(graph.add("buffersink"))
    for left, right in pairwise(chain):
        left.link_to(right)
    graph.configure()
    for frame in frames:
        graph.push(frame)
        turned = cast(VideoFrame, graph.pull())
        turned.pict_type = 0  # the encoder decides, not the source's key frames
        yield turned


def _timed(frames: Iterator[VideoFrame], rate: Fraction, time_base: Fraction) -> Iterator[VideoFrame]:
    """The source's time stamps counted from 0; a missing or repeated one becomes a tick after the frame before."""
    start: int | None = None
    last = -1
    tick = max(1, round(1 / (rate * time_base)))
    for frame in frames:
        if frame.pts is not None and start is None:
            start = frame.pts - (last + 1)
        pts = last + tick if frame.pts is None or start is None else frame.pts - start
        last = frame.pts = pts if pts > last else last + 1
        frame.time_base = time_base
        yield frame
