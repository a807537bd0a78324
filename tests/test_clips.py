"""Clip plans: inside the video, pure functions of their arguments, distributed as asked; turned crops fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmjepa.data.clips import ClipSpec, Crop, VideoInfo, eval_clips, stored_crop, train_clips

videos = st.builds(
    VideoInfo,
    frames=st.integers(1, 400),
    width=st.integers(1, 500),
    height=st.integers(1, 500),
    rotation=st.sampled_from([0, 90, -90, 180, -180, 270]),
)
specs = st.builds(
    ClipSpec,
    num_frames=st.integers(1, 32),
    stride=st.integers(1, 8),
    crop_size=st.just(64),
    num_clips=st.integers(1, 4),
    scale=st.sampled_from([(0.3, 1.0), (0.08, 1.0), (1.0, 1.0), (0.01, 0.02)]),
    ratio=st.sampled_from([(0.75, 1.35), (1.0, 1.0), (3.0, 4.0)]),
)
ids = st.integers(0, 2**40)


def check(plan, spec, video):
    width, height = video.shown_size
    top, left, h, w = plan.crop
    assert all(isinstance(value, int) for value in plan.crop)
    assert min(top, left) >= 0
    assert min(h, w) >= 1
    assert top + h <= height
    assert left + w <= width
    assert plan.frame_index.shape == (spec.num_frames,)
    assert plan.frame_index.dtype == np.int64
    assert 0 <= plan.frame_index[0] <= plan.frame_index[-1] < video.frames
    steps = np.diff(plan.frame_index)
    inside = plan.frame_index[1:] < video.frames - 1
    assert (steps[inside] == spec.stride).all(), "only the repeated last frame may break the stride"
    if video.frames >= spec.span:
        assert (steps == spec.stride).all()


@given(specs, videos, ids, ids, ids, st.integers(0, 20))
@settings(max_examples=200, deadline=None)
def test_train_clips_stay_inside_and_repeat_exactly(spec, video, seed, epoch, sample, attempt):
    plans = train_clips(spec, video, seed, epoch, sample, attempt)
    again = train_clips(spec, video, seed, epoch, sample, attempt)
    assert len(plans) == spec.num_clips
    for plan, same in zip(plans, again, strict=True):
        check(plan, spec, video)
        assert (plan.crop, plan.flip) == (same.crop, same.flip)
        np.testing.assert_array_equal(plan.frame_index, same.frame_index)


@given(specs, videos, st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_eval_clips_stay_inside(spec, video, segments, views):
    plans = eval_clips(spec, video, segments, views)
    assert len(plans) == segments * views
    for plan in plans:
        check(plan, spec, video)
        assert plan.crop.height == plan.crop.width == min(video.shown_size)
        assert not plan.flip


VIDEO = VideoInfo(frames=100, width=320, height=240)
SPEC = ClipSpec(num_frames=8, stride=4, crop_size=64)


@pytest.mark.parametrize("changed", ["seed", "epoch", "sample", "attempt"])
def test_each_argument_changes_the_plan(changed):
    base = {"seed": 5, "epoch": 6, "sample": 7, "attempt": 0}
    one, other = (train_clips(SPEC, VIDEO, **{**base, changed: base[changed] + d})[0] for d in (0, 1))
    assert one.crop != other.crop


def test_starts_crops_and_flips_are_spread_as_asked():
    plans = [train_clips(SPEC, VIDEO, 0, 0, sample)[0] for sample in range(4000)]
    starts = np.array([plan.frame_index[0] for plan in plans])
    assert (starts.min(), starts.max()) == (0, 68), "every start from 0 to frames - span"
    assert abs(np.bincount(starts, minlength=69) - 4000 / 69).max() < 35
    area = np.array([plan.crop.height * plan.crop.width for plan in plans]) / (320 * 240)
    assert 0.29 < area.min() < area.max() <= 1.0
    assert 0.25 < np.quantile(area, 0.1) < np.quantile(area, 0.5) < 0.7
    ratio = np.array([plan.crop.width / plan.crop.height for plan in plans])
    assert 0.73 < ratio.min() < ratio.max() < 1.38
    assert abs(np.median(np.log(ratio))) < 0.1
    assert abs(np.mean([plan.flip for plan in plans]) - 0.5) < 0.03
    no_flip = ClipSpec(8, 4, 64, flip=False)
    assert not any(train_clips(no_flip, VIDEO, 0, 0, sample)[0].flip for sample in range(50))


def test_short_video_keeps_the_stride_and_repeats_its_last_frame():
    (plan,) = train_clips(SPEC, VideoInfo(10, 320, 240), 0, 0, 0)
    assert plan.frame_index.tolist() == [0, 4, 8, 9, 9, 9, 9, 9]


def test_several_clips_lie_in_their_own_parts():
    spec = ClipSpec(num_frames=4, stride=2, crop_size=64, num_clips=3)
    for sample in range(200):
        plans = train_clips(spec, VideoInfo(90, 320, 240), 0, 0, sample)
        assert [int(plan.frame_index[0]) // 30 for plan in plans] == [0, 1, 2]
        assert [int(plan.frame_index[-1]) // 30 for plan in plans] == [0, 1, 2]
        assert len({plan.crop for plan in plans}) > 1, "each clip has its own crop, as in V-JEPA"


def test_impossible_ratio_falls_back_to_the_largest_allowed_centre_crop():
    spec = ClipSpec(4, 1, 64, ratio=(1.0, 1.0), scale=(1.0, 1.0))
    (plan,) = train_clips(spec, VideoInfo(10, 300, 100), 0, 0, 0)
    assert plan.crop == Crop(0, 100, 100, 100)


@pytest.mark.parametrize(
    ("width", "height", "crops"),
    [
        (320, 240, [(0, 0), (0, 40), (0, 80)]),
        (240, 320, [(0, 0), (40, 0), (80, 0)]),
        (200, 200, [(0, 0)] * 3),
    ],
    ids=["wide", "tall", "square"],
)
def test_eval_views_cover_the_long_side(width, height, crops):
    plans = eval_clips(SPEC, VideoInfo(100, width, height), segments=2, views=3)
    assert [(p.crop.top, p.crop.left) for p in plans] == crops * 2
    assert [int(p.frame_index[0]) for p in plans] == [0, 0, 0, 68, 68, 68]


def test_single_segment_and_view_are_centred():
    (plan,) = eval_clips(SPEC, VIDEO, segments=1, views=1)
    assert plan.frame_index[0] == 34
    assert plan.crop == Crop(0, 40, 240, 240)


@pytest.mark.parametrize("rotation", [0, 90, 180, -180, -90, 270])
def test_stored_crop_cuts_the_same_pixels(rotation):
    """Cropping the shown picture equals cropping the stored one where stored_crop says and turning the piece."""
    stored = np.arange(30 * 50).reshape(30, 50)
    video = VideoInfo(1, width=50, height=30, rotation=rotation)
    shown = np.rot90(stored, video.quarter_turns)
    assert shown.shape == video.shown_size[::-1]
    crop = Crop(top=3, left=7, height=11, width=20)
    top, left, height, width = stored_crop(crop, video)
    piece = np.rot90(stored[top : top + height, left : left + width], video.quarter_turns)
    np.testing.assert_array_equal(piece, shown[3:14, 7:27])
