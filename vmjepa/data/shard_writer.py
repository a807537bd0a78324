"""Writing one WebDataset tar with the index that DALI's reader wants, every byte a function of what is added.

Members per clip, in this order: KEY.EXT (the video), KEY.cls (label, ASCII), KEY.i32 (label, frames, width, height and
ordinal as packed little-endian int32, which DALI reads without a parser), KEY.json (everything else).
Index format: NVIDIA DALI's wds2idx, v1.2 (one line per sample: extension, data offset, size, name of each member).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from vmjepa.data.probe_video import ClipInfo

_BLOCK = 512
_RECORD = 10240  # tar pads archives to whole records
_PIECE = 1 << 20
MAX_CLIP_BYTES = (1 << 33) - 1  # USTAR's size field has 11 octal digits


class ClipChangedError(Exception):
    """The video's bytes are no longer those that were checked."""


def _padding(size: int) -> int:
    return -size % _BLOCK


class ShardWriter:
    """Writes a tar at `path`, to be published under `name`. Call `finish` when all is in, and `close` in any case."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.rows: list[dict[str, Any]] = []  # manifest rows, vmjepa.data.shards.MANIFEST_SCHEMA
        self.size = 0
        self._index: list[str] = []
        self._digest = hashlib.sha256()
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by close()

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def sidecars(ordinal: int, label: int, source: str, sha256: str, clip: ClipInfo) -> dict[str, bytes]:
        """The small members that follow the video, by extension."""
        facts = asdict(clip) | {"label": label, "source": source, "sha256": sha256}
        return {
            "cls": str(label).encode(),
            "i32": struct.pack("<5i", label, clip.frames, clip.width, clip.height, ordinal),
            "json": json.dumps(facts, sort_keys=True).encode(),
        }

    @staticmethod
    def sample_size(length: int, sidecars: dict[str, bytes]) -> int:
        """Bytes that a clip of `length` bytes takes in the tar."""
        return sum(_BLOCK + size + _padding(size) for size in [length, *map(len, sidecars.values())])

    def add(
        self, ordinal: int, video: BinaryIO, length: int, sha256: str, label: int, source: str, clip: ClipInfo
    ) -> None:
        """Appends a clip: `length` bytes read from `video`, copied in pieces.

        Raises ClipChangedError, leaving the tar as it was, when these bytes do not hash to `sha256`.
        """
        key = f"{ordinal:08d}"
        start, digest_before = self.size, self._digest.copy()
        self._write(self._header(f"{key}.{clip.ext}", length))
        offset = self.size
        payload = hashlib.sha256()
        left = length
        while left and (piece := video.read(min(left, _PIECE))):
            payload.update(piece)
            self._write(piece)
            left -= len(piece)
        if left or payload.hexdigest() != sha256 or video.read(1):
            self._file.seek(start)
            self._file.truncate()
            self.size, self._digest = start, digest_before
            raise ClipChangedError(source)
        self._write(bytes(_padding(length)))

        members = [(clip.ext, offset, length, f"{key}.{clip.ext}")]
        for ext, data in self.sidecars(ordinal, label, source, sha256, clip).items():
            self._write(self._header(f"{key}.{ext}", len(data)))
            members.append((ext, self.size, len(data), f"{key}.{ext}"))
            self._write(data + bytes(_padding(len(data))))
        self._index.append(" ".join(f"{ext} {at} {size} {name}" for ext, at, size, name in members))
        place = {"key": key, "shard": self.name, "offset": offset, "length": length}
        self.rows.append(place | asdict(clip) | {"label": label, "sha256": sha256, "source": source})

    def finish(self) -> str:
        """Ends the archive and puts it on the disk. Returns the tar's hex SHA-256."""
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self.size % _RECORD))
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()

    def index(self) -> str:
        """The text of DALI's index file for this tar."""
        return "".join(line + "\n" for line in [f"v1.2 {len(self._index)}", *self._index])

    def _header(self, name: str, size: int) -> bytes:
        info = tarfile.TarInfo(name)  # defaults: owner 0, mtime 0, mode 0644
        info.size = size
        return info.tobuf(tarfile.USTAR_FORMAT)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)
