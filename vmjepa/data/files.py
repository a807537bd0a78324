"""Loose video files named by a CSV, V-JEPA's own input: one `path label` per row, no sharding.

clips = FileDataset("train.csv")        # same interface as vmjepa.data.shards.ShardDataset
data = clips.read(0)                    # the file's bytes
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vmjepa.errors import DataError

_LABEL = re.compile(r"[+-]?\d+")
_QUOTED = re.compile(r'"((?:[^"]|"")*)"[ \t]*[ \t,][ \t]*(.*)')
_HEADERS = ({"path", "file", "filename", "file_name", "video", "video_path", "clip"}, {"label", "class", "target"})
_INT32_MAX = 2**31 - 1


def printable(text: str) -> str:
    """`text` as valid UTF-8: bytes of a file name that are not UTF-8 appear as \\udcXX escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def refuse_special(path: Path, remedy: str) -> None:
    """Raises DataError where `path` is a pipe, a device or a socket: opening one may wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise DataError(f"{path} is no regular file (a pipe, device or socket); {remedy}")


def _split_row(line: str) -> tuple[str, str]:
    """Path and label text of one row: the label is the last field, so that the path may hold spaces and commas."""
    quoted = _QUOTED.fullmatch(line)
    if quoted:
        return quoted[1].replace('""', '"'), quoted[2].strip('"')
    cut = max(line.rfind(separator) for separator in " \t,")
    if cut < 0:
        return line, ""
    return line[:cut].rstrip(" \t").removesuffix(",").rstrip(" \t"), line[cut + 1 :].strip('"')


def read_clip_csv(path: str | Path) -> list[tuple[int, str, int]]:
    """The clips of a list: (row number counted from 1, path, label), relative paths joined to the CSV's folder.

    Raises DataError as `read_rows` does. Paths that do not exist are not looked for.
    """
    folder = Path(path).parent
    return [(row, os.path.join(folder, name), label) for row, name, label in read_rows(path)]


def read_rows(path: str | Path) -> list[tuple[int, str, int]]:
    """Reads the rows of a clip list: (row number counted from 1, path as written, label).

    A row is `path label` (V-JEPA), `path,label` or `"path",label`; the last field is the label, an integer (-1 = none),
    so unquoted paths may hold spaces and commas. Blank rows are skipped, and so is a first row such as `path,label`.

    Raises DataError: no such file, a pipe or device, no clips in it, a row without a path or whose label is no 32-bit
    integer >= -1.
    """
    path = Path(path)
    refuse_special(path, "give a CSV with one `path label` per row")
    try:
        # Names in other encodings survive as surrogates, the way Python passes them to the file system.
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give a CSV with one `path label` per row") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, not a CSV; make shards of it with `python -m tools.shard run`") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if "\0" in text:
        raise DataError(f"{path} is a binary file, not a CSV; give a text file with one `path label` per row")

    clips: list[tuple[int, str, int]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip(" \t\r")
        if not line:
            continue
        name, label = _split_row(line)
        if number == 1 and name.lower() in _HEADERS[0] and label.lower() in _HEADERS[1]:
            continue
        if not name:
            raise DataError(f"{path} row {number}: {printable(line)!r} is not `path label`; write both on every row")
        if not _LABEL.fullmatch(label):
            raise DataError(
                f"{path} row {number}: label {printable(label)!r} is not an integer; "
                "end every row with the class number (-1 when there is none)"
            )
        if not -1 <= int(label) <= _INT32_MAX:
            raise DataError(f"{path} row {number}: label {label} is out of range; use 0, 1, 2, … or -1 for none")
        clips.append((number, name, int(label)))
    if not clips:
        raise DataError(f"{path} lists no clips; write one `path label` per row")
    return clips


class FileDataset:
    """The clips of a CSV, with the interface of `ShardDataset`; all of them count as one shard.

    Nothing is decoded on opening, so frames, fps, width, height are unknown: -1 (fps 0).

    Raises DataError: whatever `read_clip_csv` raises, and a row whose file does not exist.
    """

    shard_names: tuple[str, ...] = ("",)
    label_names: dict[str, int] = {}  # noqa: RUF012 - a CSV has numbers only

    def __init__(self, csv: str | Path) -> None:
        self.path = Path(csv)
        rows = read_clip_csv(self.path)
        self._rows = np.array([row for row, _, _ in rows], dtype=np.int64)
        self._paths = [path for _, path, _ in rows]
        n = len(rows)
        self.labels = np.array([label for _, _, label in rows], dtype=np.int32)
        self.frames = np.full(n, -1, np.int32)
        self.fps = np.zeros(n, np.float64)
        self.width = np.full(n, -1, np.int32)
        self.height = np.full(n, -1, np.int32)
        self.rotation = np.zeros(n, np.int32)
        self.shard_index = np.zeros(n, np.int32)
        self.offset = np.zeros(n, np.int64)
        self.length = np.array(self._sizes(), dtype=np.int64)

    def _sizes(self) -> list[int]:
        with ThreadPoolExecutor(16) as pool:  # on a network file system each stat waits for the server
            sizes = list(pool.map(_size, self._paths, chunksize=256))
        for i, size in enumerate(sizes):
            if size < 0:
                raise DataError(f"{self.describe(i)} does not exist or is no file; correct the path or remove the row")
        return sizes

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, i: int) -> bytes:
        """The bytes of clip `i`. Raises DataError when the file cannot be read."""
        try:
            return Path(self._paths[i]).read_bytes()
        except OSError as error:
            raise DataError(
                f"{self.describe(i)}: cannot be read ({error.strerror}); restore the file or remove the row"
            ) from None

    def verify(self, i: int) -> None:
        """A CSV records no checksums, so this only proves that the file can be read."""
        self.read(i)

    def describe(self, i: int) -> str:
        """Where clip `i` comes from, for messages: "train.csv row 12: clips/a.mp4"."""
        return f"{self.path} row {self._rows[i]}: {self.source(i)}"

    def source(self, i: int) -> str:
        """The file's path, printable."""
        return printable(self._paths[i])

    def codec(self, i: int) -> str:
        """Unknown before decoding: an empty string."""
        return ""


def _size(path: str) -> int:
    """Size of a regular file in bytes, -1 when there is none."""
    try:
        return os.path.getsize(path) if os.path.isfile(path) else -1
    except OSError:
        return -1
