"""Which frames and which crop: each clip plan is a pure function of (seed, epoch, sample, attempt) and of the video.

A plan names frames by their presentation ordinal (0 = the first frame shown) and the crop in whole pixels of the
picture as shown, so every decoder that follows it returns the same window of the same frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vmjepa.data.order import CLIP_STREAM, random_bits

_CROP_TRIES = 10


@dataclass(frozen=True)
class ClipSpec:
    """How clips are cut from a video.

    num_frames frames, `stride` source frames apart, from each of num_clips places of the video; crops of an area share
    in `scale` and an aspect ratio (width / height) in `ratio`, resized to crop_size × crop_size pixels; `flip`: mirror
    half of them.
    """

    num_frames: int
    stride: int
    crop_size: int
    num_clips: int = 1
    scale: tuple[float, float] = (0.3, 1.0)
    ratio: tuple[float, float] = (0.75, 1.35)
    flip: bool = True

    @property
    def span(self) -> int:
        """Source frames that a clip covers."""
        return self.num_frames * self.stride


@dataclass(frozen=True)
class VideoInfo:
    """What a plan must know of a video: frame count, stored picture size, and the rotation to show it upright.

    `rotation` is in degrees counterclockwise, a multiple of 90, as FFmpeg reports the display matrix.
    """

    frames: int
    width: int
    height: int
    rotation: int = 0

    @property
    def quarter_turns(self) -> int:
        """Counterclockwise quarter turns from the stored to the shown picture, 0–3."""
        return round(self.rotation / 90) % 4

    @property
    def shown_size(self) -> tuple[int, int]:
        """(width, height) of the picture as shown."""
        return (self.height, self.width) if self.quarter_turns % 2 else (self.width, self.height)


class Crop(NamedTuple):
    """A rectangle in whole pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class ClipPlan:
    """One clip: frame_index (T,) int64 presentation ordinals, crop in the shown picture, horizontal mirror."""

    frame_index: np.ndarray
    crop: Crop
    flip: bool


def train_clips(
    spec: ClipSpec, video: VideoInfo, seed: int, epoch: int, sample: int, attempt: int = 0
) -> list[ClipPlan]:
    """Random clips of one video, one plan for each of spec.num_clips.

    With several clips the video is cut into as many equal parts and each clip lies inside its own part, as in V-JEPA;
    where parts are shorter than a clip, the clips may overlap. A video shorter than a clip keeps the stride and repeats
    its last frame.
    """
    part = video.frames // spec.num_clips
    plans = []
    words = 2 + 4 * _CROP_TRIES
    bits = random_bits(seed, CLIP_STREAM, (epoch, sample, attempt), spec.num_clips * words)
    for clip, uniform in enumerate((bits >> np.uint64(11)).reshape(spec.num_clips, words) * 2.0**-53):
        first, length = (clip * part, part) if part >= spec.span else (0, video.frames)
        start = first + int(uniform[0] * max(1, length - spec.span + 1))
        crop = _random_resized_crop(spec, *video.shown_size, uniform[2:])
        plans.append(ClipPlan(_frame_index(start, spec, video), crop, bool(spec.flip and uniform[1] < 0.5)))
    return plans


def eval_clips(spec: ClipSpec, video: VideoInfo, segments: int, views: int) -> list[ClipPlan]:
    """Fixed clips of one video: plan[segment * views + view].

    The segments' starts are spread evenly from the first to the last possible one (a single one is centred). Each view
    is a square as wide as the short side, placed evenly along the long side (a single one is centred).
    """
    width, height = video.shown_size
    side = min(width, height)
    plans = []
    for start in _spread(max(0, video.frames - spec.span), segments):
        for offset in _spread(max(width, height) - side, views):
            top, left = (offset, 0) if height > width else (0, offset)
            plans.append(ClipPlan(_frame_index(start, spec, video), Crop(top, left, side, side), False))
    return plans


def stored_crop(crop: Crop, video: VideoInfo) -> Crop:
    """The same rectangle in the stored picture, before rotation: what a decoder that ignores rotation must cut."""
    top, left, height, width = crop
    if video.quarter_turns == 1:
        return Crop(left, video.width - top - height, width, height)
    if video.quarter_turns == 2:
        return Crop(video.height - top - height, video.width - left - width, height, width)
    if video.quarter_turns == 3:
        return Crop(video.height - left - width, top, width, height)
    return crop


def _frame_index(start: int, spec: ClipSpec, video: VideoInfo) -> np.ndarray:
    return np.minimum(start + spec.stride * np.arange(spec.num_frames, dtype=np.int64), video.frames - 1)


def _spread(last: int, count: int) -> list[int]:
    return [last // 2] if count == 1 else [last * place // (count - 1) for place in range(count)]


def _random_resized_crop(spec: ClipSpec, width: int, height: int, uniform: np.ndarray) -> Crop:
    """Area share uniform in scale, ratio log-uniform, as in Inception-style crops; after 10 misses the largest centre
    crop whose ratio is allowed."""
    low, high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    for area_u, ratio_u, top_u, left_u in uniform.reshape(_CROP_TRIES, 4).tolist():
        area = width * height * (spec.scale[0] + area_u * (spec.scale[1] - spec.scale[0]))
        ratio = math.exp(low + ratio_u * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(top_u * (height - h + 1)), int(left_u * (width - w + 1)), h, w)
    w = min(width, max(1, round(height * spec.ratio[1])))
    h = min(height, max(1, round(width / spec.ratio[0])))
    return Crop((height - h) // 2, (width - w) // 2, h, w)
