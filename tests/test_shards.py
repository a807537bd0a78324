"""Shards: what is written is read back, by us, by webdataset and by DALI; and every damage is named."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest

from tests.clip_maker import make_clip
from tools.shard.pack import PackOptions, pack
from vmjepa.data.probe_video import BadClipError, ClipInfo, probe
from vmjepa.data.shard_writer import ClipChangedError, ShardWriter
from vmjepa.data.shards import MANIFEST, SUMMARY, ShardDataset, open_dataset
from vmjepa.errors import DataError

CLASSES = ("bow", "clap", "wave")
CODECS = ("libvpx", "libvpx-vp9", "mjpeg", "libx264")


@pytest.fixture(scope="module")
def clips() -> dict[str, bytes]:
    """Nine videos in three classes, of four codecs and different lengths, by path."""
    return {
        f"{CLASSES[i % 3]}/{i}.{'mp4' if i % 4 == 3 else 'webm'}": make_clip(4 + i, codec=CODECS[i % 4], seed=i)
        for i in range(9)
    }


@pytest.fixture(scope="module")
def packed(clips: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """These videos in several shards."""
    folder = tmp_path_factory.mktemp("videos")
    for name, data in clips.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    output = tmp_path_factory.mktemp("packed") / "shards"
    pack(folder, output, PackOptions(shard_size=20_000))
    return output


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    return shutil.copytree(packed, tmp_path / "shards")


def test_reading_gives_back_the_bytes(packed: Path, clips: dict[str, bytes]) -> None:
    """Each clip's bytes, label and facts are those of its source file."""
    dataset = open_dataset(packed)
    assert isinstance(dataset, ShardDataset)
    assert len(dataset) == len(clips)
    assert len(dataset.shard_names) > 2
    assert dataset.label_names == {"bow": 0, "clap": 1, "wave": 2}
    assert sorted(dataset.source(i) for i in range(len(dataset))) == sorted(clips)
    for i in range(len(dataset)):
        source = dataset.source(i)
        assert dataset.read(i) == clips[source]
        dataset.verify(i)
        assert dataset.labels[i] == CLASSES.index(source.split("/")[0])
        assert dataset.frames[i] == 4 + int(Path(source).stem)
        assert (dataset.width[i], dataset.height[i], dataset.rotation[i]) == (48, 32, 0)
        assert dataset.fps[i] == pytest.approx(10, rel=0.05)
        assert dataset.codec(i) in {"vp8", "vp9", "mjpeg", "h264"}
        assert dataset.shard_names[dataset.shard_index[i]] in dataset.describe(i)
    assert (np.diff(dataset.shard_index) >= 0).all()  # manifest order is the order on the disk


def test_reader_is_shared_and_pickled(packed: Path, clips: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads read from more shards than may be open at once; an unpickled reader reads the same."""
    monkeypatch.setattr(ShardDataset, "_OPEN_SHARDS", 1)
    dataset = pickle.loads(pickle.dumps(ShardDataset(packed)))
    order = np.random.default_rng(0).integers(0, len(dataset), 300).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(dataset.read, order)) == [clips[dataset.source(i)] for i in order]


def test_tar_is_plain(packed: Path, clips: dict[str, bytes]) -> None:
    """USTAR members in the documented order, without owner, time or anything else of this machine."""
    dataset = ShardDataset(packed)
    members = []
    for name in dataset.shard_names:
        with tarfile.open(packed / name) as tar:
            for member in tar:
                assert (member.uid, member.gid, member.mtime, member.mode) == (0, 0, 0, 0o644)
                members.append(member.name)
        assert (packed / name).stat().st_size % 10240 == 0
    assert [name.split(".")[1] for name in members[1:4]] == ["cls", "i32", "json"]
    assert len({name.split(".")[0] for name in members}) == len(clips)


def test_index_is_dalis(packed: Path, tmp_path: Path) -> None:
    """Our index files are those that DALI's own wds2idx makes of the tars."""
    wds2idx = pytest.importorskip("wds2idx")
    for tar in packed.glob("*.tar"):
        with wds2idx.IndexCreator(str(tar), str(tmp_path / "index"), verbose=False) as creator:
            creator.create_index()
        assert tar.with_suffix(".idx").read_text() == (tmp_path / "index").read_text()


def test_webdataset_reads_the_shards(packed: Path, clips: dict[str, bytes]) -> None:
    """The webdataset library decodes label and facts, and finds the video's bytes."""
    wds = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(packed.glob("*.tar"))]
    seen = {}
    for sample in wds.WebDataset(urls, shardshuffle=False).decode():
        facts = sample["json"]
        seen[facts["source"]] = sample[facts["ext"]]
        assert sample["cls"] == facts["label"] == CLASSES.index(facts["source"].split("/")[0])
        assert np.frombuffer(sample["i32"], "<i4").tolist() == [
            facts["label"], facts["frames"], facts["width"], facts["height"], int(sample["__key__"])
        ]  # fmt: skip
        assert hashlib.sha256(sample[facts["ext"]]).hexdigest() == facts["sha256"]
    assert seen == clips


