"""What the tests of the shard tool share: a folder of videos to pack, the command, and a look at what came out."""

from __future__ import annotations

import csv
import hashlib
import io
import subprocess
import sys
from pathlib import Path

import av

from tests.clip_maker import make_clip
from vmjepa.data.shards import QUARANTINE

ROOT = Path(__file__).resolve().parent.parent


def make_videos(folder: Path) -> Path:
    """Twelve videos and three bad files in two class folders."""
    for i in range(12):
        path = folder / ("run" if i % 2 else "jump") / f"{i}.webm"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(make_clip(5 + i % 4, seed=i))
    (folder / "run" / "page.mp4").write_text("<html>404</html>")
    (folder / "run" / "empty.mp4").touch()
    (folder / "jump" / "cut.webm").write_bytes(make_clip(20)[:-700])
    return folder


def prolonged(video: bytes, frames: int) -> bytes:
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


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def quarantine(output: Path) -> dict[str, dict[str, str]]:
    """The rows of the quarantine list, by path."""
    with open(output / QUARANTINE, encoding="utf-8", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def shard_command(*arguments: object) -> list[str]:
    """The shard tool as a command."""
    return [sys.executable, "-m", "tools.shard", *map(str, arguments)]


def run_shard(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs it from the repository root."""
    return subprocess.run(shard_command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=120)
