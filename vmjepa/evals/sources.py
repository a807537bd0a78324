"""Where the probes' tokens come from: kept in memory, or decoded and encoded anew whenever a clip is needed.

Both give the same videos in the same order (vmjepa.data.order): step k takes the stream positions k·B … (k+1)·B - 1, B
being the videos of one step over all ranks, and a cached source answers epoch e with draw e mod K of its K draws.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vmjepa.config import EvalConfig
from vmjepa.data.clips import ClipSpec
from vmjepa.data.decode import Decoder
from vmjepa.data.eval_loader import eval_batches
from vmjepa.data.loader import ClipLoader, open_decoder
from vmjepa.data.order import Order
from vmjepa.data.reader import Batch
from vmjepa.data.samples import Samples
from vmjepa.evals.features import Arm, Looks, TokenStatistics
from vmjepa.evals.probe_loop import TokenBatch
from vmjepa.train.distributed import World

log = logging.getLogger(__name__)
STATISTICS_CLIPS = 2048  # training videos from which mean and deviation of the tokens are taken


@dataclass(frozen=True)
class Videos:
    """Labelled videos (training or validation), the frozen encoders, and how clips are cut for them."""

    cfg: EvalConfig
    samples: Samples
    arms: Sequence[Arm]
    looks: Looks
    world: World

    @property
    def spec(self) -> ClipSpec:
        """Geometry and augmentation of the clips; training draws one clip per segment."""
        data, optimization = self.cfg.data, self.cfg.optimization
        return ClipSpec(
            num_frames=data.frames_per_clip,
            stride=data.frame_step,
            crop_size=self.cfg.resolution,
            num_clips=self.looks.segments,
            scale=optimization.random_resize_scale,
            ratio=optimization.random_resize_aspect_ratio,
            flip=optimization.horizontal_flip,
        )

    def train_loader(self, start_step: int, stop_step: int | None, accumulation: int, world: World) -> ClipLoader:
        """Randomly cut clips in the shuffled order, endlessly where stop_step is None."""
        cfg, spec = self.cfg, self.spec
        return ClipLoader(
            self.samples,
            spec,
            self._decoder(spec.num_clips),
            seed=cfg.optimization.seeds[0],
            batch_size=cfg.optimization.batch_size,
            rank=world.rank,
            world=world.size,
            accumulation=accumulation,
            start_step=start_step,
            stop_step=stop_step,
            workers=cfg.data.num_workers,
        )

    def validation_clips(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Clips [segment·V + view] and labels of this rank's share of the videos, each video once."""
        batches = eval_batches(
            self.samples,
            self.spec,
            self._decoder(self.looks.segments * self.looks.views),
            segments=self.looks.segments,
            views=self.looks.views,
            batch_size=self.cfg.optimization.batch_size,
            rank=self.world.rank,
            world=self.world.size,
            workers=self.cfg.data.num_workers,
        )
        for batch in batches:
            yield batch.clips, batch.labels

    def encode(self, arm: Arm, clips: Sequence[Tensor]) -> Tensor:
        """Raw tokens (b, G, L, D)."""
        return arm.encode(clips, self.looks, self.world, self.cfg.optimization.use_bfloat16)

    def standardized(self, clips: Sequence[Tensor], labels: Tensor) -> TokenBatch:
        """What the probes get of a batch of clips."""
        tokens = [arm.standardize(self.encode(arm, clips)) for arm in self.arms]
        return TokenBatch(tokens, labels.to(self.world.device))

    def _decoder(self, clips_per_video: int) -> Decoder:
        data, batch = self.cfg.data, self.cfg.optimization.batch_size * clips_per_video
        return open_decoder(data.decoder, self.samples, self.cfg.resolution, batch, data.num_workers, self.world.device)


