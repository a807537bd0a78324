"""Clip lists: what `path label` rows may look like, and what is said of those that cannot be used."""

from __future__ import annotations

import os
import pickle
import re
import socket
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjepa.data.files import FileDataset, read_clip_csv
from vmjepa.data.shards import open_dataset
from vmjepa.errors import DataError


@pytest.mark.parametrize(
    ("row", "path", "label"),
    [
        pytest.param("a.mp4 3", "a.mp4", 3, id="vjepa"),
        pytest.param("a.mp4,3", "a.mp4", 3, id="comma"),
        pytest.param("a.mp4 , 3 ", "a.mp4", 3, id="comma-and-spaces"),
        pytest.param("a.mp4\t3\r", "a.mp4", 3, id="tab-and-windows-line-end"),
        pytest.param("/data/my clip, one.mp4 3", "/data/my clip, one.mp4", 3, id="spaces-and-comma-in-path"),
        pytest.param('"my clip, one.mp4",3', "my clip, one.mp4", 3, id="quoted"),
        pytest.param('"a ""b"".mp4" "3"', 'a "b".mp4', 3, id="quotes-in-quotes"),
        pytest.param('it\'s [a] "b".mp4 -1', 'it\'s [a] "b".mp4', -1, id="quotes-brackets-and-no-label"),
        pytest.param("視頻 ñ/%20#&.mp4 0", "視頻 ñ/%20#&.mp4", 0, id="unicode"),
    ],
)
def test_row_forms(tmp_path: Path, row: str, path: str, label: int) -> None:
    """Every accepted way to write a row gives the same path and label."""
    csv = tmp_path / "clips.csv"
    csv.write_text(f"\ufeff\n{row}\n", encoding="utf-8")
    assert read_clip_csv(csv) == [(2, os.path.join(tmp_path, path), label)]


@given(
    name=st.text(st.characters(exclude_characters='\0\n\r"', exclude_categories=["Cs"]), min_size=1),
    label=st.integers(-1, 2**31 - 1),
)
def test_any_name_survives_quoting(tmp_path_factory: pytest.TempPathFactory, name: str, label: int) -> None:
    """A quoted path comes back as it was, whatever it holds but quotes and line ends."""
    csv = tmp_path_factory.mktemp("any") / "clips.csv"
    csv.write_bytes(f'"{name}",{label}\n'.encode())
    assert read_clip_csv(csv) == [(1, os.path.join(csv.parent, name), label)]


def test_header_and_blank_rows_are_skipped(tmp_path: Path) -> None:
    """Row numbers stay those of the file."""
    csv = tmp_path / "clips.csv"
    csv.write_text("path,label\n\na.mp4 1\n")
    assert [row for row, _, _ in read_clip_csv(csv)] == [3]


def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    """The bytes of the name reach the file system unchanged, and messages can be printed."""
    name = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
    Path(os.fsdecode(name)).write_bytes(b"video")
    (tmp_path / "clips.csv").write_bytes(b"caf\xe9.mp4 4\n")
    clips = FileDataset(tmp_path / "clips.csv")
    assert clips.read(0) == b"video"
    assert clips.describe(0).endswith("caf\\udce9.mp4")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("", "lists no clips", id="empty"),
        pytest.param("path,label\n", "lists no clips", id="only-a-header"),
        pytest.param("a.mp4 1\nb.mp4 cat\n", r"row 2: label 'cat' is not an integer", id="label-no-integer"),
        pytest.param("a.mp4 1.0\n", r"row 1: label '1.0' is not an integer", id="label-float"),
        pytest.param("a.mp4\n", r"row 1: label '' is not an integer", id="no-label"),
        pytest.param("a.mp4 -2\n", r"row 1: label -2 is out of range", id="label-negative"),
        pytest.param("a.mp4 2147483648\n", r"row 1: .* out of range", id="label-too-large"),
        pytest.param("path,label,task\na.mp4,1,x\n", r"row 1: label 'task'", id="three-columns"),
        pytest.param("7\n", "row 1", id="label-alone"),
        pytest.param("a\0b 1\n", "binary file", id="binary"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, says: str) -> None:
    """Each mistake is named with its file and row."""
    csv = tmp_path / "clips.csv"
    csv.write_text(text)
    with pytest.raises(DataError, match=says) as error:
        read_clip_csv(csv)
    assert str(csv) in str(error.value)


def test_missing_csv_folder_and_clip(tmp_path: Path) -> None:
    """What does not exist is named, and what a folder is good for is said."""
    with pytest.raises(DataError, match="no such file"):
        read_clip_csv(tmp_path / "none.csv")
    with pytest.raises(DataError, match=re.escape("tools.shard")):
        read_clip_csv(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"video")
    csv = tmp_path / "clips.csv"
    csv.write_text("a.mp4 0\nmissing.mp4 1\n")
    with pytest.raises(DataError, match=r"clips.csv row 2: .*missing.mp4 does not exist"):
        FileDataset(csv)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


@pytest.mark.timeout(10)  # what this prevents is waiting for ever
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(os.mkfifo, id="pipe"),
        pytest.param(_socket, id="socket"),
        pytest.param(lambda path: path.symlink_to("/dev/null"), id="device"),
    ],
)
def test_special_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make) -> None:  # type: ignore[no-untyped-def]
    """A list or a clip that is no regular file is named and never opened."""
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make(Path("clips.csv"))
    with pytest.raises(DataError, match=r"clips\.csv is no regular file .*; give a CSV"):
        open_dataset("clips.csv")
    make(Path("a.mp4"))
    Path("list.csv").write_text("a.mp4 0\n")
    with pytest.raises(DataError, match=r"list\.csv row 1: \./a\.mp4 does not exist or is no file"):
        open_dataset("list.csv")


def test_file_dataset(tmp_path: Path) -> None:
    """Bytes, labels and places of the clips of a CSV, also after pickling."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"first")
    (tmp_path / "sub" / "b c.mp4").write_bytes(b"second!")
    csv = tmp_path / "clips.csv"
    csv.write_text(f"a.mp4 5\n{tmp_path}/sub/b c.mp4 6\n")
    clips = open_dataset(csv)
    assert isinstance(clips, FileDataset)
    clips = pickle.loads(pickle.dumps(clips))
    assert len(clips) == 2
    assert [clips.read(i) for i in range(2)] == [b"first", b"second!"]
    np.testing.assert_array_equal(clips.labels, [5, 6])
    np.testing.assert_array_equal(clips.length, [5, 7])
    np.testing.assert_array_equal(clips.frames, [-1, -1])
    assert clips.describe(1) == f"{csv} row 2: {tmp_path}/sub/b c.mp4"
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(DataError, match=r"row 1: .*a.mp4: cannot be read"):
        clips.read(0)


def test_open_dataset_refuses_other_things(tmp_path: Path) -> None:
    """Neither a shard folder nor a CSV: the remedy is in the sentence."""
    with pytest.raises(DataError, match="no such file or folder"):
        open_dataset(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"tools\.shard run"):
        open_dataset(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"video")
    with pytest.raises(DataError, match="neither"):
        open_dataset(tmp_path / "a.mp4")
