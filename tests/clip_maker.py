"""Small videos for tests, made on the spot."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np

_CONTAINERS = {"libvpx": "webm", "libvpx-vp9": "webm", "mjpeg": "matroska", "libx264": "mp4"}


def make_clip(
    frames: int = 8,
    size: tuple[int, int] = (48, 32),
    codec: str = "libvpx",
    seed: int = 0,
    fps: int = 10,
    flat: bool = False,
) -> bytes:
    """A video of blocks of colour that drift from frame to frame (one colour when `flat`); `size` is (width, height)
    in pixels."""
    width, height = size
    colours = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    if flat:
        colours[:] = 128
    picture = colours.repeat(8, axis=0).repeat(8, axis=1)
    file = io.BytesIO()
    with av.open(file, "w", format=_CONTAINERS[codec], container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.thread_count = 1
        for t in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * t, axis=1))
            frame.pts, frame.time_base = t, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()
