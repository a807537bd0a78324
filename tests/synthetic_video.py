"""Small videos whose pixels tell which frame and which place they are: for tests of decoders and loaders."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np

from vmjepa.data.clips import ClipPlan, VideoInfo

FRAMES, WIDTH, HEIGHT = 48, 48, 36
LEVEL = 5  # blue rises by this much per frame
_FAST = {"deadline": "realtime", "cpu-used": "8"}
FORMATS = {  # name: (container, encoder, pixel format, options)
    "h264-bframes": ("mp4", "libx264", "yuv420p", {"crf": "6", "g": "12", "bf": "3"}),
    "h264-one-gop": ("mp4", "libx264", "yuv420p", {"crf": "6", "g": "250"}),
    "h264-no-timestamps": ("h264", "libx264", "yuv420p", {"crf": "6", "g": "12", "bf": "2"}),
    "mpeg4": ("avi", "mpeg4", "yuv420p", {"g": "10", "qmin": "1", "qmax": "2"}),
    "vp8": ("webm", "libvpx", "yuv420p", {"crf": "4", "b": "4M", "g": "10", **_FAST}),
    "vp9": ("webm", "libvpx-vp9", "yuv420p", {"crf": "6", "b": "0", "g": "10", **_FAST}),
    "mjpeg": ("avi", "mjpeg", "yuvj420p", {"qmin": "1", "qmax": "2"}),
}


def picture(number: int, x: np.ndarray, y: np.ndarray, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Frame `number` at columns x and rows y (pixel centres): red rises with x, green with y, blue with the number."""
    red, green = np.meshgrid(x * 255 / (width - 1), y * 255 / (height - 1))
    return np.stack([red, green, np.full_like(red, number * LEVEL)], -1)


def encode(pictures: np.ndarray | list[np.ndarray], name: str = "mjpeg", times: list[int] | None = None) -> bytes:
    """Encodes uint8 (F, H, W, 3) pictures; `times` are their time stamps in 1/30 s (None: 0, 1, 2, …)."""
    container_format, codec, pix_fmt, options = FORMATS[name]
    file = io.BytesIO()
    with av.open(file, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, 30)
        stream.codec_context.thread_count = 1
        for number, rgb in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            frame.pts, frame.time_base = (times[number] if times else number), Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def counter_video(name: str, frames: int = FRAMES, times: list[int] | None = None) -> tuple[bytes, VideoInfo]:
    """A video of `picture`s in one of FORMATS, and its facts."""
    pictures = [picture(n, np.arange(WIDTH), np.arange(HEIGHT)).round().astype(np.uint8) for n in range(frames)]
    return encode(pictures, name, times), VideoInfo(frames, WIDTH, HEIGHT)


def flat_video(value: int, frames: int = 12, name: str = "mjpeg", size: tuple[int, int] = (24, 32)) -> bytes:
    """A video of one grey value, (height, width) pixels."""
    return encode(np.full((frames, *size, 3), value, np.uint8), name)


def expected_clip(plan: ClipPlan, video: VideoInfo, size: int) -> np.ndarray:
    """What decoding `plan` from a counter_video must give, up to the codec's loss: float (T, size, size, 3)."""
    top, left, height, width = plan.crop
    at = (np.arange(size) + 0.5) / size
    shown_width, shown_height = video.shown_size
    x, y = left + at * width - 0.5, top + at * height - 0.5
    clips = []
    for number in plan.frame_index:
        if video.quarter_turns == 0:
            clip = picture(number, x, y)
        elif video.quarter_turns == 1:  # shown = stored turned counterclockwise: its rows run along the stored -x
            clip = picture(number, shown_height - 1 - y, x).transpose(1, 0, 2)
        elif video.quarter_turns == 2:
            clip = picture(number, shown_width - 1 - x, shown_height - 1 - y)
        else:
            clip = picture(number, y, shown_width - 1 - x).transpose(1, 0, 2)
        clips.append(clip[:, ::-1] if plan.flip else clip)
    return np.stack(clips)
