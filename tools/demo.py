"""The whole chain on this machine's CPU, in minutes: videos, shards, pretraining, frozen probes, curves.

    make demo                        # makes its own labelled videos first
    make demo VIDEOS=my/videos       # a folder per class (or train/ and test/ with class folders): pretrains and probes
                                     # any other folder of videos: pretrains
    .venv/bin/python -m tools.demo --out demo

Each step is one of the public commands, printed before it runs. Run again, it goes on where it stopped, or starts anew
when code, configs or videos have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from tools.demo_input import VideoSets, find_sets, sort_videos
from tools.demo_videos import CLASSES, SUMMARY
from vmjepa.errors import UserError, handle_errors
from vmjepa.evals.report import as_table, from_json
from vmjepa.plots import draw_curves, read_metrics
from vmjepa.run_dir import read_json, write_atomic

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN, EVALUATE = ROOT / "configs/pretrain/demo.yaml", ROOT / "configs/evals/demo.yaml"
MARK = "demo.json"  # says that the folder is a demo's, what it was made from, and which entries the demo makes
_OWNER, _OWNER_KEY = "vmjepa tools.demo", "made by"
_RESULTS = ("shards", "run", "curves.png")
_OWN_VIDEOS = ("videos", "videos.unfinished")
_SHORT_SIDE = (
    "128"  # the user's videos are shrunk to this: the demo looks at 48 pixels, and decoding is most of the work
)

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


class Demo:
    """One demo under the folder `out`. videos: the user's own, or None."""

    def __init__(self, out: Path, videos: Path | None) -> None:
        self.out, self.videos = out, videos
        self.run_dir, self.results = out / "run", out / "run/evals/demo/results.json"
        self.entries = [*_RESULTS, "lists"] if videos else [*_RESULTS, *_OWN_VIDEOS]
        self.began = time.monotonic()

    def run(self) -> None:
        """All steps, those already done left out."""
        self._check_input()
        self._claim_folder()
        sets = self._videos()
        self._step("Packing the videos into shards")
        encode = ["--short-side", _SHORT_SIDE] if self.videos else []
        self._call(["python", "-m", "tools.shard", "run", str(sets.train), str(self.out / "shards/train"), *encode])
        if sets.test:
            self._call(["python", "-m", "tools.shard", "run", str(sets.test), str(self.out / "shards/test"), *encode])
        self._pretrain()
        if sets.test:
            self._evaluate(sets)
        self._report(sets)

    def _check_input(self) -> None:
        """Refuses videos that cannot be used, before anything is written or removed."""
        if self.videos is None:
            return
        if not self.videos.is_dir():
            raise UserError(
                f"{self.videos}: no such folder; give a folder of videos, with a folder per class for a probe"
            )
        videos, out = self.videos.resolve(), self.out.resolve()
        if out.is_relative_to(videos):  # the demo would take its own output for videos
            raise UserError(f"{self.out} lies inside the videos {self.videos}; choose another folder with OUT=folder")
        if videos.is_relative_to(out):  # starting anew would remove the videos
            raise UserError(f"the videos {self.videos} lie inside {self.out}; choose another folder with OUT=folder")
        sort_videos(self.videos)

    def _claim_folder(self) -> None:
        """Makes `out` this demo's folder, empty unless it was made from the same code, configs and videos.

        Removes only what an earlier demo says it made; a folder that holds anything else is refused.
        """
        fingerprint = _fingerprint(self.videos)
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            mark = _read_mark(self.out)
            if mark["fingerprint"] == fingerprint:
                console.print(f"{self.out} was made from the same code, configs and videos: going on from there")
                return
            made = [MARK, *mark["entries"]]
            foreign = sorted(path.name for path in self.out.iterdir() if path.name not in made)
            if foreign:
                raise UserError(
                    f"{self.out} was made from other code, configs or videos, and holds what no demo made "
                    f"({', '.join(foreign[:3])}{', …' if foreign[3:] else ''}); move that away, or choose another "
                    "folder with OUT=folder"
                )
            console.print(f"{self.out} was made from other code, configs or videos: starting anew")
            self._write_mark("", mark["entries"])  # stopped half way, this is no demo to go on from
            for name in mark["entries"]:
                _remove(self.out / name)
        self.out.mkdir(parents=True, exist_ok=True)
        self._write_mark(fingerprint, self.entries)

    def _write_mark(self, fingerprint: str, entries: list[str]) -> None:
        content = {_OWNER_KEY: _OWNER, "fingerprint": fingerprint, "entries": entries}
        write_atomic(self.out / MARK, json.dumps(content) + "\n")

    def _videos(self) -> VideoSets:
        if self.videos:
            return find_sets(self.videos, self.out / "lists")
        videos = self.out / "videos"
        self._step("Making labelled videos: photographs under six camera motions")
        if (videos / SUMMARY).is_file():
            console.print(f"done before: {videos}")
        else:
            self._call(["python", "-m", "tools.demo_videos", str(videos)])
        return VideoSets(videos / "train", videos / "test", list(CLASSES))

    def _pretrain(self) -> None:
        self._step("Pretraining a VideoMamba encoder with V-JEPA")
        status = self.run_dir / "status.json"
        if status.is_file() and read_json(status)["state"] == "done":
            console.print(f"done before: {self.run_dir}")
            return
        devices = ["--devices", "cpu", "cpu"] if len(os.sched_getaffinity(0)) > 1 else []
        data = f"data.datasets=[{json.dumps(str(self.out / 'shards/train'))}]"
        config = os.path.relpath(PRETRAIN)
        self._call(["vmjepa", "pretrain", config, data, f"logging.folder={self.run_dir}", *devices])

    def _evaluate(self, sets: VideoSets) -> None:
        self._step("Probing the frozen encoder, and a random one beside it")
        if self.results.is_file():
            console.print(f"done before: {self.results}")
            report = read_json(self.results)
            console.print(as_table(*from_json(report), title="", replaced=report["replaced_clips"]))
            return
        overrides = [
            f"pretrain.folder={self.run_dir}",
            *(f"data.dataset_{key}=[{json.dumps(str(self.out / 'shards' / part))}]" for key, part in
              (("train", "train"), ("val", "test"))),
        ]  # fmt: skip
        if self.videos:
            overrides.append(f"data.num_classes={len(sets.classes)}")
        self._call(["vmjepa", "evaluate", os.path.relpath(EVALUATE), *overrides])

    def _report(self, sets: VideoSets) -> None:
        metrics = read_metrics(self.run_dir / "metrics.jsonl")
        curves = self.out / "curves.png"
        draw_curves(metrics, curves, f"V-JEPA pretraining, {metrics[-1]['step']} steps")
        self._step("What came out")
        console.print(f"prediction skill   {_course(metrics, 'skill')}   (0: knows the batch mean, 1: perfect)")
        console.print(f"rank of features   {_course(metrics, 'rank_content', 1)}   (position means removed)")
        if sets.test:
            for line in _findings(read_json(self.results)):
                console.print(line)
        else:
            console.print(f"probe              not possible: {sets.why_no_probe}")
        console.print(f"curves             {curves}", soft_wrap=True)
        console.print(
            f"TensorBoard        {_shown('tensorboard')} --logdir {shlex.quote(str(self.run_dir))}", soft_wrap=True
        )
        console.print(f"time               {time.monotonic() - self.began:.0f} s")

    def _step(self, title: str) -> None:
        console.print(f"\n[bold]{title}[/bold]  [dim]({time.monotonic() - self.began:.0f} s)[/dim]")

    def _call(self, words: list[str]) -> None:
        """Runs a program of this environment; a failure ends the demo with that command's exit code."""
        program = Path(sys.executable).with_name(words[0])
        if not program.exists():
            raise UserError(f"{program} is missing; run `make demo`, which completes the environment")
        console.print(f"$ {_shown(words[0])} {shlex.join(words[1:])}", style="cyan", markup=False, soft_wrap=True)
        try:
            code = subprocess.run([str(program), *words[1:]], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode
        except KeyboardInterrupt:
            print("stopped; run the same command again to go on", file=sys.stderr)
            sys.exit(130)
        if code:
            print(f"error: the demo stopped at this command (exit code {code}); see its message above", file=sys.stderr)
            sys.exit(code if code > 0 else 1)


def _shown(program: str) -> str:
    """A program of this environment as the user would type it."""
    path = Path(sys.executable).with_name(program)
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _read_mark(out: Path) -> dict[str, Any]:
    """The fingerprint and the entries of the demo that made `out`; UserError where no demo did."""
    with suppress(OSError, ValueError):
        mark = json.loads((out / MARK).read_bytes())
        if (
            isinstance(mark, dict)
            and mark.get(_OWNER_KEY) == _OWNER
            and isinstance(mark.get("fingerprint"), str)
            and isinstance(mark.get("entries"), list)
            and all(name in (*_RESULTS, *_OWN_VIDEOS, "lists") for name in mark["entries"])
        ):
            return mark
    raise UserError(f"{out} exists and is not a demo's folder; choose another one with OUT=folder")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fingerprint(videos: Path | None) -> str:
    """Hash of all that the demo's output depends on: this project's code and configs, and the user's files."""
    digest = hashlib.sha256()
    sources = sorted(path for part in ("vmjepa", "tools") for path in (ROOT / part).rglob("*.py"))
    for path in [*sources, PRETRAIN, EVALUATE]:
        digest.update(f"{os.path.relpath(path, ROOT)}\0".encode() + path.read_bytes())
    if videos:
        for path in sorted(videos.rglob("*")):
            facts = path.lstat()
            digest.update(f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _course(metrics: list[dict[str, Any]], key: str, digits: int = 2) -> str:
    """Means over the first and the last tenth of the logged values: single batches are noisy."""
    values = [row[key] for row in metrics if row.get(key) is not None]
    if not values:
        return "not logged"
    tenth = max(1, len(values) // 10)
    first, last = (sum(part) / tenth for part in (values[:tenth], values[-tenth:]))
    return f"{first:.{digits}f} → {last:.{digits}f}"


def _findings(results: dict[str, Any]) -> list[str]:
    """The probes in plain lines, good or bad; the full table stands above."""
    lines = [f"{probe + ' probe':18s} {found}" for probe, found in results["verdict"].items()]
    for row in results["summary"]:
        if row["single_frame"]:
            found, chance = 100 * row["mean"], 100 * results["chance"]["uniform"]
            lines.append(f"one frame only     {row['probe']} {found:.0f} %, guessing {chance:.0f} %")
    if not any(found.startswith("better") for found in results["verdict"].values()):
        worse = any(found.startswith("worse") for found in results["verdict"].values())
        what = "Worse than a random encoder" if worse else "No gain over a random encoder"
        lines.append(f"{what}: small runs like this one do that; it is no evidence about longer ones.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="your own videos instead of generated ones")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything the demo makes")
    arguments = parser.parse_args()
    with handle_errors():
        Demo(arguments.out, arguments.videos).run()


if __name__ == "__main__":
    main()
