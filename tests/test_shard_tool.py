"""The shard tool: what goes in, in what order and how it comes out; its input and options alone decide the bytes."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import av
import numpy as np
import pytest

from tests.clip_maker import make_clip
from tests.shard_helpers import make_videos, quarantine, run_shard, tree
from tools.shard.__main__ import parse_size
from tools.shard.encode import EncodeOptions
from tools.shard.inputs import list_input
from tools.shard.pack import PackOptions, pack
from vmjepa.data.probe_video import probe
from vmjepa.data.shards import ShardDataset
from vmjepa.errors import ConfigError, DataError

ODD_NAMES = [
    "te[s]t_ video ' _ .webm",
    "視頻 ñ (1) %20#&.mp4",
    'quote".webm',
    "no_extension",
    "a.b.c.WEBM",
    "new\nline.mkv",
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that most tests pack."""
    return make_videos(tmp_path_factory.mktemp("videos"))


# --- what goes in ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_zoo(data_dir: Path, tmp_path: Path) -> None:
    """Over codecs, containers and breakage: every file a decoder can read whole is packed, every other is refused."""
    with open(data_dir / "zoo" / "manifest.csv", encoding="utf-8") as file:
        expected = {row["file"]: row["expected"] for row in csv.DictReader(file)}
    pack(data_dir / "zoo", tmp_path / "out", PackOptions(layout="flat"), workers=2)
    dataset = ShardDataset(tmp_path / "out")
    packed = {dataset.source(i) for i in range(len(dataset))}
    refused = quarantine(tmp_path / "out")
    assert packed == {name for name, verdict in expected.items() if verdict == "yes"}
    assert set(refused) - {"README.md", "manifest.csv"} == {name for name, v in expected.items() if v != "yes"}
    assert all(row["reason"] for row in refused.values())
    reasons = {"no_video_stream": {"no video stream"}, "cover_art_only": {"cover art only"}}
    reasons["unreadable"] = {"not a video", "empty file", "no video stream"}
    reasons["partial_with_errors"] = {"decoder error", "truncated", "starts mid-stream"}
    reasons["zero_frames_or_undecodable"] = {"no frames", "decoder error", "not a video"}
    for name, row in refused.items():
        if name in expected:
            assert row["reason"] in reasons[expected[name]], name


def test_class_folders(videos: Path, tmp_path: Path) -> None:
    """Sorted class names are the labels; bad files are listed with class, row and reason; the rest is packed."""
    summary = pack(videos, tmp_path / "out", PackOptions())
    assert summary.dataset["labels"] == {"jump": 0, "run": 1}
    assert summary.refused == {"not a video": 1, "empty file": 1, "truncated": 1}
    dataset = ShardDataset(tmp_path / "out")
    assert len(dataset) == 12
    assert {(dataset.source(i).split("/")[0], int(dataset.labels[i])) for i in range(12)} == {("jump", 0), ("run", 1)}
    refused = quarantine(tmp_path / "out")
    names = sorted(str(path.relative_to(videos)) for path in videos.rglob("*") if path.is_file())
    assert {name: (row["label"], row["reason"]) for name, row in refused.items()} == {
        "run/page.mp4": ("1", "not a video"),
        "run/empty.mp4": ("1", "empty file"),
        "jump/cut.webm": ("0", "truncated"),
    }
    assert all(names[int(row["row"]) - 1] == name for name, row in refused.items())


def test_odd_names_in_a_flat_folder(tmp_path: Path) -> None:
    """Names with brackets, quotes, line ends, unicode or bytes that are no text are packed and recorded."""
    folder = tmp_path / "in [x] 'y'"
    folder.mkdir()
    for i, name in enumerate(ODD_NAMES):
        (folder / name).write_bytes(make_clip(4, seed=i))
    (folder / os.fsdecode(b"caf\xe9.webm")).write_bytes(make_clip(4, seed=99))
    (folder / ".hidden.webm").write_bytes(make_clip(4))
    os.mkfifo(folder / "pipe.mp4")  # opening it would wait for ever
    (folder / "dead_link.mp4").symlink_to("nowhere")
    output = folder / "out"  # inside the input: must not pack itself
    pack(folder, output, PackOptions(layout="flat"))
    dataset = ShardDataset(output)
    assert {dataset.source(i) for i in range(len(dataset))} == {*ODD_NAMES, "caf\\udce9.webm"}
    assert set(dataset.labels) == {-1}
    assert {name: row["reason"] for name, row in quarantine(output).items()} == {"dead_link.mp4": "missing file"}
    assert pack(folder, output, PackOptions(layout="flat")).already_complete


