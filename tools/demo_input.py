"""The user's own videos as input of the demo: one set, or a labelled training and test set."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from tools.shard.inputs import Clip, list_input
from vmjepa.errors import storage_error

TEST_NAMES = ("test", "val", "validation")
_ONE_IN = 5  # one video of a class in so many becomes a test video
_NOWHERE = Path(os.devnull)  # no folder inside the videos is left out


@dataclass(frozen=True)
class VideoSets:
    """What the shard tool is to pack. test and classes are empty where no probe is possible, for the reason given."""

    train: Path
    test: Path | None
    classes: list[str]
    why_no_probe: str = ""


Labelled = list[tuple[Clip, str]]
"""Clips with the names of their classes."""


def sort_videos(folder: Path) -> dict[str, Labelled]:
    """Understands `folder`: train/ and test/ with class folders in each, class folders, or any other videos.

    Class folders without a split are split by a hash of each video's name: a fifth of each class is for the test, at
    least one video where a class has two. Videos outside class folders are in neither part. Writes nothing.

    Raises:
        DataError: nothing in the folder.
    """
    test = next((folder / name for name in TEST_NAMES if (folder / name).is_dir()), None)
    if test is not None and (folder / "train").is_dir():
        return {"train": _labelled(folder / "train"), "test": _labelled(test)}
    return _split(_labelled(folder))


def find_sets(folder: Path, lists: Path) -> VideoSets:
    """What to pack of `folder`, as `sort_videos` finds it; the lists of clips are written to the folder `lists`.

    Raises:
        DataError: nothing in the folder.
    """
    parts = sort_videos(folder)
    classes = sorted({name for clips in parts.values() for _, name in clips})
    trained = {name for _, name in parts["train"]}
    if len(trained) < 2 or not parts["test"]:
        why = (
            "a probe needs at least two class folders"
            if len(classes) < 2
            else "no class has two videos, one to train on and one to test"
        )
        return VideoSets(folder, None, [], why)
    lists.mkdir(parents=True, exist_ok=True)
    for part, clips in parts.items():
        _write_csv(lists / f"{part}.csv", clips, classes)
    return VideoSets(lists / "train.csv", lists / "test.csv", classes)


def _labelled(folder: Path) -> Labelled:
    """The clips in class folders with their class; none where the folder is flat."""
    listing = list_input(folder, "auto", exclude=_NOWHERE)
    names = {number: name for name, number in listing.labels.items()}
    return [(clip, names[clip.label]) for clip in listing.clips if clip.label >= 0]


def _split(clips: Labelled) -> dict[str, Labelled]:
    parts: dict[str, Labelled] = {"train": [], "test": []}
    for name in sorted({name for _, name in clips}):
        members = sorted(
            (c for c in clips if c[1] == name), key=lambda c: hashlib.sha256(c[0].source.encode()).digest()
        )
        tests = max(len(members) // _ONE_IN, min(1, len(members) - 1))
        parts["test"] += members[:tests]
        parts["train"] += members[tests:]
    return parts


def _write_csv(path: Path, clips: Labelled, classes: list[str]) -> None:
    number = {name: i for i, name in enumerate(classes)}
    rows = []
    for clip, name in clips:
        quoted = os.path.abspath(clip.path).replace('"', '""')
        rows.append(f'"{quoted}",{number[name]}\n')
    try:
        path.write_text("".join(rows), encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise storage_error(error, f"writing {path}") from error
