"""Frozen encoders that turn clips into standardised tokens.

Shapes: b videos, S segments, V views, G looks that a probe classifies apart, L tokens per look, N tokens per clip, D
features. With attend_across_segments the tokens of a view's segments are joined: G = V, L = S·N; otherwise G = S·V
and L = N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vmjepa.config import EvalConfig, PretrainConfig, load_pretrain
from vmjepa.data.loader import to_model_input
from vmjepa.errors import CheckpointError, ConfigError
from vmjepa.models import VideoMamba, VisionTransformer, build_encoder
from vmjepa.run_dir import RunDir
from vmjepa.train import checkpoint
from vmjepa.train.distributed import World, sum_over_ranks

Encoder = VideoMamba | VisionTransformer
_SMALLEST_DEVIATION = 1e-6  # a feature that never varies stays zero


@dataclass(frozen=True)
class Looks:
    """How the clips of a video become what a probe sees: `segments` x `views` clips, segments joined or apart."""

    segments: int
    views: int
    joined: bool

    @property
    def count(self) -> int:
        """G."""
        return self.views if self.joined else self.segments * self.views

    @property
    def clips_per_look(self) -> int:
        """L / N."""
        return self.segments if self.joined else 1

    def arrange(self, clips: Sequence[Tensor]) -> Tensor:
        """Tokens of clip [segment·V + view], each (b, N, D), as (b, G, L, D)."""
        tokens = torch.stack(list(clips), 1)
        if not self.joined:
            return tokens
        return tokens.unflatten(1, (self.segments, self.views)).transpose(1, 2).flatten(2, 3)


class TokenStatistics:
    """Mean and standard deviation of each feature over all tokens added, in fp64."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, tokens: Tensor) -> None:
        """Adds tokens (…, D)."""
        flat = tokens.flatten(0, -2).double()
        here = torch.stack([torch.full_like(flat[0], len(flat)), flat.sum(0), flat.square().sum(0)])
        self._sums = here if self._sums is None else self._sums + here

    def mean_and_deviation(self, world: World) -> tuple[Tensor, Tensor]:
        """Over the tokens of all ranks, fp32 (D,) each."""
        assert self._sums is not None, "no token was added"
        count, total, squares = sum_over_ranks(self._sums) if world.size > 1 else self._sums
        mean = total / count
        deviation = (squares / count - mean**2).clamp(min=0).sqrt()
        return mean.float(), deviation.clamp(min=_SMALLEST_DEVIATION).float()


@dataclass
class Arm:
    """One frozen encoder and what it is shown.

    encoder_name: "pretrained" or "random". single_frame: it sees the clip's middle frame repeated, so no motion.
    normalize: how pixels are normalised. statistics: mean and deviation (D,) by which tokens are standardised, or None.
    """

    encoder_name: str
    single_frame: bool
    encoder: Encoder
    normalize: str
    statistics: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def encode(self, clips: Sequence[Tensor], looks: Looks, world: World, bfloat16: bool) -> Tensor:
        """Raw tokens fp32 (b, G, L, D) of uint8 clips [segment·V + view], each (b, T, height, width, 3)."""
        tokens = []
        for clip in clips:
            if self.single_frame:
                middle = clip.shape[1] // 2
                clip = clip[:, middle : middle + 1].expand_as(clip)
            pixels = to_model_input(clip, self.normalize, world.device)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=bfloat16):
                tokens.append(self.encoder(pixels, None).float())
        return looks.arrange(tokens)

    def standardize(self, tokens: Tensor) -> Tensor:
        """(tokens - mean) / deviation; the tokens themselves where there are no statistics."""
        if self.statistics is None:
            return tokens
        mean, deviation = self.statistics
        return (tokens - mean.to(tokens.device)) / deviation.to(tokens.device)


@dataclass(frozen=True)
class Pretrained:
    """The run whose encoder is probed, and the checkpoint folder taken from it."""

    config: PretrainConfig
    checkpoint: Path