def test_csv_input(videos: Path, tmp_path: Path) -> None:
    """Labels and paths of a CSV; a path that does not exist is refused with its row."""
    table = tmp_path / "clips.csv"
    table.write_text(f"path,label\n{videos}/jump/0.webm,7\nmissing.mp4,8\n{videos}/run/1.webm,-1\n")
    pack(table, tmp_path / "out", PackOptions(shuffle=False))
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.labels.tolist() == [7, -1]
    assert dataset.read(0) == (videos / "jump/0.webm").read_bytes()
    refused = quarantine(tmp_path / "out")["missing.mp4"]
    assert (refused["row"], refused["label"], refused["reason"]) == ("3", "8", "missing file")


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        pytest.param(["a/1.mp4", "b/2.mp4", "README.md"], "classes", id="folders-beside-notes"),
        pytest.param(["1.mp4", "2.mp4"], "flat", id="only-files"),
        pytest.param(["1.MP4", "extra/2.mp4"], "flat", id="videos-at-the-top"),
    ],
)
def test_auto_layout(tmp_path: Path, files: list[str], kind: str) -> None:
    """Folders name classes unless videos lie beside them."""
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert list_input(tmp_path, "auto", exclude=tmp_path / "out").kind == kind


@pytest.mark.parametrize(
    ("source", "says"),
    [
        pytest.param("none", "no such file or folder", id="missing"),
        pytest.param("empty", "holds no files", id="empty-folder"),
        pytest.param(
            "bad", r"none of the 2 files could be packed \(not a video: 1, empty file: 1; for ex", id="all-bad"
        ),
        pytest.param("bad.csv", r"row 1: label 'x' is not an integer", id="bad-csv"),
        pytest.param("pipe.mp4", r"pipe\.mp4 is no regular file .*; give a CSV", id="pipe"),
        pytest.param("/dev/null", r"/dev/null is no regular file", id="device"),
    ],
)
@pytest.mark.timeout(30)
def test_unusable_input(tmp_path: Path, source: str, says: str) -> None:
    """Nothing to pack: one sentence, and no output is left."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("no video")
    (tmp_path / "bad" / "b.mp4").touch()
    (tmp_path / "bad.csv").write_text("a.mp4 x\n")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(DataError, match=says):
        pack(tmp_path / source, tmp_path / "out", PackOptions(shuffle=False))
    assert not (tmp_path / "out").exists()


def test_output_that_is_the_input(tmp_path: Path) -> None:
    """Packing a folder into itself is refused as that, also by another name, and nothing is written."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.webm").write_bytes(make_clip())
    (tmp_path / "link").symlink_to("in")
    for output in ("in", "link"):
        with pytest.raises(DataError, match="is both the input and the output; give another folder"):
            pack(tmp_path / "in", tmp_path / output, PackOptions())
    assert os.listdir(tmp_path / "in") == ["a.webm"]


# --- what decides the bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [None, "h264", "hevc", "vp8", "vp9", "av1", "mjpeg"])
def test_bytes_do_not_depend_on_workers(videos: Path, tmp_path: Path, codec: str | None) -> None:
    """One and three workers make the same files, copied or encoded anew."""
    options = PackOptions(shard_size=20_000, encode=EncodeOptions(codec, 32, 4) if codec else None)
    for workers in (1, 3):
        pack(videos, tmp_path / str(workers), options, workers=workers)
    assert tree(tmp_path / "1") == tree(tmp_path / "3")
    assert len(ShardDataset(tmp_path / "1")) == 12


def test_seed_and_shard_size_decide_the_packing(videos: Path, tmp_path: Path) -> None:
    """The seed changes the order only; no shuffle keeps the listing's; shards stay within the target size."""
    orders = {}
    for name, options in {
        "a": PackOptions(seed=0, shard_size=30_000),
        "b": PackOptions(seed=1, shard_size=30_000),
        "c": PackOptions(shuffle=False, shard_size=30_000),
    }.items():
        summary = pack(videos, tmp_path / name, options)
        dataset = ShardDataset(tmp_path / name)
        orders[name] = [dataset.source(i) for i in range(len(dataset))]
        assert len(dataset.shard_names) > 1
        assert all(shard["size"] <= 30_000 + 10_240 for shard in summary.dataset["shards"])
    assert orders["c"] == sorted(orders["c"])
    assert orders["a"] != orders["b"]
    assert sorted(orders["a"]) == sorted(orders["b"]) == orders["c"]