def test_dali_reads_the_shards(packed: Path, clips: dict[str, bytes]) -> None:
    """DALI's webdataset reader, with our index files, gives the video's bytes and the packed numbers."""
    dali = pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, types

    tars = sorted(packed.glob("*.tar"))

    @dali.pipeline_def(batch_size=len(clips), num_threads=1, device_id=None)
    def pipeline():  # type: ignore[no-untyped-def]
        video, packed_numbers = fn.readers.webdataset(
            paths=[str(path) for path in tars],
            index_paths=[str(path.with_suffix(".idx")) for path in tars],
            ext=["mp4;webm;mkv", "i32"],
            dtypes=[types.UINT8, types.INT32],
            missing_component_behavior="error",
        )
        return video, packed_numbers

    pipe = pipeline()
    pipe.build()
    videos, numbers = pipe.run()
    dataset = ShardDataset(packed)
    for i in range(len(clips)):
        assert np.asarray(videos[i]).tobytes() == clips[dataset.source(i)]
        label, frames, width, height, _ = np.asarray(numbers[i]).tolist()
        assert (label, frames) == (dataset.labels[i], dataset.frames[i])
        assert (width, height) == (dataset.width[i], dataset.height[i])


def test_changed_byte_is_found(copy: Path) -> None:
    """A shard whose bytes do not match the manifest: the clip, its shard and its source are named."""
    dataset = ShardDataset(copy)
    shard = copy / dataset.shard_names[dataset.shard_index[3]]
    data = bytearray(shard.read_bytes())
    data[dataset.offset[3] + 5] ^= 1
    shard.write_bytes(data)
    dataset = ShardDataset(copy)
    with pytest.raises(DataError, match=rf"{shard.name} key \d{{8}} \(source .*match the manifest"):
        dataset.verify(3)
    dataset.verify(2)


def _edit_summary(folder: Path, *without: str, **entries: object) -> None:
    summary = json.loads((folder / SUMMARY).read_text()) | entries
    (folder / SUMMARY).write_text(json.dumps({key: value for key, value in summary.items() if key not in without}))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(lambda f: (f / "shard-000001.tar").unlink(), r"shard-000001\.tar is missing", id="no-shard"),
        pytest.param(
            lambda f: (f / "shard-000000.tar").write_bytes(b"short"),
            r"has 5 bytes, dataset\.json says",
            id="short-shard",
        ),
        pytest.param(lambda f: (f / MANIFEST).unlink(), r"manifest\.parquet cannot be read", id="no-manifest"),
        pytest.param(lambda f: (f / MANIFEST).write_bytes(b"x"), "is not the one", id="other-manifest"),
        pytest.param(lambda f: (f / SUMMARY).unlink(), r"holds no dataset\.json", id="no-summary"),
        pytest.param(lambda f: (f / SUMMARY).write_text("{"), r"dataset\.json cannot be read", id="damaged-summary"),
        pytest.param(lambda f: (f / SUMMARY).write_text("[]"), "does not describe", id="other-json"),
        pytest.param(lambda f: _edit_summary(f, version=99), "version 99", id="other-version"),
        pytest.param(lambda f: (f / SUMMARY).write_bytes(b"\xff\xfe{"), "cannot be read .*utf-8", id="not-utf8"),
        pytest.param(lambda f: (f / SUMMARY).write_text("[" * 10**5), "cannot be read", id="nested-too-deep"),
        pytest.param(lambda f: _edit_summary(f, shards=7), r"entry shards is no list", id="shards-no-list"),
        pytest.param(lambda f: _edit_summary(f, shards=[7]), r"shards\[0\] is no JSON object", id="shard-no-object"),
        pytest.param(
            lambda f: _edit_summary(f, shards=[{"name": "a.tar"}]),
            r"entry shards\[0\]\.size is missing",
            id="shard-without-size",
        ),
        pytest.param(lambda f: _pipe(f / MANIFEST), r"manifest\.parquet is no regular file", id="manifest-pipe"),
        pytest.param(lambda f: _pipe(f / SUMMARY), r"holds no dataset\.json", id="summary-pipe"),
    ],
)
@pytest.mark.timeout(10)
def test_damaged_folder(copy: Path, damage, says: str) -> None:  # type: ignore[no-untyped-def]
    """Opening a damaged dataset says which file is wrong and what to do."""
    damage(copy)
    with pytest.raises(DataError, match=says) as error:
        open_dataset(copy)
    assert "python -m tools.shard run" in str(error.value) or "pack it again" in str(error.value)


