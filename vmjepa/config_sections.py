"""The sections of a pretraining config, in V-JEPA's names; what this project added is marked so.

Defaults are V-JEPA's where it has one. Keys of the originals that are no fields here are in `unused` or `unsupported`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from vmjepa.config_base import (
    Count,
    Fraction,
    FractionPair,
    KeyProblem,
    NonNegative,
    Number,
    Paths,
    Positive,
    PositiveRange,
    Section,
    Share,
    ShareRange,
    Text,
    lower_case,
    require_multiple,
)

ModelName = Literal[
    "videomamba_tiny", "videomamba_small", "videomamba_middle", "videomamba_base", "videomamba_custom",
    "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant", "vit_custom",
]  # fmt: skip
Decoder = Literal["auto", "dali", "pyav"]


def _dataset_type(value: Any) -> Any:
    return {"videodataset": "VideoDataset", "shards": "shards"}.get(lower_case(value), value)


def _dtype(value: Any) -> Any:
    if lower_case(value) == "float16":
        raise ValueError("float16 needs loss scaling, which is not supported; use bfloat16 or float32")
    return lower_case(value)


def _init_std(value: Any) -> Any:
    if value is None or value == "fan_in":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f'given {value!r}, expected a number between 0 and 1, "fan_in", or null for 0.02')
    return float(value)


DatasetType = Annotated[Literal["VideoDataset", "shards"], BeforeValidator(_dataset_type)]


class DataSection(Section):
    """Which videos, and how a clip is cut from one."""

    unused: ClassVar[dict[str, str]] = {
        "decode_one_clip": "only the frames of the chosen clips are decoded in any case",
        "datasets_weights": "datasets are mixed by their number of videos",
        "dataset_weights": "datasets are mixed by their number of videos",
        "log_resource_utilization": "data waiting time and memory are always logged",
    }
    unsupported: ClassVar[dict[str, Any]] = {"mask_type": "multiblock3d", "clip_duration": None}

    datasets: Paths
    """CSV files of `path label` rows, or shard folders (known by their dataset.json, whatever dataset_type says)."""
    dataset_type: DatasetType = "VideoDataset"
    """VideoDataset: CSVs of loose files; shards: folders written by the shard tool."""
    batch_size: Count
    """Videos per rank in one micro batch; the global batch is batch_size x ranks x accumulation_steps."""
    global_batch_size: Count | None = None
    """Ours. Videos per optimizer step over all ranks; when given, it decides, and batch_size is ignored."""
    num_clips: Count = 1
    """Clips cut from each video."""
    num_frames: Count = 16
    """Frames per clip."""
    tubelet_size: Count = 2
    """Frames per token."""
    sampling_rate: Count = 4
    """Distance between the frames of a clip, in frames of the video."""
    crop_size: Count = 224
    """Height and width of a clip, in pixels."""
    patch_size: Count = 16
    """Height and width of a token, in pixels."""
    pin_mem: bool = True
    """Copy batches to the GPU from pinned memory."""
    num_workers: Count = 1
    """Decode threads per rank."""
    filter_short_videos: bool = False
    """Leave out videos shorter than one clip (otherwise their last frame is repeated)."""
    decoder: Decoder = "auto"
    """Ours. auto: DALI on a GPU, and PyAV on the CPU."""
    shuffle_window: Count = 16
    """Ours. Number of shards whose samples are shuffled together."""
    max_bad_fraction: Fraction = 0.01
    """Ours. The run stops when more than this share of the clips cannot be decoded."""
    normalize: Literal["imagenet", "clip"] = "imagenet"
    """Ours. imagenet: that data set's mean and deviation; clip: each clip standardised by its own."""

    @model_validator(mode="after")
    def _divisible(self) -> DataSection:
        require_multiple("crop_size", self.crop_size, "data.patch_size", self.patch_size)
        require_multiple("num_frames", self.num_frames, "data.tubelet_size", self.tubelet_size)
        return self


