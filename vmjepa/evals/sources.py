"""Where the probes' tokens come from: kept in memory, or encoded anew whenever a clip is needed.

Both give the same videos in the same order (vmjepa.data.order): step k takes the stream positions k·B … (k+1)·B - 1, B
being the videos of one step over all ranks, and a cached source answers epoch e with draw e mod K of its K draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from vmjepa.data.order import Order
from vmjepa.evals.probe_loop import TokenBatch
from vmjepa.train.distributed import World


class CachedTrain:
    """Training tokens in memory.

    Args:
        tokens: per arm (K, n, G, L, D): K augmented draws of each of n videos.
        labels: int64 (n,).
        order: the shuffled stream of the n videos.
        batch_size: videos per rank and micro-batch; `accumulation` micro-batches make a step.
    """

    def __init__(
        self, tokens: Sequence[Tensor], labels: Tensor, order: Order, batch_size: int, accumulation: int, world: World
    ) -> None:
        self._tokens, self._labels, self._order = tokens, labels, order
        self._batch_size, self._accumulation, self._world = batch_size, accumulation, world
        self.steps_per_epoch = max(1, len(order) // (batch_size * accumulation * world.size))

    def steps(self, start: int) -> Iterator[list[TokenBatch]]:
        """Micro-batches of this rank for step `start`, `start` + 1, …, without end."""
        step = start
        while True:
            first = step * self._accumulation * self._world.size
            yield [
                self._batch((first + micro * self._world.size + self._world.rank) * self._batch_size)
                for micro in range(self._accumulation)
            ]
            step += 1

    def _batch(self, position: int) -> TokenBatch:
        videos = torch.from_numpy(self._order.ids(position, self._batch_size))
        draws = torch.from_numpy(self._order.epochs(position, self._batch_size) % len(self._tokens[0]))
        device = self._world.device
        return TokenBatch([t[draws, videos].to(device) for t in self._tokens], self._labels[videos].to(device))


class CachedValidation:
    """Validation tokens in memory: per arm (n, G, L, D). Rank r of R takes the videos r, r + R, r + 2R, …"""

    def __init__(self, tokens: Sequence[Tensor], labels: Tensor, batch_size: int, world: World) -> None:
        self._tokens, self._labels, self._batch_size, self._world = tokens, labels, batch_size, world

    def batches(self) -> Iterator[TokenBatch]:
        """Each of this rank's videos once."""
        mine = np.arange(self._world.rank, len(self._labels), self._world.size)
        device = self._world.device
        for start in range(0, len(mine), self._batch_size):
            videos = torch.from_numpy(mine[start : start + self._batch_size])
            yield TokenBatch([t[videos].to(device) for t in self._tokens], self._labels[videos].to(device))
