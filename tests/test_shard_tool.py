"""The shard tool: what goes in, in what order and how it comes out; its input and options alone decide the bytes."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

import tools.shard.pack as pack_module
import tools.shard.pool as pool_module
from tests.clip_maker import make_clip
from tools.shard.__main__ import parse_size
from tools.shard.encode import EncodeOptions
from tools.shard.inputs import list_input
from tools.shard.pack import PackOptions, Summary, pack
from vmjepa.data.probe_video import probe
from vmjepa.data.shard_writer import ShardWriter
from vmjepa.data.shards import QUARANTINE, ShardDataset
from vmjepa.errors import ConfigError, DataError, StorageError

ROOT = Path(__file__).resolve().parent.parent
ODD_NAMES = [
    "te[s]t_ video ' _ .webm",
    "視頻 ñ (1) %20#&.mp4",
    'quote".webm',
    "no_extension",
    "a.b.c.WEBM",
    "new\nline.mkv",
]


def _tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _quarantine(output: Path) -> dict[str, dict[str, str]]:
    with open(output / QUARANTINE, encoding="utf-8", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tools.shard", *map(str, arguments)]


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve videos and three bad files in two class folders."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(12):
        path = folder / ("run" if i % 2 else "jump") / f"{i}.webm"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(make_clip(5 + i % 4, seed=i))
    (folder / "run" / "page.mp4").write_text("<html>404</html>")
    (folder / "run" / "empty.mp4").touch()
    (folder / "jump" / "cut.webm").write_bytes(make_clip(20)[:-700])
    return folder


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
    refused = _quarantine(tmp_path / "out")
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
    refused = _quarantine(tmp_path / "out")
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
    assert {name: row["reason"] for name, row in _quarantine(output).items()} == {"dead_link.mp4": "missing file"}
    assert pack(folder, output, PackOptions(layout="flat")).already_complete


def test_csv_input(videos: Path, tmp_path: Path) -> None:
    """Labels and paths of a CSV; a path that does not exist is refused with its row."""
    table = tmp_path / "clips.csv"
    table.write_text(f"path,label\n{videos}/jump/0.webm,7\nmissing.mp4,8\n{videos}/run/1.webm,-1\n")
    pack(table, tmp_path / "out", PackOptions(shuffle=False))
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.labels.tolist() == [7, -1]
    assert dataset.read(0) == (videos / "jump/0.webm").read_bytes()
    refused = _quarantine(tmp_path / "out")["missing.mp4"]
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
    ],
)
def test_unusable_input(tmp_path: Path, source: str, says: str) -> None:
    """Nothing to pack: one sentence, and no output is left."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("no video")
    (tmp_path / "bad" / "b.mp4").touch()
    (tmp_path / "bad.csv").write_text("a.mp4 x\n")
    with pytest.raises(DataError, match=says):
        pack(tmp_path / source, tmp_path / "out", PackOptions(shuffle=False))
    assert not (tmp_path / "out").exists()


# --- what decides the bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [None, "h264", "hevc", "vp8", "vp9", "av1", "mjpeg"])
def test_bytes_do_not_depend_on_workers(videos: Path, tmp_path: Path, codec: str | None) -> None:
    """One and three workers make the same files, copied or encoded anew."""
    options = PackOptions(shard_size=20_000, encode=EncodeOptions(codec, 32, 4) if codec else None)
    for workers in (1, 3):
        pack(videos, tmp_path / str(workers), options, workers=workers)
    assert _tree(tmp_path / "1") == _tree(tmp_path / "3")
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


# --- interruptions --------------------------------------------------------------------------------------------------

_DRIVER = """
import os, sys
from pathlib import Path
from tools.shard.encode import EncodeOptions
from tools.shard.pack import PackOptions, pack
source, output, deadly = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0
rename = os.rename
def deadly_rename(*arguments):
    global calls
    calls += 1
    if calls == deadly:
        os.kill(os.getpid(), 9)
    rename(*arguments)
os.rename = deadly_rename
pack(Path(source), Path(output), PackOptions(shard_size=30_000, encode=EncodeOptions("mjpeg", 16)), workers=2)
"""


