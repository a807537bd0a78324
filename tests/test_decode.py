"""Decoders give the planned frames and crops: videos whose pixels name their frame and place, and real files."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

from tests.synthetic_video import FORMATS, FRAMES, HEIGHT, WIDTH, counter_video, expected_clip
from vmjepa.data import decode_pyav
from vmjepa.data.clips import ClipPlan, ClipSpec, Crop, VideoInfo, eval_clips, train_clips
from vmjepa.data.decode import DecodeError, DecodeJob, TooFewFrames, choose_decoder
from vmjepa.data.decode_dali import DaliDecoder
from vmjepa.data.decode_pyav import PyavDecoder, decode, video_info
from vmjepa.errors import ConfigError

SIZE = 40
DALI_CPU = ["vp8", "vp9", "mjpeg"]


@pytest.fixture(scope="module")
def videos() -> dict[str, tuple[bytes, VideoInfo]]:
    return {name: counter_video(name) for name in FORMATS}


def check_clip(clip: torch.Tensor, plan: ClipPlan, video: VideoInfo) -> None:
    """A frame or a pixel too far moves blue, red or green by 5 of 255 or more; codecs and colour conversions move the
    mean by up to 2.5 (swscale's fast conversion alone by -1)."""
    assert clip.dtype == torch.uint8
    assert clip.is_contiguous()
    assert clip.shape == (len(plan.frame_index), SIZE, SIZE, 3)
    difference = clip.numpy() - expected_clip(plan, video, SIZE)
    assert np.abs(difference.mean((1, 2))).max() < 2.5
    assert np.abs(difference).mean() < 2.5


def plans_of(video: VideoInfo) -> list[ClipPlan]:
    spec = ClipSpec(num_frames=6, stride=3, crop_size=SIZE, num_clips=2)
    odd = ClipPlan(np.array([1, 1, 46, 47, 47]), Crop(4, 7, 29, 23), flip=True)
    return [*train_clips(spec, video, seed=3, epoch=0, sample=1), *eval_clips(spec, video, 2, 3), odd]


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
@pytest.mark.parametrize("name", FORMATS)
def test_pyav_gives_the_planned_frames_and_crops(videos, name, rotation):
    data, stored = videos[name]
    video = VideoInfo(stored.frames, stored.width, stored.height, rotation)
    plans = [plan for plan in plans_of(video) if plan.crop.top + plan.crop.height <= video.shown_size[1]]
    for clip, plan in zip(decode(data, video, plans, SIZE), plans, strict=True):
        check_clip(clip, plan, video)


@pytest.mark.parametrize("rotation", [0, 90])
@pytest.mark.parametrize("name", DALI_CPU)
def test_dali_gives_what_pyav_gives(videos, name, rotation):
    """The same frames and crops, the same pixels up to the colour conversion; 9 clips through batches of 4."""
    pytest.importorskip("nvidia.dali")
    data, stored = videos[name]
    video = VideoInfo(stored.frames, stored.width, stored.height, rotation)
    job = DecodeJob(data, video, [p for p in plans_of(video) if p.crop.top + p.crop.height <= video.shown_size[1]])
    (clips,) = DaliDecoder(SIZE, batch_size=4, threads=1).decode([job])
    (reference,) = PyavDecoder(SIZE).decode([job])
    for clip, other, plan in zip(clips, reference, job.plans, strict=True):
        check_clip(clip, plan, video)
        assert (clip.float() - other.float()).abs().mean() < 3


def test_dali_loses_only_the_bad_videos_of_a_batch(videos):
    pytest.importorskip("nvidia.dali")
    plan = ClipPlan(np.array([0, 7]), Crop(0, 0, HEIGHT, HEIGHT), flip=False)
    data = [videos["vp9"][0], b"<html>not found</html>", videos["h264-one-gop"][0], b"", videos["mjpeg"][0]]
    results = DaliDecoder(SIZE, batch_size=8, threads=1).decode([DecodeJob(d, videos["vp9"][1], [plan]) for d in data])
    assert [isinstance(result, DecodeError) for result in results] == [False, True, True, True, False]
    check_clip(results[0][0], plan, videos["vp9"][1])
    check_clip(results[4][0], plan, videos["mjpeg"][1])


@pytest.mark.parametrize("name", ["h264-bframes", "mpeg4", "vp8", "vp9", "mjpeg"])
def test_a_seek_changes_no_pixel(videos, name, monkeypatch):
    """A late clip is read after a seek (reading from the start is forbidden), bit for bit as without one."""
    data, video = videos[name]
    plan = ClipPlan(np.array([37, 40, 47]), Crop(0, 0, HEIGHT, WIDTH), flip=False)
    with monkeypatch.context() as patch:
        patch.setattr(decode_pyav, "_read_from_start", None)
        (seen,) = decode(data, video, [plan], SIZE)
    monkeypatch.setattr(decode_pyav, "_SEEK_SAVES", 1000)
    (plain,) = decode(data, video, [plan], SIZE)
    assert torch.equal(seen, plain)


def test_no_seek_where_time_stamps_prove_nothing(videos, monkeypatch):
    """Without time stamps, or with a frame count other than the packets', the video is read from its start."""
    starts = []
    original = decode_pyav._read_from_start
    monkeypatch.setattr(decode_pyav, "_read_from_start", lambda *a: starts.append(1) or original(*a))
    plan = ClipPlan(np.array([40]), Crop(0, 0, HEIGHT, WIDTH), flip=False)
    raw, video = videos["h264-no-timestamps"]
    check_clip(decode(raw, video, [plan], SIZE)[0], plan, video)
    check_clip(decode(videos["mjpeg"][0], VideoInfo(45, WIDTH, HEIGHT), [plan], SIZE)[0], plan, video)
    assert len(starts) == 2


def test_frames_are_counted_not_timed():
    """Uneven time stamps (a gap of a second, doubled frames' worth of time) do not change which frame is which."""
    times = [n + 30 * (n > 9) + 2 * max(0, n - 20) for n in range(FRAMES)]
    for name in ("h264-bframes", "vp9"):
        data, video = counter_video(name, times=times)
        assert video_info(data) == video
        for plan in plans_of(video):
            check_clip(decode(data, video, [plan], SIZE)[0], plan, video)


@pytest.mark.parametrize("name", FORMATS)
def test_video_info_counts_frames(videos, name):
    assert video_info(videos[name][0]) == videos[name][1]


@pytest.mark.parametrize("name", ["empty", "text", "truncated header", "no frames"])
def test_what_is_no_video_is_a_decode_error(videos, name):
    data = videos["h264-bframes"][0]
    bad = {
        "empty": b"",
        "text": b"<html>404</html>",
        "truncated header": data[:64],
        "no frames": data[: data.index(b"mdat")],
    }[name]
    plan = ClipPlan(np.array([0]), Crop(0, 0, HEIGHT, WIDTH), flip=False)
    with pytest.raises(DecodeError):
        video_info(bad)
    with pytest.raises(DecodeError):
        decode(bad, VideoInfo(FRAMES, WIDTH, HEIGHT), [plan], SIZE)
    (result,) = PyavDecoder(SIZE).decode([DecodeJob(bad, VideoInfo(FRAMES, WIDTH, HEIGHT), [plan])])
    assert isinstance(result, DecodeError)


def test_a_video_shorter_than_it_claims_says_so(videos):
    plan = ClipPlan(np.array([0, 60]), Crop(0, 0, HEIGHT, WIDTH), flip=False)
    with pytest.raises(TooFewFrames, match="only 48 frames decode, frame 60 was wanted") as caught:
        decode(videos["vp9"][0], VideoInfo(100, WIDTH, HEIGHT), [plan], SIZE)
    assert caught.value.decoded == FRAMES


def test_zoo_frame_counts_and_last_frames(data_dir):
    """Every decodable file of the zoo (rotation, odd sizes, VFR, edit lists, 10 bit, alpha, interlaced): its packets
    count its frames, and its last frame decodes."""
    with open(data_dir / "zoo" / "manifest.csv", newline="") as file:
        # The manifest counts the first video stream, we decode FFmpeg's favourite: leave out files with two.
        usable = (row for row in csv.DictReader(file) if row["expected"] == "yes")
        rows = [row for row in usable if row["streams"].count("video:") == 1]
    assert rows
    for row in rows:
        data = (data_dir / "zoo" / row["file"]).read_bytes()
        video = video_info(data)
        assert video.frames == int(row["frames_decoded"]), row["file"]
        assert video.rotation == float(row["rotation"] or 0), row["file"]
        width, height = video.shown_size
        last = ClipPlan(np.array([video.frames - 1]), Crop(0, 0, height, width), flip=False)
        assert decode(data, video, [last], SIZE)[0].shape == (1, SIZE, SIZE, 3), row["file"]


@pytest.mark.parametrize(
    ("kind", "codecs", "device", "chosen"),
    [
        ("pyav", "vp9", "cuda", "pyav"),
        ("auto", "vp9", "cpu", "pyav"),
        ("auto", "h264", "cuda", "dali"),
        ("auto", "h264 prores", "cuda", "pyav"),
        ("auto", "h264 unknown", "cuda", "pyav"),
        ("dali", "vp9 vp8 mjpeg", "cpu", "dali"),
        ("dali", "h264 hevc av1 mpeg4 vp9", "cuda", "dali"),
        (
            "dali",
            "vp9 h264",
            "cpu",
            ".*only mjpeg, vp8, vp9 on the CPU, but clip of h264 is h264; set data.decoder=auto",
        ),
        ("dali", "prores", "cuda", ".*on the GPU, but clip of prores is prores"),
        ("dali", "unknown", "cpu", ".*reads shards, not loose files .clip of .; pack them"),
    ],
)
def test_choice_of_the_decoder(kind, codecs, device, chosen):
    pytest.importorskip("nvidia.dali")
    found = {codec: f"clip of {codec}" for codec in codecs.replace("unknown", "").split(" ")}
    if chosen in ("pyav", "dali"):
        assert choose_decoder(kind, found, device) == chosen
    else:
        with pytest.raises(ConfigError, match=chosen):
            choose_decoder(kind, found, device)
