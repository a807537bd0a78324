"""The sections of an evaluation config (frozen probes), in V-JEPA's names; what this project added is marked so."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from vmjepa.config_base import (
    Count,
    NonNegative,
    Paths,
    Positive,
    PositiveRange,
    Section,
    ShareRange,
    Text,
)
from vmjepa.config_sections import DatasetType, Decoder, ModelName

ProbeKind = Literal["attentive", "linear"]


class EvalDataSection(Section):
    """Labelled data: videos (dataset_train, dataset_val) or images (root_path, image_folder, dataset_name)."""

    unsupported: ClassVar[dict[str, Any]] = {"clip_duration": None}

    num_classes: Annotated[int, Field(ge=2)]
    """Number of labels."""
    dataset_train: Paths | None = None
    """CSV files of `path label` rows, or shard folders, to train the probe on."""
    dataset_val: Paths | None = None
    """The same, to measure accuracy on."""
    dataset_type: DatasetType = "VideoDataset"
    """VideoDataset: CSVs of loose files; shards: folders written by the shard tool."""
    frames_per_clip: Count = 16
    """Frames per clip."""
    num_segments: Count = 1
    """Clips taken along each video in validation (and in training with attend_across_segments)."""
    num_views_per_segment: Count = 1
    """Spatial crops of each clip in validation."""
    frame_step: Count = 4
    """Distance between the frames of a clip, in frames of the video."""
    root_path: Text | None = None
    """Folder of image data sets."""
    image_folder: Text | None = None
    """Folder of class folders, under root_path."""
    dataset_name: Text | None = None
    """Name of the image data set, e.g. ImageNet, Places205, iNat21."""
    resolution: Count | None = None
    """Height and width of an image in pixels, for image evaluations (videos: optimization.resolution)."""
    decoder: Decoder = "auto"
    """Ours. auto: DALI on a GPU, and PyAV on the CPU."""
    num_workers: Count = 8
    """Ours. Decode threads per rank."""


class EvalOptimizationSection(Section):
    """Training of the probe."""

    num_epochs: Count
    """Passes over the training data."""
    batch_size: Count
    """Videos or images per rank in one micro batch."""
    lr: Positive
    """Highest learning rate."""
    start_lr: NonNegative
    """Learning rate of the first step."""
    final_lr: NonNegative = 0.0
    """Learning rate of the last step."""
    warmup: NonNegative = 0.0
    """Epochs during which the learning rate rises from start_lr to lr."""
    weight_decay: NonNegative = 0.01
    """AdamW's weight decay."""
    accumulation_steps: Count = 1
    """Micro batches per optimizer step."""
    resolution: Count = 224
    """Height and width of a clip in pixels."""
    attend_across_segments: bool = False
    """Show the probe the tokens of all segments of a video at once."""
    use_bfloat16: bool = False
    """Compute features in bfloat16."""
    horizontal_flip: bool = False
    """Ours (V-JEPA never flips here: in SSv2 left and right matter). Mirror half of the training clips."""
    random_resize_scale: ShareRange = (0.08, 1.0)
    """Ours. Range of a training crop's share of the frame's area."""
    random_resize_aspect_ratio: PositiveRange = (0.75, 1.33)
    """Ours. Range of a training crop's width over height."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default=[0], min_length=1)
    """Ours. The probe is trained once per seed; mean and spread are reported."""
    threads_per_rank: Count | None = None
    """Ours. CPU threads of each rank (null: PyTorch's choice). Small models run best on one."""


class EvalPretrainSection(Section):
    """The frozen encoder. A run directory needs no more than `folder`: its config.yaml describes the model."""

    unused: ClassVar[dict[str, str]] = {
        "use_sdpa": "attention always uses PyTorch's fused function",
        "tight_silu": "it only matters with use_silu",
        "classifier": "a probe is always trained anew, or resumed from its own folder",
    }
    unsupported: ClassVar[dict[str, Any]] = {"use_silu": False, "clip_duration": None}

    folder: Text
    """A run directory, or a folder that holds `checkpoint`."""
    checkpoint: Text | None = None
    """File or checkpoint folder inside `folder` (null: the newest checkpoint of the run)."""
    checkpoint_key: Literal["target_encoder", "encoder"] = "target_encoder"
    """Which of the checkpoint's encoders to evaluate."""
    model_name: ModelName | None = None
    """The encoder (null: as the run directory's config.yaml says)."""
    frames_per_clip: Count | None = None
    """Frames per clip in pretraining (default 16 when model_name is given)."""
    tubelet_size: Count | None = None
    """Frames per token (default 2 when model_name is given)."""
    patch_size: Count | None = None
    """Height and width of a token in pixels (default 16 when model_name is given)."""
    uniform_power: bool | None = None
    """Layout of the position embedding in pretraining (default true when model_name is given)."""
    write_tag: Text = "jepa"
    """A name for the evaluation in logs."""

    @model_validator(mode="before")
    @classmethod
    def _geometry_of_a_named_model(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("model_name") is None:
            return raw
        defaults = {"frames_per_clip": 16, "tubelet_size": 2, "patch_size": 16, "uniform_power": True}
        return raw | {key: value for key, value in defaults.items() if raw.get(key) is None}


class ProbeSection(Section):
    """Ours: which probes are trained."""

    kinds: list[ProbeKind] = Field(default=["attentive", "linear"], min_length=1)
    """attentive: one learned query over all tokens; linear: on the mean of the tokens."""
    standardize: bool = True
    """Standardise each feature dimension over the training set before the probe."""
    depth: Count = 1
    """Blocks of the attentive probe."""
    num_heads: Count | None = None
    """Attention heads of the attentive probe (null: chosen from the encoder)."""
    random_baseline: bool = True
    """Train the same probes on a randomly initialised encoder too, to show what pretraining gained."""
    single_frame_baseline: bool = False
    """Probe the pretrained encoder on clips that repeat their middle frame too, to show what needs no motion."""
    cached_draws: int = Field(default=0, ge=0)
    """0: clips are drawn and encoded anew in every epoch. K: K draws of each training clip, and the validation clips,
    are encoded once and kept in memory; epoch e uses draw e mod K."""
