"""Several datasets (shard folders, CSVs of loose files) seen as one list of samples, numbered from 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vmjepa.data.clips import VideoInfo
from vmjepa.data.decode_pyav import video_info
from vmjepa.data.files import FileDataset
from vmjepa.data.shards import ShardDataset
from vmjepa.errors import DataError

Dataset = ShardDataset | FileDataset


class Samples:
    """The concatenation of datasets, without the videos known to be too short.

    Columns with one entry per sample: `labels` (int64, -1 = none) and `groups` (int64; samples of one shard share a
    group, so that the order can keep their reads together).

    Args:
        datasets: opened datasets.
        min_frames: leave out shard clips with fewer frames; loose files are counted only when they are read.

    Raises:
        DataError: no sample is left.
    """

    def __init__(self, datasets: Sequence[Dataset], min_frames: int = 0) -> None:
        self._datasets = list(datasets)
        kept = [np.flatnonzero((d.frames < 0) | (d.frames >= min_frames)) for d in self._datasets]
        first_group = np.cumsum([0, *(len(d.shard_names) for d in self._datasets)])
        self._dataset = np.repeat(np.arange(len(kept)), [len(rows) for rows in kept])
        self._row = np.concatenate([*kept, np.empty(0, np.int64)])
        self.labels = self._column([d.labels[rows] for d, rows in zip(self._datasets, kept, strict=True)])
        self.groups = self._column(
            [first + d.shard_index[rows] for first, d, rows in zip(first_group, self._datasets, kept, strict=False)]
        )
        self._probed: dict[int, VideoInfo] = {}
        if len(self) == 0:
            stored = sum(len(dataset) for dataset in self._datasets)
            why = f"all {stored} clips are shorter than {min_frames} frames" if stored else "the datasets hold no clip"
            raise DataError(f"{why}: lower data.num_frames or data.sampling_rate, or give other data")

    @staticmethod
    def _column(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([*parts, np.empty(0, np.int64)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._row)

    def class_names(self) -> dict[int, set[str]]:
        """Names of each label, from the datasets that know them (shards of class folders); two names are a conflict."""
        names: dict[int, set[str]] = {}
        for dataset in self._datasets:
            for name, label in dataset.label_names.items():
                names.setdefault(label, set()).add(name)
        return names

    def _where(self, sample: int) -> tuple[Dataset, int]:
        return self._datasets[self._dataset[sample]], int(self._row[sample])

    def read(self, sample: int) -> bytes:
        """The encoded file. Raises DataError when it cannot be read or is not the one that was packed."""
        dataset, row = self._where(sample)
        dataset.verify(row)
        return dataset.read(row)

    def counted(self, sample: int) -> bool:
        """Whether the frame count was found by decoding (shards) rather than by counting packets (loose files)."""
        dataset, row = self._where(sample)
        return bool(dataset.frames[row] >= 0)

    def video(self, sample: int, data: bytes) -> VideoInfo:
        """Frame count, stored size and rotation; a loose file is probed once. Raises DecodeError."""
        dataset, row = self._where(sample)
        if self.counted(sample):
            return VideoInfo(*(int(c[row]) for c in (dataset.frames, dataset.width, dataset.height, dataset.rotation)))
        if sample not in self._probed:
            self._probed[sample] = video_info(data)
        return self._probed[sample]

    def describe(self, sample: int) -> str:
        """Where the sample lies, for messages."""
        dataset, row = self._where(sample)
        return dataset.describe(row)

    def codecs(self) -> dict[str, str]:
        """Each codec that occurs ("" = unknown) with the description of one sample that has it."""
        found: dict[str, str] = {}
        for sample in range(len(self)):
            dataset, row = self._where(sample)
            codec = dataset.codec(row)
            if codec not in found:
                found[codec] = self.describe(sample)
        return found
