"""The output folder: one writer at a time, finished shards with their proofs, and publication in one step.

While a dataset is being made its folder holds `.work/`: plan.json (what is being made from what), lock, one
shard-NNNNNN.json per finished shard (its proof: which clips it settled, their manifest rows, the refused ones) and
temporary files. A file appears under its final name only when all of it is on the disk. dataset.json comes last, then
`.work` goes; so a folder with dataset.json is whole, and one without can be finished by the same command.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vmjepa.data.shards import (
    FORMAT,
    MANIFEST,
    MANIFEST_SCHEMA,
    QUARANTINE,
    SUMMARY,
    VERSION,
    file_sha256,
    read_summary,
)
from vmjepa.errors import DataError
from vmjepa.run_dir import sync_folder

CLIPS_SHA256 = "clips_sha256"  # the entry of a plan that stands for the list of clips
_REFUSED_COLUMNS = ("path", "row", "label", "reason", "detail")
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def shard_name(number: int) -> str:
    """File name of a shard without extension."""
    return f"shard-{number:06d}"


class Store:
    """The output folder of one run. A context manager that holds the folder's lock.

    plan: everything the shards depend on, JSON-serialisable. `complete` is true when the folder already holds the whole
    dataset of this plan. Raises DataError: another run is at work here, or the folder holds something else.
    """

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.folder, self.plan = folder, plan
        self.work = folder / ".work"
        self.complete = False
        self._lock: int | None = None

    def __enter__(self) -> Store:
        if self.folder.exists() and not self.folder.is_dir():
            raise DataError(f"{self.folder} is a file; give a folder for the shards")
        if not self.work.exists() and self._finished():
            self.complete = True
            return self
        self._refuse_other_contents()
        self.work.mkdir(parents=True, exist_ok=True)
        self._acquire()
        try:
            self._prepare()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is None:
            return
        if self.complete:
            self.discard()
        elif self.work.exists():
            self._clear_temporaries()
        self._release()

    # --- entering -----------------------------------------------------------------------------------------------

    def _finished(self) -> bool:
        if not (self.folder / SUMMARY).exists():
            return False
        self._compare(read_summary(self.folder)["options"], "a finished dataset")
        return True

    def _compare(self, found: dict[str, Any], what: str) -> None:
        if found == self.plan:
            return
        changed = {key: value for key, value in self.plan.items() if found.get(key) != value and key != CLIPS_SHA256}
        difference = "; ".join(f"{key} was {found.get(key)}, now {value}" for key, value in changed.items())
        difference = difference or "the list of clips, their labels or sizes"
        raise DataError(
            f"{self.folder} holds {what} made differently ({difference}); "
            "give another output folder, or delete this one to make it anew"
        )

    def _refuse_other_contents(self) -> None:
        if self.work.exists() or not self.folder.exists():
            return
        strangers = sorted(os.listdir(self.folder))
        if strangers:
            raise DataError(
                f"{self.folder} holds other files ({strangers[0]}), no shard dataset; give an empty or new folder"
            )

    def _acquire(self) -> None:
        path = self.work / "lock"
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        busy = DataError(f"{self.folder}: another run is packing into this folder; wait for it or give another folder")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:  # some cluster file systems are mounted without locks
                return
            os.close(self._lock)
            raise busy from None
        if not path.exists() or os.stat(path).st_ino != os.fstat(self._lock).st_ino:  # it just finished and cleaned up
            os.close(self._lock)
            raise busy

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _prepare(self) -> None:
        if self._finished():  # killed between the last rename and the clean-up
            self.complete = True
            return
        path = self.work / "plan.json"
        if path.exists():
            self._compare(json.loads(path.read_text(encoding="utf-8")), "an unfinished dataset")
        else:
            self._write("plan.json", json.dumps(self.plan), self.work)
        self._clear_temporaries()

    def _clear_temporaries(self) -> None:
        """Removes all but the plan and the finished shards: a shard without its proof is made again."""
        kept = [proof["shard"]["name"].removesuffix(".tar") for proof in self.proofs()]
        for path in self.work.iterdir():
            if path.name not in {"plan.json", "lock", *(f"{name}.json" for name in kept)}:
                path.unlink()
        for path in [*self.folder.glob("shard-*.tar"), *self.folder.glob("shard-*.idx")]:
            if path.stem not in kept:
                path.unlink()

    # --- finished shards ----------------------------------------------------------------------------------------

    def proofs(self) -> Iterator[dict[str, Any]]:
        """The proofs of the shards that are finished, in order, up to the first that is not."""
        for number in range(10**6):
            try:
                proof = json.loads((self.work / f"{shard_name(number)}.json").read_text(encoding="utf-8"))
                size = (self.folder / proof["shard"]["name"]).stat().st_size
            except FileNotFoundError:
                return
            if size != proof["shard"]["size"] or not (self.folder / f"{shard_name(number)}.idx").exists():
                return
            yield proof

    def publish_shard(self, number: int, tar: Path, index: str, proof: dict[str, Any]) -> None:
        """Gives a finished, synced tar its name, with its index, and then its proof."""
        os.rename(tar, self.folder / f"{shard_name(number)}.tar")
        self._write(f"{shard_name(number)}.idx", index, self.folder)
        self._write(f"{shard_name(number)}.json", json.dumps(proof), self.work)

    def _write(self, name: str, text: str, folder: Path) -> None:
        """Writes a file so that it has its name only when all of it is on the disk."""
        temporary = self.work / f"{name}.tmp"
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._publish(temporary, folder / name)

    def _publish(self, temporary: Path, final: Path) -> None:
        os.rename(temporary, final)
        sync_folder(final.parent)

    # --- the end ------------------------------------------------------------------------------------------------

    def finish(self, facts: dict[str, Any], refused: list[dict[str, Any]]) -> dict[str, Any]:
        """Writes quarantine.csv, manifest.parquet and, last, dataset.json, whose contents it returns.

        facts: further entries of dataset.json. refused: rows of the quarantine list after the last
        shard; those before are in the proofs.
        """
        temporary = self.work / f"{MANIFEST}.tmp"
        shards, totals = [], {"samples": 0, "frames": 0, "bytes": 0}
        refused_rows: list[dict[str, Any]] = []
        with pq.ParquetWriter(temporary, MANIFEST_SCHEMA) as manifest:
            for proof in self.proofs():  # one shard's rows in memory at a time
                manifest.write_table(pa.Table.from_pylist(proof["rows"], schema=MANIFEST_SCHEMA))
                shards.append(proof["shard"])
                refused_rows += proof["refused"]
                totals["samples"] += len(proof["rows"])
                totals["frames"] += sum(row["frames"] for row in proof["rows"])
                totals["bytes"] += sum(row["length"] for row in proof["rows"])
        refused_rows = sorted(refused_rows + refused, key=lambda row: row["row"])

        quarantine = self.work / f"{QUARANTINE}.tmp"
        with open(quarantine, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, _REFUSED_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(refused_rows)
        for path in (quarantine, temporary):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        counts = Counter(row["reason"] for row in refused_rows)
        summary = {"format": FORMAT, "version": VERSION, **totals, "quarantined": dict(sorted(counts.items())), **facts}
        summary |= {"shards": shards, "manifest_sha256": file_sha256(temporary), "options": self.plan}
        self._publish(quarantine, self.folder / QUARANTINE)
        self._publish(temporary, self.folder / MANIFEST)
        self._write(SUMMARY, json.dumps(summary, indent=1) + "\n", self.folder)
        self.complete = True
        return summary

    def discard(self) -> None:
        """Removes the working files; of a folder in which nothing was made, the folder too."""
        shutil.rmtree(self.work)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