def test_encoding_keeps_frames_and_turns_upright(tmp_path: Path) -> None:
    """All frames at their times, the asked size and key frames; pixels close to the source's, turned as it asks."""
    source = tmp_path / "turned.mp4"
    _write_rotated(source, make_clip(20, (96, 64), "libx264", seed=3), degrees=90)
    assert probe(source).rotation == 90
    output = tmp_path / "out"
    table = tmp_path / "clips.csv"
    table.write_text(f"{source} 0\n")
    pack(table, output, PackOptions(encode=EncodeOptions("vp9", None, 5)))
    dataset = ShardDataset(output)
    assert (dataset.frames[0], dataset.width[0], dataset.height[0], dataset.rotation[0]) == (20, 64, 96, 0)
    (output / "clip.webm").write_bytes(dataset.read(0))
    with av.open(output / "clip.webm") as new, av.open(source) as old:
        assert [i for i, packet in enumerate(new.demux(video=0)) if packet.is_keyframe] == [0, 5, 10, 15]
        new.seek(0)
        for a, b in zip(new.decode(video=0), old.decode(video=0), strict=True):
            assert float(a.time) == pytest.approx(float(b.time), abs=0.001)
            upright = np.rot90(b.to_ndarray(format="rgb24")).astype(int)
            assert np.abs(a.to_ndarray(format="rgb24") - upright).mean() < 6


@pytest.mark.parametrize(("codec", "encoder"), [("hevc", "libx265"), ("av1", "libsvtav1")])
def test_encoder_that_refuses_a_clip(tmp_path: Path, codec: str, encoder: str) -> None:
    """A picture too small for an encoder is refused with FFmpeg's words, and the worker goes on to the next clip."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a_good.webm").write_bytes(make_clip())
    for width in (1, 2):
        _write_tiny(folder / f"b_{width}.mkv", width)
    (folder / "c_good.webm").write_bytes(make_clip())
    pack(folder, tmp_path / "out", PackOptions(shuffle=False, encode=EncodeOptions(codec)), workers=1)
    assert {name: (row["reason"], row["detail"]) for name, row in quarantine(tmp_path / "out").items()} == {
        f"b_{width}.mkv": ("encoder error", f"{encoder}, from {width}x1 pixels: Invalid argument") for width in (1, 2)
    }
    assert len(ShardDataset(tmp_path / "out")) == 2


def _write_tiny(path: Path, width: int) -> None:
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, 1, "gray"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((1, width), np.uint8), format="gray")))
        container.mux(stream.encode(None))


def _write_rotated(path: Path, video: bytes, degrees: int) -> None:
    """An mp4 whose track header asks for a turn: only the display matrix differs."""
    matrix = {0: (1, 0, 0, 1), 90: (0, -1, 1, 0)}
    plain, turned = (
        b"".join(
            int(v).to_bytes(4, "big", signed=True) for v in (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        )
        for a, b, c, d in (matrix[0], matrix[degrees])
    )
    track = video.index(b"tkhd")
    at = video.index(plain, track)
    path.write_bytes(video[:at] + turned + video[at + len(turned) :])


# --- the command ----------------------------------------------------------------------------------------------------


def test_command_reports(videos: Path, tmp_path: Path) -> None:
    """Summary on stdout, the warning on stderr, status 0; again: already complete; verify: fine, then damaged."""
    result = run_shard("run", videos, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "packed 12 clips" in result.stdout
    assert "clips/s" in result.stdout
    assert "0 jump, 1 run" in result.stdout
    assert "warning: 3 files quarantined" in result.stderr
    again = run_shard("run", videos, tmp_path / "out")
    assert (again.returncode, "already complete" in again.stdout) == (0, True)
    assert run_shard("verify", tmp_path / "out").returncode == 0
    shard = tmp_path / "out" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    damaged = run_shard("verify", tmp_path / "out")
    assert damaged.returncode == 93
    assert damaged.stderr.startswith("error: ")
    assert "key 0000" in damaged.stderr


def test_command_fails_with_a_sentence(tmp_path: Path) -> None:
    """An unusable input is one line on stderr and status 93."""
    (tmp_path / "in").mkdir()
    result = run_shard("run", tmp_path / "in", tmp_path / "out")
    assert result.returncode == 93
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")


def test_lines_without_a_terminal(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A log file gets a line now and then: done, total, rate, time left."""
    progress_module = pytest.importorskip("tools.shard.progress")
    monkeypatch.setattr(progress_module, "_LINE_EVERY", 0.0)
    progress = progress_module.Progress()
    progress.start(total=10, done=2)
    progress.advance(packed=4, quarantined=1)
    progress.stop()
    line = capfd.readouterr().err.strip()
    assert line.startswith("packing: 5 of 10 clips, 1 quarantined, ")
    assert line.endswith(" s left")


@pytest.mark.parametrize(("text", "size"), [("256MB", 256_000_000), ("1GiB", 2**30), ("20 kB", 20_000), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    """Decimal and binary units."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-5MB", "1.5GB", "0", "3 apples"])
def test_bad_sizes(text: str) -> None:
    """What is no size is refused with an example."""
    with pytest.raises(ConfigError, match="256MB"):
        parse_size(text)
