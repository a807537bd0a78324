"""Packs videos into WebDataset shards with a manifest, every clip proved by decoding all of it.

    python -m tools.shard run videos/ shards/                     # a folder per class, or a flat folder
    python -m tools.shard run train.csv shards/ --workers 8       # V-JEPA's CSV: `path label` per row
    python -m tools.shard run train.csv small/ --codec h264 --short-side 256 --gop 16
    python -m tools.shard verify shards/                          # do the bytes still match the manifest?

The same command after an interruption goes on where the last one stopped. See vmjepa/data/shards.py for the files and
vmjepa/data/probe_video.py for what sends a clip to quarantine.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from tools.shard.encode import EncodeOptions
from tools.shard.pack import PackOptions, Summary, pack
from tools.shard.progress import Progress
from vmjepa.data.shards import QUARANTINE, ShardDataset, file_sha256, read_summary
from vmjepa.errors import ConfigError, DataError, handle_errors

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None, no_args_is_help=True)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "256MB", "1GiB", "1000". Raises ConfigError."""
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or not int(match[1]):
        raise ConfigError(f"--shard-size {text!r} is no size; write for example 256MB or 1GiB")
    return int(match[1]) * _UNITS[match[2].upper()]


@app.command()
def run(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="CSV of `path label` rows, or a folder of videos.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder for the shards: new, empty or unfinished.")],
    layout: Annotated[
        Literal["auto", "classes", "flat"], typer.Option(help="Folders: does the first level name the classes?")
    ] = "auto",
    shard_size: Annotated[str, typer.Option(help="Target size of a tar.")] = "256MB",
    shuffle: Annotated[bool, typer.Option(help="Pack in random order, so that a shard holds a mixture.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of that order.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Decoding processes; 0 = one per usable core.")] = 0,
    clip_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds a clip may take, plus one per MiB; times 10 when encoding.")
    ] = 120.0,
    codec: Annotated[
        Literal["h264", "hevc", "vp8", "vp9", "av1", "mjpeg"] | None,
        typer.Option(help="Encode every clip anew (h264 when only the options below are given); drops sound."),
    ] = None,
    short_side: Annotated[int | None, typer.Option(min=16, help="Encode; shrink the short side to N pixels.")] = None,
    gop: Annotated[int | None, typer.Option(min=1, help="Encode; a key frame every N frames.")] = None,
) -> None:
    """Pack INPUT into OUTPUT.

    Example: python -m tools.shard run videos/ shards/ --workers 8
    """
    encode = None
    if codec or short_side or gop:
        encode = EncodeOptions(codec or "h264", short_side, gop)
    options = PackOptions(layout, shuffle, seed, parse_size(shard_size), encode)
    progress, began = Progress(), time.monotonic()
    workers = workers or len(os.sched_getaffinity(0))
    try:
        summary = pack(source, output, options, workers, clip_timeout, progress)
    except KeyboardInterrupt:
        print(f"stopped; run the same command again to go on (finished shards are in {output})", file=sys.stderr)
        sys.exit(130)
    _report(summary, output, time.monotonic() - began, progress.rate())


def _report(summary: Summary, output: Path, seconds: float, rate: float) -> None:
    dataset = summary.dataset
    console = Console(soft_wrap=True, highlight=False, markup=False)
    text = f"{dataset['samples']} clips, {dataset['frames']} frames, {dataset['bytes'] / 1e6:.1f} MB"
    text += f" in {len(dataset['shards'])} shards"
    if summary.already_complete:
        console.print(f"{output} is already complete: {text}")
    else:
        reused = f", {summary.reused_shards} shards of an earlier run kept" if summary.reused_shards else ""
        console.print(f"packed {text} ({seconds:.1f} s, {rate:.1f} clips/s{reused}) into {output}")
    if dataset["labels"]:
        console.print("classes: " + ", ".join(f"{number} {name}" for name, number in dataset["labels"].items()))
    if summary.refused:
        reasons = ", ".join(f"{reason} {count}" for reason, count in summary.refused.most_common())
        warning = f"warning: {summary.refused.total()} files quarantined ({reasons}); see {output / QUARANTINE}"
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(warning, style="yellow")


@app.command()
def verify(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A finished shard dataset.")]) -> None:
    """Check that every byte of a shard dataset is the one that was packed.

    Example: python -m tools.shard verify shards/
    """
    clips = ShardDataset(folder)
    for shard in read_summary(folder)["shards"]:
        if file_sha256(folder / shard["name"]) != shard["sha256"]:
            for i in (clips.shard_index == clips.shard_names.index(shard["name"])).nonzero()[0]:
                clips.verify(int(i))
            raise DataError(f"{folder / shard['name']}: its bytes changed since it was packed; pack it again")
    print(f"{folder}: {len(clips)} clips in {len(clips.shard_names)} shards, all bytes as packed")


if __name__ == "__main__":
    with handle_errors():
        app()
