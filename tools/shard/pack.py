"""Packing: list, prove, write shards in order, publish. The shards depend on the input and the options alone.

Clips are proved in parallel, but written by this process in the order of the plan, so the number of workers changes
nothing. The plan's order is the listing's, or a shuffle of it that depends on the seed and the number of clips.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

import vmjepa
from tools.shard.encode import EncodeOptions
from tools.shard.inputs import Clip, Listing, list_input
from tools.shard.pool import WorkerPool
from tools.shard.progress import Progress
from tools.shard.store import CLIPS_SHA256, Store, shard_name
from vmjepa.data.files import printable
from vmjepa.data.probe_video import BadClipError, ClipInfo, open_clip
from vmjepa.data.shard_writer import ClipChangedError, ShardWriter
from vmjepa.data.shards import VERSION, read_summary
from vmjepa.errors import DataError, storage_error

CHANGED = "changed while being packed"
_ENCODING_TAKES = 10  # times as long as decoding, at most


@dataclass(frozen=True)
class PackOptions:
    """What the shards depend on, beside the input.

    layout: see list_input. shard_size: bytes of a tar; one clip may exceed it. encode: None = the bytes are copied.
    """

    layout: str = "auto"
    shuffle: bool = True
    seed: int = 0
    shard_size: int = 256 * 10**6
    encode: EncodeOptions | None = None


@dataclass(frozen=True)
class Summary:
    """What a run made or found: `dataset` is the contents of dataset.json, `refused` counts clips by reason."""

    dataset: dict[str, Any]
    refused: Counter[str]
    already_complete: bool = False
    reused_shards: int = 0


def pack(
    source: Path,
    output: Path,
    options: PackOptions,
    workers: int = 1,
    clip_seconds: float = 120.0,
    progress: Progress | None = None,
) -> Summary:
    """Makes the shard dataset of `source` in `output`, or finishes it.

    workers: processes that decode. clip_seconds: what a clip may take, plus a second per MiB; ten times that when
    encoding. Raises DataError: unusable input, an output folder that holds something else or is in use, or not a single
    clip that could be packed; StorageError: a full disk and the like, after which the same command goes on.
    """
    progress = progress or Progress(enabled=False)
    try:
        listing = list_input(source, options.layout, exclude=output)
        clips = _ordered(listing.clips, options)
        with Store(output, _plan(listing, clips, options)) as store:
            if store.complete:
                return _found(store)
            return _Run(store, clips, options, workers, clip_seconds, progress).run(listing.labels)
    except OSError as error:
        raise storage_error(error, f"packing into {output}") from error


def _ordered(clips: list[Clip], options: PackOptions) -> list[Clip]:
    if not options.shuffle:
        return clips
    # Raw bits: numpy promises these for ever, its shuffles it does not.
    draws = np.random.Philox(key=options.seed).random_raw(len(clips))
    return [clips[i] for i in np.argsort(draws, kind="stable")]


def _plan(listing: Listing, clips: list[Clip], options: PackOptions) -> dict[str, Any]:
    digest = hashlib.sha256()
    for clip in clips:
        digest.update(json.dumps([clip.row, clip.source, clip.label, clip.size]).encode())
    plan = {"version": VERSION, "input": listing.kind, "clips": len(clips)} | asdict(options)
    del plan["layout"]  # "input" says what came of it
    return plan | {CLIPS_SHA256: digest.hexdigest()}


def _found(store: Store) -> Summary:
    dataset = read_summary(store.folder)
    return Summary(dataset, Counter(dataset["quarantined"]), already_complete=True)


class _Run:
    """One run over an unfinished output folder."""

    def __init__(
        self, store: Store, clips: list[Clip], options: PackOptions, workers: int, seconds: float, progress: Progress
    ) -> None:
        self._store, self._clips, self._options = store, clips, options
        self._workers, self._seconds, self._progress = workers, seconds, progress
        self._writer: ShardWriter | None = None
        self._number = 0  # of the shard being written
        self._start = 0  # first clip that this shard settles
        self._refused: list[dict[str, Any]] = []  # since then
        self._reasons: Counter[str] = Counter()
        self._example = ""
        self._packed = 0

    def run(self, labels: dict[str, int]) -> Summary:
        for proof in self._store.proofs():
            self._number, self._start = self._number + 1, proof["end"]
            self._packed += len(proof["rows"])
            self._reasons.update(row["reason"] for row in proof["refused"])
        reused = self._number
        self._progress.start(len(self._clips), self._start)
        try:
            with WorkerPool(self._workers, self._progress.tick) as pool:
                for i, answer in self._answers(pool):
                    self._settle(i, answer)
                    self._progress.advance(self._packed, self._reasons.total())
            if self._writer and self._writer.rows:
                self._close_shard(len(self._clips))
        finally:
            if self._writer:
                self._writer.close()
            self._progress.stop()
        if not self._packed:
            self._store.discard()
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self._reasons.most_common())
            raise DataError(
                f"none of the {len(self._clips)} files could be packed ({reasons}; for example {self._example}); "
                "check that the input is the right one"
            )
        made_with = {"vmjepa": vmjepa.__version__, "pyav": av.__version__}
        dataset = self._store.finish({"labels": labels, "made_with": made_with}, self._refused)
        return Summary(dataset, self._reasons, reused_shards=reused)

    def _answers(self, pool: WorkerPool) -> Iterator[tuple[int, dict[str, Any]]]:
        """The proofs of the clips that are left, in order."""
        left = range(self._start, len(self._clips))
        to_prove = [i for i in left if not self._clips[i].refused]
        proved = pool.in_order(len(to_prove), lambda n: self._task(to_prove[n]))
        for i in left:
            yield i, {"reason": self._clips[i].refused, "detail": ""} if self._clips[i].refused else next(proved)

    def _task(self, i: int) -> dict[str, Any]:
        clip, encode = self._clips[i], self._options.encode
        seconds = self._seconds + max(clip.size, 0) / 2**20
        return {
            "path": clip.path,
            "encode": asdict(encode) if encode else None,
            "target": str(self._store.work / f"clip-{i:08d}"),
            "seconds": seconds * (_ENCODING_TAKES if encode else 1),
        }

    def _settle(self, i: int, answer: dict[str, Any]) -> None:
        if "storage_error" in answer:
            raise OSError(answer["storage_error"], os.strerror(answer["storage_error"]), str(self._store.work))
        if "reason" in answer:
            self._refuse(self._clips[i], answer["reason"], answer["detail"])
            return
        try:
            self._add(i, answer)
        except (ClipChangedError, BadClipError):
            self._refuse(self._clips[i], CHANGED, "")
        if self._options.encode:
            os.unlink(answer["file"])

    def _refuse(self, clip: Clip, reason: str, detail: str) -> None:
        row = {"path": clip.source, "row": clip.row, "label": clip.label, "reason": reason, "detail": printable(detail)}
        self._refused.append(row)
        self._reasons[reason] += 1
        self._example = self._example or f"{clip.source}: {reason}" + (f", {detail}" if detail else "")

    def _add(self, i: int, proof: dict[str, Any]) -> None:
        clip, info, length = self._clips[i], ClipInfo(**proof["clip"]), proof["length"]
        with open_clip(proof["file"]) as video:
            sidecars = ShardWriter.sidecars(i, clip.label, clip.source, proof["sha256"], info)
            size = ShardWriter.sample_size(length, sidecars)
            if self._writer and self._writer.rows and self._writer.size + size > self._options.shard_size:
                self._close_shard(i)
            if self._writer is None:
                name = f"{shard_name(self._number)}.tar"
                self._writer = ShardWriter(self._store.work / f"{name}.tmp", name)
            self._writer.add(i, video, length, proof["sha256"], clip.label, clip.source, info)
        self._packed += 1

    def _close_shard(self, end: int) -> None:
        """Publishes the shard being written; it settles the clips from `_start` to `end`."""
        writer = self._writer
        assert writer is not None
        sha256 = writer.finish()
        writer.close()
        shard = {"name": writer.name, "size": writer.size, "sha256": sha256, "samples": len(writer.rows)}
        proof = {"shard": shard, "end": end, "rows": writer.rows, "refused": self._refused}
        self._store.publish_shard(self._number, writer.path, writer.index(), proof)
        self._writer, self._refused = None, []
        self._number, self._start = self._number + 1, end