class DataAugSection(Section):
    """Random crops of training clips; one draw holds for all frames of a clip."""

    unsupported: ClassVar[dict[str, Any]] = {"auto_augment": False, "motion_shift": False, "reprob": 0.0}

    random_resize_aspect_ratio: PositiveRange = (0.75, 1.35)
    """Range of the crop's width over height."""
    random_resize_scale: ShareRange = (0.3, 1.0)
    """Range of the crop's share of the frame's area."""
    horizontal_flip: bool = True
    """Ours (V-JEPA always flips in pretraining). Mirror half of the clips."""


class LoggingSection(Section):
    """Where the run's files go."""

    folder: Text
    """The run directory."""
    write_tag: Text = "jepa"
    """A name for the run in logs."""


class LossSection(Section):
    """The objective: mean |prediction - target|^p / p."""

    loss_exp: Positive = 1.0
    """The exponent p."""
    reg_coeff: NonNegative = 0.0
    """Weight of the variance term on the predictions."""


class MaskConfig(Section):
    """One multi-block mask: the union of `num_blocks` boxes of tokens is predicted from the rest."""

    aspect_ratio: PositiveRange = (0.75, 1.5)
    """Range of a block's height over width."""
    num_blocks: Count
    """Blocks per clip."""
    spatial_scale: ShareRange
    """Range of a block's share of the frame's area."""
    temporal_scale: ShareRange = (1.0, 1.0)
    """Range of a block's share of the time steps."""
    max_temporal_keep: Share = 1.0
    """Share of the time steps, from the start, that the context may use."""
    max_keep: Count | None = None
    """At most this many context tokens (null: no limit)."""


class MaskingSection(Section):
    """Ours: how masks of unequal size are stacked into a batch."""

    truncate: Literal["none", "prefix", "random"] = "none"
    """none: exact padding; prefix: cut to the shortest, keeping the first (as V-JEPA does); random: cut at random."""


class MetaSection(Section):
    """Resuming, seed and precision."""

    unused: ClassVar[dict[str, str]] = {
        "eval_freq": "pretraining does not evaluate; see monitor.every_steps and monitor.rank_every_steps",
        "use_sdpa": "attention always uses PyTorch's fused function",
        "save_every_freq": "see checkpoint.every_steps and checkpoint.keep",
        "skip_batches": "the position in the data follows from the optimizer step",
    }

    load_checkpoint: bool = True
    """Resume when the run directory holds a checkpoint."""
    read_checkpoint: Text | None = None
    """A checkpoint to start from when the run directory holds none."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Sample order, crops, masks and initial weights all follow from it."""
    dtype: Annotated[Literal["float32", "bfloat16"], BeforeValidator(_dtype)] = "float32"
    """Precision of the matrix products; parameters stay in float32."""