@pytest.mark.slow
def test_killed_before_every_publication(videos: Path, tmp_path: Path) -> None:
    """Killed before its first rename, then before its second, … until it is through: the same files as unbroken."""
    pack(videos, tmp_path / "whole", PackOptions(shard_size=30_000, encode=EncodeOptions("mjpeg", 16)))
    shards = len(list((tmp_path / "whole").glob("*.tar")))
    assert shards > 2
    for deadly in range(1, 100):
        done = subprocess.run(
            [sys.executable, "-c", _DRIVER, videos, tmp_path / "out", str(deadly)], cwd=ROOT, timeout=60
        )
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / "out" / "dataset.json").exists()
    assert 5 < deadly < 100
    assert _tree(tmp_path / "out") == _tree(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_random_moments(videos: Path, tmp_path: Path) -> None:
    """SIGKILL at any time: the workers go, too, and the same command finishes the same dataset."""
    pack(videos, tmp_path / "whole", PackOptions(shard_size=20_000))
    command = _command("run", videos, tmp_path / "out", "--shard-size", "20kB", "--workers", 2)
    rng = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.2))
        children = _children(process.pid)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.05)
    assert _run(*command[3:]).returncode == 0
    assert _tree(tmp_path / "out") == _tree(tmp_path / "whole")