def find_pretrained(cfg: EvalConfig) -> Pretrained:
    """The checkpoint that cfg.pretrain names.

    Raises:
        ConfigError: `folder` is no run directory, or its run had another model than the one named here.
        CheckpointError: the run has no such checkpoint, it does not verify, or none does.
    """
    run = RunDir(cfg.pretrain.folder)
    if not run.config.is_file():
        raise ConfigError(
            f"pretrain.folder: {run.root} holds no {run.config.name}, so it is no run directory; "
            "give the logging.folder of a `vmjepa pretrain` run"
        )
    trained = load_pretrain(run.config)
    _check_same_model(cfg, trained)
    if cfg.pretrain.checkpoint is None:
        folder = checkpoint.latest(run.root)
        if folder is None:
            raise CheckpointError(f"{run.checkpoints} holds no checkpoint yet; wait for the run's first one")
        return Pretrained(trained, folder)
    folder = next((f for f in (run.root, run.checkpoints) if (f / cfg.pretrain.checkpoint).is_dir()), None)
    if folder is None:
        found = ", ".join(sorted(path.name for path in run.checkpoints.glob("step_*"))) or "none"
        raise CheckpointError(
            f"pretrain.checkpoint: {run.checkpoints} holds no {cfg.pretrain.checkpoint}; it holds: {found}"
        )
    fault = checkpoint.verify(folder / cfg.pretrain.checkpoint)
    if fault is not None:
        raise CheckpointError(
            f"pretrain.checkpoint: {folder / cfg.pretrain.checkpoint} does not verify ({fault}); "
            "name another one, or none to take the newest that verifies"
        )
    return Pretrained(trained, folder / cfg.pretrain.checkpoint)


def build_arms(cfg: EvalConfig, pretrained: Pretrained, world: World) -> list[Arm]:
    """The frozen encoders of an evaluation, pretrained first; the random one starts as the run itself started.

    Raises:
        ConfigError: the clips do not divide into the model's patches and tubelets.
        CheckpointError: the checkpoint is of another model.
    """
    trained = pretrained.config
    for key, value, of, unit in (
        ("optimization.resolution", cfg.resolution, "patch size", trained.data.patch_size),
        ("data.frames_per_clip", cfg.data.frames_per_clip, "tubelet size", trained.data.tubelet_size),
    ):
        if value % unit:
            raise ConfigError(f"{key}: {value} is not divisible by the encoder's {of} {unit}; use a multiple of it")
    state = checkpoint.load_encoder_state(pretrained.checkpoint, cfg.pretrain.checkpoint_key)
    encoders = {"pretrained": _encoder(trained)}
    checkpoint.check_fits(pretrained.checkpoint, state, encoders["pretrained"].state_dict())
    encoders["pretrained"].load_state_dict(state)
    if cfg.probe.random_baseline:
        encoders["random"] = _encoder(trained)
    for encoder in encoders.values():
        encoder.to(world.device).eval().requires_grad_(False)
    arms = [Arm(name, False, encoder, trained.data.normalize) for name, encoder in encoders.items()]
    if cfg.probe.single_frame_baseline:
        arms.append(Arm("pretrained", True, encoders["pretrained"], trained.data.normalize))
    return arms


def _encoder(trained: PretrainConfig) -> Encoder:
    torch.manual_seed(trained.meta.seed)
    return build_encoder(trained)


def _check_same_model(cfg: EvalConfig, trained: PretrainConfig) -> None:
    for key, value in (
        ("model_name", trained.model.model_name),
        ("patch_size", trained.data.patch_size),
        ("tubelet_size", trained.data.tubelet_size),
        ("uniform_power", trained.model.uniform_power),
    ):
        wanted = getattr(cfg.pretrain, key)
        if wanted is not None and wanted != value:
            raise ConfigError(
                f"pretrain.{key}: {wanted}, but {cfg.pretrain.folder} was trained with {value}; "
                "correct it, or leave out pretrain.model_name to take all of it from the run"
            )