class ModelSection(Section):
    """Encoder and predictor."""

    unused: ClassVar[dict[str, str]] = {"pred_head_dim": "model.pred_num_heads sets the predictor's attention heads"}
    unsupported: ClassVar[dict[str, Any]] = {"in_chans": 3, "use_mask_tokens": True}

    model_name: ModelName
    """The encoder; *_custom takes its size from embed_dim, depth and num_heads."""
    pred_depth: Count = 12
    """Blocks of the predictor."""
    pred_embed_dim: Count = 384
    """Width of the predictor."""
    uniform_power: bool = True
    """Give time, rows and columns equal shares of the position embedding (otherwise 1/2, 1/4, 1/4)."""
    zero_init_mask_tokens: bool = True
    """Start mask tokens at zero (otherwise like weights)."""
    embed_dim: Count | None = None
    """Ours. Width of a *_custom encoder."""
    depth: Count | None = None
    """Ours. Blocks of a *_custom encoder."""
    num_heads: Count | None = None
    """Ours. Attention heads of a vit_custom encoder."""
    pred_num_heads: Count | None = None
    """Ours. Attention heads of the predictor (null: chosen from the encoder, as V-JEPA does)."""
    drop_path: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Ours. Stochastic depth of the last block, rising linearly from 0 at the first."""
    dt_init: Literal["mamba", "official"] = "mamba"
    """Ours. Initial time steps of the scan: Mamba's own, or VideoMamba's (which forgets within two tokens)."""
    position_base: Annotated[Number, Field(gt=1)] = 10000.0
    """Ours. Longest wavelength of the sin-cos positions; small grids want a smaller one."""
    init_std: Annotated[float | str | None, BeforeValidator(_init_std)] = None
    """Ours. Deviation of initial weights (null: 0.02), or "fan_in": 0.64 / sqrt(fan in), which suits narrow models."""

    @model_validator(mode="after")
    def _sizes(self) -> ModelSection:
        custom = self.model_name.endswith("_custom")
        needed = ["embed_dim", "depth"] + (["num_heads"] if self.model_name == "vit_custom" else [])
        for key in ("embed_dim", "depth", "num_heads"):
            given = getattr(self, key) is not None
            if custom and key in needed and not given:
                raise KeyProblem(key, f"missing; model_name {self.model_name} has no size of its own, so add it")
            if given and not custom:
                name = f"{self.model_name.split('_')[0]}_custom"
                raise KeyProblem(key, f"{self.model_name} has a fixed size; remove the key, or use model_name {name}")
        for width, heads in (("embed_dim", "num_heads"), ("pred_embed_dim", "pred_num_heads")):
            if getattr(self, width) is not None and getattr(self, heads) is not None:
                require_multiple(width, getattr(self, width), f"model.{heads}", getattr(self, heads))
        return self


class OptimizationSection(Section):
    """AdamW and its schedules, all functions of the optimizer step."""

    ipe: Count
    """Optimizer steps per epoch."""
    epochs: Count
    """The run has epochs x ipe optimizer steps."""
    warmup: NonNegative
    """Epochs during which the learning rate rises from start_lr to lr."""
    lr: Positive
    """Highest learning rate."""
    start_lr: NonNegative
    """Learning rate of the first step."""
    final_lr: NonNegative
    """Learning rate at the end of the schedule."""
    ipe_scale: Positive = 1.0
    """The schedules span this many times the run; above 1 the run ends before they do, as V-JEPA intends."""
    clip_grad: Positive | None = None
    """Largest gradient norm, for encoder and predictor separately (null: no clipping)."""
    weight_decay: NonNegative = 0.04
    """Weight decay of the first step."""
    final_weight_decay: NonNegative = 0.4
    """Weight decay at the end of the schedule."""
    ema: FractionPair = (0.998, 1.0)
    """Momentum of the target encoder at the first step and at the end of the schedule."""
    accumulation_steps: Count = 1
    """Micro batches per optimizer step."""
    betas: FractionPair = (0.9, 0.999)
    """AdamW's betas."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""

    @model_validator(mode="after")
    def _consistent(self) -> OptimizationSection:
        if self.warmup > self.epochs * self.ipe_scale:
            raise KeyProblem("warmup", f"{self.warmup:g} epochs do not fit a run of {self.epochs} epochs; use fewer")
        if int(self.ipe_scale * self.epochs * self.ipe) < 1:
            raise KeyProblem("ipe_scale", f"{self.ipe_scale:g} leaves schedules of no step; use 1.0 or more")
        if 1.0 in self.betas:
            raise KeyProblem("betas", f"given {list(self.betas)}, expected numbers below 1, e.g. [0.9, 0.999]")
        return self


class EngineSection(Section):
    """Ours: how DeepSpeed runs the model."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """ZeRO stage: 0 replicates everything, 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    threads_per_rank: Count | None = None
    """CPU threads of each rank (null: PyTorch's choice)."""


class CheckpointSection(Section):
    """Ours: when checkpoints are written."""

    every_steps: Count | None = None
    """Optimizer steps between checkpoints (null: every epoch)."""
    keep: Count = 3
    """Newest checkpoints to keep."""


class MonitorSection(Section):
    """Ours: what is logged, and when."""

    every_steps: Count = 10
    """Optimizer steps between log lines."""
    rank_every_steps: Count = 50
    """Optimizer steps between measurements of the target features' rank (RankMe)."""
    hang_seconds: Positive | None = 1800
    """End the job when a rank makes no progress for so long, four times that before the first step (null: never)."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
