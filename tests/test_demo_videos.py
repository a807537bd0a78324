"""The demo's labelled videos: what may tell the classes apart, and what may not."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tools import demo_videos
from tools.demo_videos import CLASSES, Camera, Clip
from vmjepa.errors import UserError

FRAMES = 24


def camera(motion: str, ordinal: int, frames: int = FRAMES) -> Camera:
    return Camera.moving(motion, frames, 400, 300, np.random.Generator(np.random.Philox(key=[0, ordinal])))


def test_every_picture_is_in_every_class_equally_often() -> None:
    clips = demo_videos.plan(train_clips=3, test_clips=2)
    counts = Counter((clip.path.split("/")[0], clip.picture, clip.motion) for clip in clips)
    expected = {("train", p, m): 3 for p in demo_videos.TRAIN_PICTURES for m in CLASSES}
    expected |= {("test", p, m): 2 for p in demo_videos.TEST_PICTURES for m in CLASSES}
    assert counts == expected
    assert all(clip.path.split("/")[1] == clip.motion for clip in clips)


def test_training_and_test_pictures_are_disjoint_and_installed() -> None:
    assert not set(demo_videos.TRAIN_PICTURES) & set(demo_videos.TEST_PICTURES)
    for name in demo_videos.TRAIN_PICTURES + demo_videos.TEST_PICTURES:
        level = demo_videos.load_picture(name)[0]
        assert level.shape[0] == 3
        assert level.std() > 5, f"{name} shows nothing"


@pytest.mark.parametrize("motion", CLASSES)
def test_camera_moves_as_the_class_says(motion: str) -> None:
    """Sign of the way along the frame's horizontal axis, of the turn, and of the change of scale."""
    path = camera(motion, 1)
    along = (path.x[-1] - path.x[0]) * math.cos(path.angle[0]) + (path.y[-1] - path.y[0]) * math.sin(path.angle[0])
    found = (np.sign(round(along, 6)), np.sign(path.angle[-1] - path.angle[0]), np.sign(path.view[-1] - path.view[0]))
    expected = {
        "pan_left": (-1, 0, 0),
        "pan_right": (1, 0, 0),
        "rotate_clockwise": (0, 1, 0),
        "rotate_counterclockwise": (0, -1, 0),
        "zoom_in": (0, 0, -1),
        "zoom_out": (0, 0, 1),
    }
    assert found == expected[motion]


def test_classes_meet_in_the_middle_of_the_clip() -> None:
    """With an odd number of frames the middle frame of all six classes is one picture, given one generator state."""
    middle = [(p.x[12], p.y[12], p.angle[12], p.view[12]) for p in (camera(motion, 7, frames=25) for motion in CLASSES)]
    np.testing.assert_allclose(middle, [middle[0]] * len(CLASSES), rtol=0, atol=1e-12)


@pytest.mark.parametrize("motion", CLASSES)
@pytest.mark.parametrize("frame", [0, FRAMES - 1], ids=["first_frame", "last_frame"])
def test_position_and_angle_are_uniform_in_every_class(motion: str, frame: int) -> None:
    """Kolmogorov-Smirnov distance from the uniform law, 2000 cameras (0.1 % level: 1.95/sqrt(n))."""
    paths = [camera(motion, i) for i in range(2000)]
    for values, period in (
        ([p.x[frame] for p in paths], 800),
        ([p.y[frame] for p in paths], 600),
        ([p.angle[frame] for p in paths], 2 * math.pi),
    ):
        share = np.sort(np.mod(values, period) / period)
        assert np.abs(share - (np.arange(2000) + 0.5) / 2000).max() < 1.95 / math.sqrt(2000)


