"""Reading a shard dataset: a folder of WebDataset tars beside a manifest that knows where every clip's bytes lie.

    clips = open_dataset("shards/")         # or a CSV: see vmjepa.data.files
    data = clips.read(7)                    # encoded bytes, for a decoder
    clips.labels[7], clips.frames[7], clips.describe(7)

Folder: shard-000000.tar (+ .idx for DALI's webdataset reader), manifest.parquet, quarantine.csv, dataset.json.
The tars are written by vmjepa.data.shard_writer, the folder by `python -m tools.shard run`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vmjepa.data.files import FileDataset, refuse_special
from vmjepa.errors import DataError

FORMAT = "vmjepa-shards"
VERSION = 1
SUMMARY = "dataset.json"
MANIFEST = "manifest.parquet"
QUARANTINE = "quarantine.csv"

MANIFEST_SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # 8 digits: the clip's position in the packing order
        ("shard", pa.string()),  # file name of the tar
        ("offset", pa.int64()),  # of the video payload in the tar, bytes
        ("length", pa.int64()),  # of the video payload, bytes
        ("ext", pa.string()),
        ("frames", pa.int32()),  # counted by decoding all of them
        ("fps", pa.float64()),  # 0 when unknown
        ("width", pa.int32()),  # of the decoded frames, before rotation
        ("height", pa.int32()),
        ("rotation", pa.int32()),  # degrees, counter-clockwise, as PyAV's VideoFrame.rotation
        ("codec", pa.string()),
        ("pix_fmt", pa.string()),
        ("label", pa.int32()),  # -1 = none
        ("sha256", pa.string()),  # of the video payload, hex
        ("source", pa.string()),  # path as given in the CSV, or relative to the packed folder
    ]
)

_SUMMARY_ENTRIES = {
    "samples": int,
    "frames": int,
    "bytes": int,
    "quarantined": dict,  # reason -> files
    "labels": dict,  # name -> number
    "shards": list,
    "manifest_sha256": str,
    "options": dict,
}
_JSON_NAMES = {int: "integer", str: "text", dict: "JSON object", list: "list"}
_SHARD_ENTRIES = {"name": str, "size": int, "sha256": str, "samples": int}
_REMEDY = "pack it again with `python -m tools.shard run`, or copy the whole folder again"


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_summary(folder: Path) -> dict[str, Any]:
    """The contents of dataset.json, every entry of which is there and of its type.

    Raises DataError when the file is missing, damaged, incomplete or of another version.
    """
    path = folder / SUMMARY
    refuse_special(path, _REMEDY)
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {folder} is no finished shard dataset; {_REMEDY}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); {_REMEDY}") from None
    if not isinstance(summary, dict) or summary.get("format") != FORMAT:
        raise DataError(f"{path} does not describe a shard dataset; {_REMEDY}")
    if summary.get("version") != VERSION:
        raise DataError(f"{path} has version {summary.get('version')}, this program reads {VERSION}; pack it again")
    _check_entries(path, "", summary, _SUMMARY_ENTRIES)
    for i, shard in enumerate(summary["shards"]):
        _check_entries(path, f"shards[{i}]", shard, _SHARD_ENTRIES)
    return summary


def _check_entries(path: Path, place: str, found: Any, wanted: dict[str, type]) -> None:
    """Raises DataError naming the first entry of `wanted` that `found`, a part of dataset.json, does not have."""
    if not isinstance(found, dict):
        raise DataError(f"{path}: {place} is no JSON object; {_REMEDY}")
    for name, kind in wanted.items():
        key = f"{place}.{name}".removeprefix(".")
        if name not in found:
            raise DataError(f"{path}: the entry {key} is missing; {_REMEDY}")
        if not isinstance(found[name], kind):
            raise DataError(f"{path}: the entry {key} is no {_JSON_NAMES[kind]}; {_REMEDY}")


class ShardDataset:
    """The clips of a shard folder, in manifest order.

    Columns are numpy arrays with one entry per clip: labels (int32, -1 = none), frames (int32), fps (float64, 0 =
    unknown), width, height (int32 pixels, before rotation), rotation (int32 degrees), shard_index (int32 into
    `shard_names`), offset, length (int64 bytes of the video payload in its tar). `label_names` maps class names to
    numbers (empty for CSV input). Safe to share between threads; unpickling opens the folder again.

    Raises DataError on opening: a file of the dataset is missing, or a shard or the manifest is not the one recorded.
    """

    _OPEN_SHARDS = 64  # file descriptors held at once; datasets may have more shards than a process may open files

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        summary = read_summary(self.path)
        self.shard_names: tuple[str, ...] = tuple(shard["name"] for shard in summary["shards"])
        self.label_names: dict[str, int] = dict(summary["labels"])
        self._check_files(summary)
        table = self._read_manifest(summary)

        def column(name: str) -> np.ndarray:
            return table.column(name).to_numpy()

        self.labels = column("label")
        self.frames = column("frames")
        self.fps = column("fps")
        self.width = column("width")
        self.height = column("height")
        self.rotation = column("rotation")
        self.offset = column("offset")
        self.length = column("length")
        number = {name: i for i, name in enumerate(self.shard_names)}
        try:
            self.shard_index = np.array([number[name] for name in table.column("shard").to_pylist()], dtype=np.int32)
        except KeyError as error:
            raise DataError(f"{self.path / MANIFEST} names shard {error} that {SUMMARY} lacks; {_REMEDY}") from None
        sizes = np.array([shard["size"] for shard in summary["shards"]], dtype=np.int64)
        beyond = np.flatnonzero((self.offset < 0) | (self.offset + self.length > sizes[self.shard_index]))
        self._strings = table.select(["key", "source", "codec", "sha256"])
        if len(beyond):
            raise DataError(f"{self.describe(int(beyond[0]))} lies outside its shard; {_REMEDY}")
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        self._lock = Lock()

    def _check_files(self, summary: dict[str, Any]) -> None:
        for shard in summary["shards"]:
            path = self.path / shard["name"]
            try:
                size = path.stat().st_size
            except OSError:
                raise DataError(f"{path} is missing; {_REMEDY}") from None
            if size != shard["size"]:
                raise DataError(f"{path} has {size} bytes, {SUMMARY} says {shard['size']}; {_REMEDY}")

    def _read_manifest(self, summary: dict[str, Any]) -> pa.Table:
        path = self.path / MANIFEST
        refuse_special(path, _REMEDY)
        try:
            if file_sha256(path) != summary["manifest_sha256"]:
                raise DataError(f"{path} is not the one that {SUMMARY} was written with; {_REMEDY}")
            table = pq.read_table(path, schema=MANIFEST_SCHEMA)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read ({error}); {_REMEDY}") from None
        if len(table) != summary["samples"]:
            raise DataError(f"{path} lists {len(table)} clips, {SUMMARY} {summary['samples']}; {_REMEDY}")
        return table

    def __reduce__(self) -> tuple[type[ShardDataset], tuple[Path]]:
        return ShardDataset, (self.path,)

    def __len__(self) -> int:
        return len(self.labels)

    def _file(self, shard: int) -> BinaryIO:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = open(self.path / self.shard_names[shard], "rb", buffering=0)  # noqa: SIM115 - kept open
                self._files[shard] = file
                if len(self._files) > self._OPEN_SHARDS:
                    self._files.popitem(last=False)  # closed once no reader holds it any more
            self._files.move_to_end(shard)
            return file

    def read(self, i: int) -> bytes:
        """The encoded bytes of clip `i`. Raises DataError when the shard cannot give them all.

        A positioned read rather than a memory map: it releases the interpreter lock while the disk works, and a
        shard cut short under our feet is an error here, not a SIGBUS.
        """
        length, offset = int(self.length[i]), int(self.offset[i])
        try:
            file = self._file(int(self.shard_index[i]))
            data = os.pread(file.fileno(), length, offset)
            while len(data) < length and (more := os.pread(file.fileno(), length - len(data), offset + len(data))):
                data += more  # Linux gives at most 2 GiB per call
        except OSError as error:
            raise DataError(f"{self.describe(i)} cannot be read ({error.strerror}); {_REMEDY}") from None
        if len(data) != length:
            raise DataError(f"{self.describe(i)}: the shard ends after {len(data)} of {length} bytes; {_REMEDY}")
        return data

    def verify(self, i: int) -> None:
        """Raises DataError when the bytes of clip `i` are not the ones the manifest was written for."""
        if hashlib.sha256(self.read(i)).hexdigest() != self._strings["sha256"][i].as_py():
            raise DataError(f"{self.describe(i)}: its bytes do not match the manifest's sha256; {_REMEDY}")

    def describe(self, i: int) -> str:
        """Where clip `i` lies, for messages: "shards/shard-000003.tar key 00000123 (source walking/a.mp4)"."""
        shard = self.path / self.shard_names[self.shard_index[i]]
        return f"{shard} key {self._strings['key'][i].as_py()} (source {self.source(i)})"

    def source(self, i: int) -> str:
        """The clip's path as it was given to the shard tool."""
        return self._strings["source"][i].as_py()

    def codec(self, i: int) -> str:
        """FFmpeg's name of the codec, such as "h264"."""
        return self._strings["codec"][i].as_py()


def open_dataset(path: str | Path) -> ShardDataset | FileDataset:
    """Opens a shard folder or a CSV of loose files, whichever `path` is. Raises DataError when it is neither."""
    path = Path(path)
    if (path / SUMMARY).is_file():
        return ShardDataset(path)
    if path.is_dir():
        raise DataError(
            f"{path} holds no {SUMMARY}, so it is no finished shard dataset; "
            f"pack its videos with `python -m tools.shard run {path} OUTPUT` and give OUTPUT"
        )
    if path.suffix.lower() in {".csv", ".txt"}:
        return FileDataset(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give a shard folder or a CSV of `path label` rows")
    raise DataError(f"{path} is neither a shard folder nor a .csv file; give one of these")