def test_interrupted(tmp_path: Path) -> None:
    """Ctrl-C: the workers end, and a sentence says how to go on."""
    (tmp_path / "long.webm").write_bytes(_prolonged(make_clip(2, (2048, 2048), flat=True), 3000))
    process = subprocess.Popen(_command("run", tmp_path, tmp_path / "out"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / ".work" / "plan.json").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    children = _children(process.pid)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert error.startswith("stopped; run the same command again")
    assert error.count("\n") == 1
    assert children
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def test_finished_shards_are_kept(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on does not touch the shards that are finished, nor decode their clips again."""
    options = PackOptions(shard_size=20_000)
    publish, published = pack_module.Store.publish_shard, []

    def failing(self, number, *rest):  # type: ignore[no-untyped-def]
        if number == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        published.append(number)
        publish(self, number, *rest)

    monkeypatch.setattr(pack_module.Store, "publish_shard", failing)
    with pytest.raises(StorageError, match="disk is full"):
        pack(videos, tmp_path / "out", options)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    assert published == [0, 1]
    assert len(before) == 4
    monkeypatch.setattr(pack_module.Store, "publish_shard", publish)
    summary = pack(videos, tmp_path / "out", options)
    assert summary.reused_shards == 2
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before
    pack(videos, tmp_path / "whole", options)
    assert _tree(tmp_path / "out") == _tree(tmp_path / "whole")


# --- clips and disks that misbehave ---------------------------------------------------------------------------------

_BAD_WORKER = """
import os, sys, time
import tools.shard.worker as worker
prove = worker.prove
def misbehave(task):
    if "jump/4" in task["path"]:
        time.sleep(1000)
    if "run/5" in task["path"] or ("run/7" in task["path"] and not os.path.exists(sys.argv[1])):
        open(sys.argv[1], "w").close()
        os.kill(os.getpid(), 11)
    return prove(task)
worker.prove = misbehave
worker.main()
"""


@pytest.mark.parametrize("workers", [1, 3])
def test_clip_that_hangs_or_crashes(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """It is quarantined and all others are packed; a worker that dies once, of something else, costs nothing."""
    monkeypatch.setattr(pool_module, "COMMAND", [sys.executable, "-c", _BAD_WORKER, str(tmp_path / "once")])
    began = time.monotonic()
    summary = pack(videos, tmp_path / "out", PackOptions(shuffle=False), workers=workers, clip_seconds=1.0)
    assert time.monotonic() - began < 30
    refused = {name: (row["reason"], row["detail"]) for name, row in _quarantine(tmp_path / "out").items()}
    assert refused["jump/4.webm"] == ("time-out", "more than 1 s")
    assert refused["run/5.webm"] == ("decoder crashed", "signal SIGSEGV")
    assert len(refused) == 5
    assert summary.dataset["samples"] == 10


def test_endless_clip_is_stopped(tmp_path: Path) -> None:
    """A small file that takes long to decode is stopped by its worker's own clock."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.webm").write_bytes(make_clip())
    (tmp_path / "in" / "long.webm").write_bytes(_prolonged(make_clip(2, (2048, 2048), flat=True), 3000))
    pack(tmp_path / "in", tmp_path / "out", PackOptions(), workers=2, clip_seconds=0.3)
    assert {name: row["reason"] for name, row in _quarantine(tmp_path / "out").items()} == {"long.webm": "time-out"}


def _prolonged(video: bytes, frames: int) -> bytes:
    """A video whose second frame, "nothing changes", follows itself until there are so many frames."""
    file = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(file, "w", format="webm") as result:
        stream = result.add_stream_from_template(source.streams.video[0])
        first, second = (bytes(packet) for packet in source.demux(video=0) if packet.size)
        for t in range(frames):
            packet = av.Packet(second if t else first)
            packet.pts = packet.dts = t * 40
            packet.time_base, packet.stream, packet.is_keyframe = stream.time_base, stream, t == 0
            result.mux(packet)
    return file.getvalue()


def test_worker_that_cannot_start(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation stops the run instead of sending every clip to quarantine."""
    monkeypatch.setattr(pool_module, "COMMAND", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match=r"could not start \(status 3\)"):
        pack(videos, tmp_path / "out", PackOptions())


def test_clip_that_changes_while_being_packed(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is what was proved, or nothing."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.webm").write_bytes(make_clip(seed=i))
    open_clip = pack_module.open_clip

    def changing(path: str):  # type: ignore[no-untyped-def]
        if path.endswith("1.webm"):
            Path(path).write_bytes(make_clip(seed=9))
        return open_clip(path)

    monkeypatch.setattr(pack_module, "open_clip", changing)
    pack(folder, tmp_path / "out", PackOptions(shuffle=False))
    dataset = ShardDataset(tmp_path / "out")
    assert [dataset.source(i) for i in range(len(dataset))] == ["0.webm", "2.webm"]
    for i in range(2):
        dataset.verify(i)
    assert _quarantine(tmp_path / "out")["1.webm"]["reason"] == "changed while being packed"


_ON_SMALL_DISK = """
disk="$1"; shift
mount -t tmpfs -o size=48k none "$disk" || exit 77
"$@" 2> full.txt; echo $? > full.status
find "$disk" > full.files
mount -o remount,size=2m "$disk"
exec "$@"
"""


@pytest.mark.parametrize("codec", [None, "mjpeg"])
def test_full_disk(videos: Path, tmp_path: Path, codec: str | None) -> None:
    """One sentence, an exit status, no half-written file; with room the same command goes on."""
    disk = tmp_path / "disk"  # 48 KiB, mounted for these commands only
    disk.mkdir()
    command = _command("run", videos, disk / "out", "--shard-size", "15kB", *(["--codec", codec] if codec else []))
    result = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", _ON_SMALL_DISK, "sh", disk, *command],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if result.returncode == 77 or "unshare failed" in result.stderr:
        pytest.skip("this system lets us mount no file system")
    error = (tmp_path / "full.txt").read_text()
    assert (tmp_path / "full.status").read_text().strip() == "1"
    assert error.count("\n") == 1
    assert error.startswith("error: packing into")
    assert "the disk is full" in error
    left = [Path(line).name for line in (tmp_path / "full.files").read_text().splitlines()]
    assert "plan.json" in left
    assert not [name for name in left if name.endswith(".tmp") or name.startswith("clip-")]
    assert result.returncode == 0, result.stderr
    assert "packed 12 clips" in result.stdout


@pytest.mark.parametrize("where", ["shard", "manifest"])
def test_write_error_is_a_sentence(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The same without a small disk: an error while writing keeps finished shards and drops temporaries."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if where == "shard":
            patch.setattr(ShardWriter, "finish", full)
        else:
            patch.setattr("tools.shard.store.csv.DictWriter.writeheader", full)
        with pytest.raises(StorageError, match="disk is full; make room"):
            pack(videos, tmp_path / "out", PackOptions())
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert pack(videos, tmp_path / "out", PackOptions()).dataset["samples"] == 12


# --- the output folder ----------------------------------------------------------------------------------------------


def _packed(videos: Path, output: Path) -> Summary:
    return pack(videos, output, PackOptions(shard_size=40_000))


def test_already_complete(videos: Path, tmp_path: Path) -> None:
    """The same command again does nothing and says so."""
    _packed(videos, tmp_path / "out")
    before = _tree(tmp_path / "out")
    again = _packed(videos, tmp_path / "out")
    assert again.already_complete
    assert again.refused == {"not a video": 1, "empty file": 1, "truncated": 1}
    assert _tree(tmp_path / "out") == before


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(PackOptions(seed=5, shard_size=40_000), "seed was 0, now 5", id="seed"),
        pytest.param(PackOptions(shard_size=50_000), "shard_size was 40000, now 50000", id="shard-size"),
        pytest.param(PackOptions(shard_size=40_000, encode=EncodeOptions("h264")), "encode was None", id="codec"),
    ],
)
def test_other_options_are_refused(
    videos: Path, tmp_path: Path, options: PackOptions, says: str, finished: bool
) -> None:
    """A folder that holds another dataset stays as it is, finished or not."""
    _packed(videos, tmp_path / "out")
    if not finished:
        plan = json.loads((tmp_path / "out" / "dataset.json").read_text())["options"]
        (tmp_path / "out" / "dataset.json").unlink()
        (tmp_path / "out" / ".work").mkdir()
        (tmp_path / "out" / ".work" / "plan.json").write_text(json.dumps(plan))
    before = _tree(tmp_path / "out")
    with pytest.raises(DataError, match=says) as error:
        pack(videos, tmp_path / "out", options)
    assert "give another output folder" in str(error.value)
    after = _tree(tmp_path / "out")
    after.pop(".work/lock", None)
    assert after == before


def test_other_input_is_refused(videos: Path, tmp_path: Path) -> None:
    """The same options, another list of clips."""
    _packed(videos, tmp_path / "out")
    before = _tree(tmp_path / "out")
    table = tmp_path / "clips.csv"
    table.write_text(f"{videos}/jump/0.webm 0\n")
    with pytest.raises(DataError, match="input was classes, now csv"):
        _packed(table, tmp_path / "out")
    assert _tree(tmp_path / "out") == before


def test_foreign_folder_and_file_are_refused(videos: Path, tmp_path: Path) -> None:
    """A folder with other contents, or a file, is not written into."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"thesis\.tex"):
        _packed(videos, tmp_path)
    with pytest.raises(DataError, match="is a file"):
        _packed(videos, tmp_path / "thesis.tex")
    assert _tree(tmp_path) == {"thesis.tex": hashlib.sha256(b"years of work").hexdigest()}


def test_two_runs_at_once(videos: Path, tmp_path: Path) -> None:
    """The second run into a folder is refused while the first is at work, and welcome after it."""
    work = tmp_path / "out" / ".work"
    work.mkdir(parents=True)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run is packing"):
            _packed(videos, tmp_path / "out")
    _packed(videos, tmp_path / "out")


# --- the command ----------------------------------------------------------------------------------------------------


def test_command_reports(videos: Path, tmp_path: Path) -> None:
    """Summary on stdout, the warning on stderr, status 0; again: already complete; verify: fine, then damaged."""
    result = _run("run", videos, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "packed 12 clips" in result.stdout
    assert "clips/s" in result.stdout
    assert "0 jump, 1 run" in result.stdout
    assert "warning: 3 files quarantined" in result.stderr
    again = _run("run", videos, tmp_path / "out")
    assert (again.returncode, "already complete" in again.stdout) == (0, True)
    assert _run("verify", tmp_path / "out").returncode == 0
    shard = tmp_path / "out" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    damaged = _run("verify", tmp_path / "out")
    assert damaged.returncode == 93
    assert damaged.stderr.startswith("error: ")
    assert "key 0000" in damaged.stderr


def test_command_fails_with_a_sentence(tmp_path: Path) -> None:
    """An unusable input is one line on stderr and status 93."""
    (tmp_path / "in").mkdir()
    result = _run("run", tmp_path / "in", tmp_path / "out")
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