@pytest.mark.parametrize("key", ["samples", "frames", "bytes", "quarantined", "labels", "shards", "options"])
def test_incomplete_summary(copy: Path, key: str) -> None:
    """An entry that dataset.json lacks is named, with the file and the remedy."""
    _edit_summary(copy, key)
    with pytest.raises(DataError, match=rf"dataset\.json: the entry {key} is missing; pack it again"):
        open_dataset(copy)


@pytest.mark.timeout(10)
def test_summary_that_is_a_pipe(copy: Path) -> None:
    """Reading the summary by itself does not wait for somebody to write into it."""
    _pipe(copy / SUMMARY)
    with pytest.raises(DataError, match=r"dataset\.json is no regular file"):
        ShardDataset(copy)


def test_shard_cut_short_while_open(copy: Path) -> None:
    """A shard that shrinks under a running job is an error for its clips, not a crash."""
    dataset = ShardDataset(copy)
    shard = copy / dataset.shard_names[0]
    shard.write_bytes(shard.read_bytes()[: dataset.offset[0] + 7])
    with pytest.raises(DataError, match="the shard ends after 7 of"):
        dataset.read(0)


def test_writer_takes_back_a_clip_that_changed(tmp_path: Path) -> None:
    """Bytes other than the proved ones leave no trace in the tar."""
    clip = ClipInfo("webm", 8, 10.0, 48, 32, 0, "vp8", "yuv420p")
    good = hashlib.sha256(b"good").hexdigest()
    tars = []
    for name, disturbed in (("a.tar", False), ("b.tar", True)):
        writer = ShardWriter(tmp_path / name, "shard.tar")
        writer.add(0, io.BytesIO(b"good"), 4, good, 1, "a", clip)
        for changed in (b"evil", b"goo", b"goods") if disturbed else ():
            with pytest.raises(ClipChangedError):
                writer.add(1, io.BytesIO(changed), 4, good, 1, "b", clip)
        writer.add(2, io.BytesIO(b"good"), 4, good, 1, "c", clip)
        digest = writer.finish()
        writer.close()
        data = (tmp_path / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest
        assert [row["key"] for row in writer.rows] == ["00000000", "00000002"]
        assert data[writer.rows[1]["offset"] :].startswith(b"good")
        tars.append((data, writer.index()))
    assert tars[0] == tars[1]


@pytest.mark.parametrize("codec", CODECS)
def test_probe_counts_and_measures(codec: str) -> None:
    """A sound clip: all frames, its size and its rate; the same from bytes as from a file."""
    clip = probe(make_clip(11, (64, 40), codec, fps=5))
    assert (clip.frames, clip.width, clip.height) == (11, 64, 40)
    assert clip.fps == pytest.approx(5, rel=0.05)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9", "libx264"])
def test_probe_finds_truncation(tmp_path: Path, codec: str) -> None:
    """A file cut short is refused, wherever it was cut, one such file after the other."""
    data = make_clip(40, codec=codec)
    if codec == "libx264":  # with the header in front, as for streaming: otherwise the cut takes the header
        data = _header_first(data, tmp_path / "front.mp4")
        assert probe(data).frames == 40
    reasons = []
    for percent in range(10, 100, 3):
        with pytest.raises(BadClipError) as error:
            probe(data[: len(data) * percent // 100])
        reasons.append(error.value.reason)
    assert reasons.count("truncated") > 15  # the others lack even their header or their first frame


def _header_first(data: bytes, path: Path) -> bytes:
    with (
        av.open(io.BytesIO(data)) as source,
        av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as result,
    ):
        stream = result.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                result.mux(packet)
    return path.read_bytes()


def test_probe_follows_no_playlist(tmp_path: Path) -> None:
    """A playlist named .mp4 must not make the decoder open other files: what is packed has to be whole in itself."""
    (tmp_path / "real.webm").write_bytes(make_clip())
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/real.webm\n#EXT-X-ENDLIST\n")
    with pytest.raises(BadClipError):
        probe(playlist)
    script = tmp_path / "concat.mp4"
    script.write_text(f"ffconcat version 1.0\nfile real.webm\nfile {tmp_path}/real.webm\n")
    with pytest.raises(BadClipError):
        probe(script)


def test_probe_says_what_is_wrong_with_a_path(tmp_path: Path) -> None:
    """Files that are missing, empty or no videos get a reason, not an exception of another kind."""
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "page.mp4").write_text("<html><body>404 Not Found</body></html>")
    for name, reason in [("none.mp4", "missing file"), ("empty.mp4", "empty file"), ("page.mp4", "not a video")]:
        with pytest.raises(BadClipError) as error:
            probe(tmp_path / name)
        assert error.value.reason == reason
    with pytest.raises(BadClipError, match="missing file"):
        probe(tmp_path)