def test_render_looks_where_the_camera_looks() -> None:
    """A picture whose red is its column and green its row: the frame's centre and corners show the expected places."""
    row, column = torch.meshgrid(torch.arange(200.0), torch.arange(200.0), indexing="ij")
    levels = [torch.stack([column, row, 0 * row])]
    one = np.ones(3)
    # Looking at column 80, row 60, a view of 40 pixels; turned by 0, a quarter clockwise, and at the mirrored place.
    seen = demo_videos.render(
        levels, Camera(x=80 * one + [0, 0, 240], y=60 * one, angle=np.array([0, math.pi / 2, 0]), view=40 * one), 20
    ).astype(int)
    assert np.abs(seen[0, 0, 0, :2] - [60, 40]).max() <= 1.5  # top left
    assert np.abs(seen[0, -1, -1, :2] - [99, 79]).max() <= 1.5
    assert np.abs(seen[1, 0, 0, :2] - [99, 40]).max() <= 1.5  # the frame's top left lies at the picture's top right
    assert np.abs(seen[2, 0, 0, :2] - [99, 40]).max() <= 1.5  # column 320 is column 80 mirrored at 200
    assert np.abs(seen[2, 0, -1, :2] - [60, 40]).max() <= 1.5


def small_set(part: str, frame: int, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """One frame of each clip as an 8 x 8 thumbnail, standardised, (n, 192), and the labels (n,)."""
    clips = [clip for clip in demo_videos.plan(repeats, repeats) if clip.path.startswith(part)]
    pictures = []
    for clip in clips:
        rng = np.random.Generator(np.random.Philox(key=[0, clip.ordinal]))
        levels = demo_videos.load_picture(clip.picture)
        path = Camera.moving(clip.motion, FRAMES, levels[0].shape[2], levels[0].shape[1], rng)
        only = Camera(path.x[[frame]], path.y[[frame]], path.angle[[frame]], path.view[[frame]])
        pictures.append(demo_videos.render(levels, only, 16)[0].reshape(8, 2, 8, 2, 3).mean((1, 3)).ravel())
    return np.array(pictures) / 64, np.array([CLASSES.index(clip.motion) for clip in clips])


@pytest.mark.parametrize("frame", [0, 12, 23], ids=["first_frame", "middle_frame", "last_frame"])
def test_a_single_frame_does_not_tell_the_class(frame: int) -> None:
    """A ridge classifier trained on one frame of each training clip stays at chance on the test pictures."""
    x, y = small_set("train", frame, repeats=9)
    x_test, y_test = small_set("test", frame, repeats=12)
    mean = x.mean(0)
    x, x_test = x - mean, x_test - mean
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ (np.eye(6)[y] - 1 / 6))
    accuracy = float((np.argmax(x_test @ weights, 1) == y_test).mean())
    assert accuracy < 1 / 6 + 3 * math.sqrt(5 / 36 / len(y_test)), accuracy


def test_clip_is_a_function_of_seed_and_ordinal() -> None:
    """Made twice: equal frames and equal bytes; another seed or ordinal: other frames."""
    clip = Clip("train/zoom_in/coffee_00.mp4", "zoom_in", "coffee.png", 5)
    once, again = (demo_videos.make_clip(clip, 0, 6, 32) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert demo_videos.encode(once, 12) == demo_videos.encode(again, 12)
    assert (demo_videos.make_clip(clip, 1, 6, 32) != once).any()


def test_file_holds_the_frames_that_were_rendered(tmp_path: Path) -> None:
    """The decoded mp4 against the rendered frames (h264 at crf 20, so close, not equal); every frame is a key frame."""
    frames = demo_videos.make_clip(Clip("", "pan_left", "chelsea.png", 0), 0, 8, 64)
    (tmp_path / "clip.mp4").write_bytes(demo_videos.encode(frames, 12))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        decoded = list(container.decode(video=0))
        assert container.streams.video[0].average_rate == 12
    assert all(frame.key_frame for frame in decoded)
    pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
    assert pixels.shape == frames.shape
    assert np.abs(pixels.astype(float) - frames).mean() < 6


def test_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        demo_videos.make(tmp_path, 1, 1, 4, 32, 12, 0)
    assert (tmp_path / "kept").read_text() == "mine"
