"""The training loader: the global batch of every optimizer step, as a pure function of (seed, step).

Step k takes positions [k·G, (k+1)·G) of the order's infinite stream, G = batch_size · world · accumulation: the same
clips at any number of ranks, and a resumed run simply starts at its step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from vmjepa.data.clips import ClipSpec, train_clips
from vmjepa.data.decode import Decoder, choose_decoder
from vmjepa.data.decode_dali import DaliDecoder
from vmjepa.data.decode_pyav import PyavDecoder
from vmjepa.data.order import Order
from vmjepa.data.reader import Batch, BatchReader, Request
from vmjepa.data.samples import Dataset, Samples
from vmjepa.errors import DataError

if TYPE_CHECKING:
    from vmjepa.config import PretrainConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_JUDGED_FROM = 1000  # clips: with fewer loaded, a share of bad ones is measured against this number


class ClipLoader:
    """Iterates over the micro-batches of one rank: step 0 micro 0, step 0 micro 1, …, step 1 micro 0, …

    Attributes: `order`; `wait_seconds` the consumer spent waiting; `loaded` and `bad`, how many clips this loader has
    handed out and how many others failed on the way and were replaced.

    Each rank judges its own share of bad clips, bad / max(loaded, 1000), after every micro-batch. It is a function of
    (seed, start_step, rank, world, batch_size, accumulation), so a run repeated as it was stops at the same batch; at
    another number of ranks, or resumed elsewhere, each rank counts other clips and may stop at another step.

    Args:
        samples: the clips.
        spec: how clips are cut; spec.num_clips clips per video.
        decoder: the decode backend, see `open_decoder`.
        seed: seed of the run.
        batch_size: videos per micro-batch of one rank.
        rank, world, accumulation: this rank, the number of ranks, and micro-batches per optimizer step.
        start_step, stop_step: first optimizer step, and the one to stop before (None: never).
        window_groups: shards that are shuffled together.
        workers: decode threads.
        max_bad_fraction: share of this rank's clips that may fail.
        min_frames: shorter videos are left out (0: their last frame is repeated).
        pin_memory: page-locked batches, for faster copies to a GPU.

    Raises:
        DataError: while iterating: too many clips of this rank fail, or a shard does not hold the bytes that were
            packed.
    """

    def __init__(
        self,
        samples: Samples,
        spec: ClipSpec,
        decoder: Decoder,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        start_step: int = 0,
        stop_step: int | None = None,
        window_groups: int = 16,
        workers: int = 4,
        max_bad_fraction: float = 0.01,
        min_frames: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.order = Order(samples.groups, seed, window_groups)
        self._batch_size, self._rank, self._world, self._accumulation = batch_size, rank, world, accumulation
        self._start_step, self._stop_step = start_step, stop_step
        self._max_bad_fraction = max_bad_fraction
        self._reader = BatchReader(
            samples,
            spec,
            spec.num_clips,
            lambda video, sample, epoch, attempt: train_clips(spec, video, seed, epoch, sample, attempt),
            decoder,
            workers,
            replace_bad=True,
            min_frames=min_frames,
            pin_memory=pin_memory,
        )
        self._batches = self._reader.batches(self._requests())
        self._failure: Exception | None = None
        self.loaded = 0
        self.bad = 0

    @property
    def wait_seconds(self) -> float:
        """Seconds spent waiting for batches since the start."""
        return self._reader.wait_seconds

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._failure:  # a loader that failed must not look like one that ended
            raise self._failure
        try:
            batch = next(self._batches)
            self._judge(batch)
        except StopIteration:
            raise
        except Exception as error:
            self._failure = error
            self.close()
            raise
        return batch

    def close(self) -> None:
        """Stops and joins the decode threads."""
        self._batches.close()

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _requests(self) -> Iterator[Request]:
        step = self._start_step
        while self._stop_step is None or step < self._stop_step:
            for micro in range(self._accumulation):
                share = (step * self._accumulation + micro) * self._world + self._rank
                place = share * self._batch_size, self._batch_size
                yield Request(step, micro, self.order.ids(*place), self.order.epochs(*place))
            step += 1

    def _judge(self, batch: Batch) -> None:
        self.loaded += len(batch.labels)
        self.bad += len(batch.replaced)
        if self.bad > self._max_bad_fraction * max(self.loaded, _JUDGED_FROM):
            raise DataError(
                f"rank {self._rank} of {self._world}: {self.bad} of its {self.loaded} clips cannot be decoded, more "
                f"than data.max_bad_fraction={self._max_bad_fraction:g} allows; "
                f"the latest: {'; '.join(batch.replaced[:3])}. "
                "Pack the videos with `python -m tools.shard run`, which sets bad ones aside"
            )


def open_decoder(
    kind: str, samples: Samples, size: int, batch_size: int, workers: int, device: torch.device | str = "cpu"
) -> Decoder:
    """The decode backend for these samples: `kind` is auto, pyav or dali; `batch_size` in clips. Raises ConfigError."""
    # Listing the codecs walks the whole manifest: only where the choice depends on them.
    undecided = kind == "dali" or (kind == "auto" and torch.device(device).type == "cuda")
    if undecided and choose_decoder(kind, samples.codecs(), device) == "dali":
        return DaliDecoder(size, batch_size, workers, device)
    return PyavDecoder(size)


def train_loader(
    cfg: PretrainConfig,
    datasets: Sequence[Dataset],
    rank: int,
    world: int,
    start_step: int,
    device: torch.device | str,
) -> ClipLoader:
    """The loader of a pretraining run on this rank, from optimizer step `start_step` to the run's last.

    Raises:
        DataError: no clip is left. ConfigError: the decoder cannot serve the data, or the batch does not divide.
    """
    data, augment = cfg.data, cfg.data_aug
    spec = ClipSpec(
        num_frames=data.num_frames,
        stride=data.sampling_rate,
        crop_size=data.crop_size,
        num_clips=data.num_clips,
        scale=augment.random_resize_scale,
        ratio=augment.random_resize_aspect_ratio,
        flip=augment.horizontal_flip,
    )
    min_frames = spec.span if data.filter_short_videos else 0
    samples = Samples(datasets, min_frames)
    batch_size = cfg.micro_batch(world)
    return ClipLoader(
        samples,
        spec,
        open_decoder(data.decoder, samples, spec.crop_size, batch_size * spec.num_clips, data.num_workers, device),
        seed=cfg.meta.seed,
        batch_size=batch_size,
        rank=rank,
        world=world,
        accumulation=cfg.optimization.accumulation_steps,
        start_step=start_step,
        stop_step=cfg.total_steps,
        window_groups=data.shuffle_window,
        workers=data.num_workers,
        max_bad_fraction=data.max_bad_fraction,
        min_frames=min_frames,
        pin_memory=data.pin_mem and torch.device(device).type == "cuda",
    )


def to_model_input(
    clips: torch.Tensor, normalize: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """uint8 (…, T, S, S, 3) clips to normalised (B, 3, T, S, S), B the product of the leading sizes.

    `normalize`: "imagenet" subtracts ImageNet's channel means and divides by its deviations; "clip" standardises each
    channel of each clip over its frames and pixels (deviations below 0.001 of full scale count as 0.001).
    """
    pixels = clips.flatten(0, -5) if clips.ndim > 4 else clips[None]
    x = pixels.to(device, non_blocking=True).permute(0, 4, 1, 2, 3)
    x = x.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    if normalize == "imagenet":
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    elif normalize == "clip":
        variance, mean = torch.var_mean(x, dim=(2, 3, 4), correction=0, keepdim=True)
        std = variance.sqrt().clamp_min_(1e-3)
    else:
        raise ValueError(f"normalize must be imagenet or clip, not {normalize!r}")
    return x.sub_(mean).div_(std).to(dtype)