class FreshTrain:
    """Training clips drawn, decoded and encoded anew in every epoch. replaced: those before a resumed one's start."""

    def __init__(self, videos: Videos, replaced: int = 0) -> None:
        self._videos, self.replaced = videos, replaced
        optimization = videos.cfg.optimization
        global_batch = optimization.batch_size * optimization.accumulation_steps * videos.world.size
        self.steps_per_epoch = max(1, len(videos.samples) // global_batch)

    def steps(self, start: int) -> Generator[list[TokenBatch]]:
        """Micro-batches of this rank for step `start`, `start` + 1, …, without end."""
        accumulation = self._videos.cfg.optimization.accumulation_steps
        with self._videos.train_loader(start, None, accumulation, self._videos.world) as loader:
            while True:
                batches = [next(loader) for _ in range(accumulation)]
                self.replaced += sum(_report_replaced(batch) for batch in batches)
                yield [self._videos.standardized(batch.clips, batch.labels) for batch in batches]


class FreshValidation:
    """Validation clips decoded and encoded anew whenever asked for."""

    def __init__(self, videos: Videos) -> None:
        self._videos = videos

    def batches(self) -> Iterator[TokenBatch]:
        """This rank's share of the videos, each once."""
        for clips, labels in self._videos.validation_clips():
            yield self._videos.standardized(clips, labels)


class CachedTrain:
    """Training tokens in memory.

    Args:
        tokens: per arm (K, n, G, L, D), standardised: K augmented draws of each of n videos.
        labels: int64 (K, n), of the videos whose clips these are (a clip that fails is replaced by another video's).
        order: the shuffled stream of the n videos.
        batch_size: videos per rank and micro-batch; `accumulation` micro-batches make a step.
        replaced: clips among these that took the place of one that fails. Ranks hold the same ones: counted on rank 0.
    """

    def __init__(
        self,
        tokens: Sequence[Tensor],
        labels: Tensor,
        order: Order,
        batch_size: int,
        accumulation: int,
        world: World,
        replaced: int = 0,
    ) -> None:
        self._tokens, self._labels, self._order = tokens, labels, order
        self.replaced = replaced if world.rank == 0 else 0
        self._batch_size, self._accumulation, self._world = batch_size, accumulation, world
        self.steps_per_epoch = max(1, len(order) // (batch_size * accumulation * world.size))

    def steps(self, start: int) -> Generator[list[TokenBatch]]:
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
        draws = torch.from_numpy(self._order.epochs(position, self._batch_size)) % len(self._labels)
        device = self._world.device
        return TokenBatch([t[draws, videos].to(device) for t in self._tokens], self._labels[draws, videos].to(device))


class CachedValidation:
    """This rank's share of the validation tokens in memory: per arm (n, G, L, D), standardised; labels (n,)."""

    def __init__(self, tokens: Sequence[Tensor], labels: Tensor, batch_size: int, world: World) -> None:
        self._tokens, self._labels, self._batch_size, self._device = tokens, labels, batch_size, world.device

    def batches(self) -> Iterator[TokenBatch]:
        """Each of this rank's videos once."""
        for start in range(0, len(self._labels), self._batch_size):
            part = slice(start, start + self._batch_size)
            yield TokenBatch([t[part].to(self._device) for t in self._tokens], self._labels[part].to(self._device))


def _statistics_steps(videos: Videos, world: World) -> int:
    """Loader steps whose clips standardise the tokens: within the first epoch, so each video counts at most once."""
    share = videos.cfg.optimization.batch_size * world.size
    return max(1, min(len(videos.samples), STATISTICS_CLIPS) // share)


def _report_replaced(batch: Batch) -> int:
    """Warns of a batch's clips that could not be decoded; returns their number."""
    for message in batch.replaced:
        log.warning("%s", message)
    return len(batch.replaced)


def fit_statistics(videos: Videos) -> None:
    """Gives every arm mean and deviation of its tokens over the first training clips of the shuffled order.

    Clips replaced here are reported when training comes to them, in its first epoch.
    """
    sums = [TokenStatistics() for _ in videos.arms]
    with videos.train_loader(0, _statistics_steps(videos, videos.world), 1, videos.world) as loader:
        for batch in loader:
            for arm, statistics in zip(videos.arms, sums, strict=True):
                statistics.add(videos.encode(arm, batch.clips))
    for arm, statistics in zip(videos.arms, sums, strict=True):
        arm.statistics = statistics.mean_and_deviation(videos.world)


def cache_train(videos: Videos, draws: int, on_step: Callable[[int], None]) -> CachedTrain:
    """Encodes `draws` augmented clips of every training video; every rank holds all of them, as the order mixes them.

    Where the config asks for it, this also gives every arm its statistics, as `fit_statistics` would.
    `on_step` gets the number of batches encoded.
    """
    alone, cfg = replace(videos.world, rank=0, size=1), videos.cfg
    n, size = len(videos.samples), cfg.optimization.batch_size
    fitting = _statistics_steps(videos, alone) if cfg.probe.standardize else 0
    steps, replaced = -(-draws * n // size), 0
    sums = [TokenStatistics() for _ in videos.arms]
    tokens: list[Tensor] = []
    labels = torch.empty(draws, n, dtype=torch.int64)
    with videos.train_loader(0, steps, 1, alone) as loader:
        for batch in loader:
            if videos.world.rank == 0:  # all ranks read the same clips
                replaced += _report_replaced(batch)
            count = min(size, draws * n - batch.step * size)
            place = batch.step * size, count
            draw, video = (torch.from_numpy(f(*place)) for f in (loader.order.epochs, loader.order.ids))
            labels[draw, video] = batch.labels[:count]
            for i, arm in enumerate(videos.arms):
                encoded = videos.encode(arm, batch.clips)[:count]
                if batch.step < fitting:
                    sums[i].add(encoded)
                if i == len(tokens):
                    tokens.append(torch.empty(draws, n, *encoded.shape[1:]))
                tokens[i][draw, video] = encoded.cpu()
            on_step(batch.step + 1)
        order = loader.order
    for arm, raw, statistics in zip(videos.arms, tokens, sums, strict=True):
        if fitting:
            arm.statistics = statistics.mean_and_deviation(alone)
            for draw_tokens in raw:  # one draw at a time: a second copy of all would double the memory
                draw_tokens.copy_(arm.standardize(draw_tokens))
    return CachedTrain(tokens, labels, order, size, cfg.optimization.accumulation_steps, videos.world, replaced)


def cache_validation(videos: Videos) -> CachedValidation:
    """Encodes this rank's share of the validation clips."""
    parts: list[list[Tensor]] = [[] for _ in videos.arms]
    labels = [torch.empty(0, dtype=torch.int64)]  # a rank's share may be empty
    for clips, batch_labels in videos.validation_clips():
        labels.append(batch_labels)
        for arm, part in zip(videos.arms, parts, strict=True):
            part.append(arm.standardize(videos.encode(arm, clips)).cpu())
    tokens = [torch.cat(part) for part in parts if part]
    return CachedValidation(tokens, torch.cat(labels), videos.cfg.optimization.batch_size, videos.world)
