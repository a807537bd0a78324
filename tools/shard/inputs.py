"""What to pack: the clips of a CSV, of class folders or of a flat folder, in an order no file system can change."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vmjepa.data.files import printable, read_rows
from vmjepa.errors import DataError, storage_error

LAYOUTS = ("auto", "classes", "flat")
OUTSIDE_CLASSES = "outside the class folders"
# Only to tell class folders from a flat folder; whether a file is a video is decided by decoding it.
_VIDEO_SUFFIX = re.compile(r"\.(mp4|m4v|mov|mkv|webm|avi|mpe?g|m?2?ts|wmv|flv|ogv|3gp|vob|gif|mxf|asf)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip to pack. `row` counts from 1 in the CSV or in the sorted listing of the folder."""

    row: int
    path: str  # to open
    source: str  # to record: as in the CSV, or relative to the folder; printable
    label: int
    size: int  # bytes, -1 when there is no such file
    refused: str = ""  # a reason to quarantine it without looking


@dataclass(frozen=True)
class Listing:
    """The clips of an input, how it was understood, and its class names (empty for a CSV)."""

    kind: str  # csv | classes | flat
    clips: list[Clip]
    labels: dict[str, int] = field(default_factory=dict)


def list_input(path: Path, layout: str, exclude: Path) -> Listing:
    """Lists the clips of `path`. Every regular file of a folder counts, but for dot files and what lies in `exclude`.

    layout: "classes" (the first folder level names the class; classes are numbered in sorted order), "flat" (no labels,
    all levels), or "auto": flat when videos lie at the top or there are no subfolders, otherwise classes.
    Raises DataError: no such input, nothing in it, a CSV that cannot be read, `path` and `exclude` are one folder.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give a CSV of `path label` rows or a folder with videos")
    if not path.is_dir():
        return Listing("csv", _csv_clips(path))
    if path.resolve() == exclude.resolve():
        raise DataError(f"{path} is both the input and the output; give another folder for the shards")
    names = sorted(_walk(path, exclude.resolve()))
    if not names:
        raise DataError(f"{path} holds no files; give a CSV of `path label` rows or a folder with videos")
    if layout == "auto":
        top = [name for name in names if b"/" not in name]
        videos_at_top = any(_VIDEO_SUFFIX.fullmatch(os.path.splitext(os.fsdecode(name))[1]) for name in top)
        layout = "flat" if videos_at_top or len(top) == len(names) else "classes"
    labels: dict[str, int] = {}
    clips = []
    for row, name in enumerate(names, start=1):
        text = os.fsdecode(name)
        label, refused = -1, ""
        if layout == "classes":
            if b"/" in name:
                label = labels.setdefault(printable(text.split("/")[0]), len(labels))
            else:
                refused = OUTSIDE_CLASSES
        full = os.path.join(path, text)
        clips.append(Clip(row, full, printable(text), label, _size(full), refused))
    if layout == "classes" and not labels:
        raise DataError(f"{path} has no class folders; put each class's videos in its own, or give --layout flat")
    return Listing(layout, clips, labels)


def _csv_clips(path: Path) -> list[Clip]:
    clips = []
    for row, name, label in read_rows(path):
        full = os.path.join(path.parent, name)
        clips.append(Clip(row, full, printable(name), label, _size(full)))
    return clips


def _walk(folder: Path, exclude: Path) -> Iterator[bytes]:
    """Paths of all files below `folder`, relative to it, as bytes (names need not be UTF-8). Links are followed."""

    def fail(error: OSError) -> None:
        raise storage_error(error, f"listing {folder}")

    seen = set()
    for where, folders, files in os.walk(os.fsencode(folder), onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(b".")]
        real = os.path.realpath(where)
        if real in seen or real == os.fsencode(exclude):
            folders.clear()
            continue
        seen.add(real)
        for name in files:
            full = os.path.join(where, name)
            if not name.startswith(b".") and (os.path.isfile(full) or not os.path.exists(full)):  # no pipes, no devices
                yield os.path.relpath(full, os.fsencode(folder))


def _size(path: str) -> int:
    try:
        return os.path.getsize(path) if os.path.isfile(path) else -1
    except OSError:
        return -1
