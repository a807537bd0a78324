"""The evaluation loader: every clip exactly once over all ranks, from fixed places and views."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vmjepa.data.clips import ClipSpec, eval_clips
from vmjepa.data.decode import Decoder
from vmjepa.data.reader import Batch, BatchReader, Request
from vmjepa.data.samples import Samples


def eval_batches(
    samples: Samples,
    spec: ClipSpec,
    decoder: Decoder,
    *,
    segments: int,
    views: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 4,
) -> Iterator[Batch]:
    """Yields this rank's share of the samples in stored order; batch.clips[segment * views + view] is (b, T, S, S, 3).

    Ranks take neighbouring stretches whose lengths differ by at most one, and the last batch may be smaller: nothing is
    padded or repeated, so sums of correct and total over ranks are exact. Close the generator to stop early.

    Raises:
        DataError: a clip cannot be decoded; an evaluation drops or replaces nothing.
    """
    reader = BatchReader(
        samples,
        spec,
        segments * views,
        lambda video, sample, epoch, attempt: eval_clips(spec, video, segments, views),
        decoder,
        workers,
        replace_bad=False,
    )
    mine = np.arange(len(samples) * rank // world, len(samples) * (rank + 1) // world, dtype=np.int64)
    parts = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    yield from reader.batches(Request(step, 0, ids, np.zeros_like(ids)) for step, ids in enumerate(parts))
