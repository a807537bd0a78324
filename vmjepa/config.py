"""The typed schema of the YAML files, and how to load one.

    cfg = load_pretrain("configs/pretrain/videomamba_tiny_16x224.yaml", ["optimization.lr=1e-4", "mask.0.num_blocks=4"])
    cfg.data.crop_size, cfg.grid, cfg.notices

Sections and keys are V-JEPA's, so files of V-JEPA and of the VideoMamba seed project load unchanged; the sections
masking, engine, checkpoint, monitor and probe are ours. Fields are described in config_sections.py and config_eval.py.
Nothing here imports torch, so a login node can check a config.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import yaml
from pydantic import Field, PrivateAttr, model_validator

from vmjepa.config_base import Count, KeyProblem, Section, Text, require_multiple
from vmjepa.config_eval import EvalDataSection, EvalOptimizationSection, EvalPretrainSection, ProbeSection
from vmjepa.config_load import load
from vmjepa.config_sections import (
    CheckpointSection,
    DataAugSection,
    DataSection,
    EngineSection,
    LoggingSection,
    LossSection,
    MaskConfig,
    MaskingSection,
    MetaSection,
    ModelSection,
    MonitorSection,
    OptimizationSection,
)
from vmjepa.errors import ConfigError

__all__ = ["EvalConfig", "MaskConfig", "PretrainConfig", "load_eval", "load_pretrain"]


class _Config(Section):
    nodes: Count = 1
    """Computers of a job."""
    tasks_per_node: Count = 1
    """Ranks (devices) per computer."""

    _notices: list[str] = PrivateAttr(default_factory=list)

    @property
    def notices(self) -> list[str]:
        """Sentences about keys that were accepted and do nothing; the caller logs them."""
        return self._notices

    def to_yaml(self) -> str:
        """The resolved config, every default written out; loading it gives an equal config and no notices."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class PretrainConfig(_Config):
    """A pretraining run."""

    misplaced: ClassVar[dict[str, str]] = dict.fromkeys(
        ("tag", "eval_name", "pretrain"), "this is an evaluation config; use it with vmjepa evaluate"
    )

    app: Literal["vjepa"] = "vjepa"
    """The objective."""
    data: DataSection
    """Which videos, and how a clip is cut from one."""
    data_aug: DataAugSection = DataAugSection()
    """Random crops."""
    logging: LoggingSection
    """Where the run's files go."""
    loss: LossSection = LossSection()
    """The objective's exponent and regulariser."""
    mask: Annotated[list[MaskConfig], Field(min_length=1)]
    """The masks; each predicts its targets from its own context, and the losses are averaged."""
    masking: MaskingSection = MaskingSection()
    """How masks are stacked."""
    meta: MetaSection = MetaSection()
    """Resuming, seed and precision."""
    model: ModelSection
    """Encoder and predictor."""
    optimization: OptimizationSection
    """AdamW and its schedules."""
    engine: EngineSection = EngineSection()
    """DeepSpeed."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When checkpoints are written."""
    monitor: MonitorSection = MonitorSection()
    """What is logged."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens of a clip along (time, rows, columns)."""
        side = self.data.crop_size // self.data.patch_size
        return self.data.num_frames // self.data.tubelet_size, side, side

    @property
    def num_tokens(self) -> int:
        """Tokens of a clip."""
        time, rows, columns = self.grid
        return time * rows * columns

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.optimization.epochs * self.optimization.ipe

    def micro_batch(self, world: int) -> int:
        """Videos per rank in one micro-batch on `world` ranks.

        Raises:
            ConfigError: when data.global_batch_size does not divide by ranks x accumulation_steps.
        """
        total, parts = self.data.global_batch_size, world * self.optimization.accumulation_steps
        if total is None:
            return self.data.batch_size
        if total % parts:
            raise ConfigError(
                f"data.global_batch_size: {total} videos do not divide by {world} ranks x "
                f"{self.optimization.accumulation_steps} accumulation steps; use a multiple of {parts}, or other ranks"
            )
        return total // parts

    def global_batch(self, world: int) -> int:
        """Videos per optimizer step on `world` ranks."""
        return self.micro_batch(world) * world * self.optimization.accumulation_steps


class EvalConfig(_Config):
    """A frozen evaluation: probes on top of a pretrained encoder."""

    misplaced: ClassVar[dict[str, str]] = dict.fromkeys(
        ("app", "mask", "model"), "this is a pretraining config; use it with vmjepa pretrain"
    )
    unused: ClassVar[dict[str, str]] = {"logging": "results go to the folder that the command names"}

    tag: Text | None = None
    """A name for the evaluation's folder."""
    eval_name: Literal["video_classification_frozen", "image_classification_frozen"]
    """What is classified."""
    resume_checkpoint: bool = False
    """Continue an interrupted evaluation."""
    data: EvalDataSection
    """Labelled data."""
    optimization: EvalOptimizationSection
    """Training of the probe."""
    pretrain: EvalPretrainSection
    """The frozen encoder."""
    probe: ProbeSection = ProbeSection()
    """Which probes."""

    @property
    def resolution(self) -> int:
        """Height and width of the encoder's input, in pixels."""
        if self.eval_name == "image_classification_frozen" and self.data.resolution is not None:
            return self.data.resolution
        return self.optimization.resolution

    @model_validator(mode="after")
    def _consistent(self) -> EvalConfig:
        video = self.eval_name == "video_classification_frozen"
        for key in ("dataset_train", "dataset_val") if video else ("root_path",):
            if getattr(self.data, key) is None:
                raise KeyProblem(f"data.{key}", f"missing; {self.eval_name} needs it, so add it")
        if self.pretrain.patch_size is not None:
            where = "optimization.resolution" if video or self.data.resolution is None else "data.resolution"
            require_multiple(where, self.resolution, "pretrain.patch_size", self.pretrain.patch_size)
        if self.pretrain.tubelet_size is not None:
            frames, tubelet = self.data.frames_per_clip, self.pretrain.tubelet_size
            require_multiple("data.frames_per_clip", frames, "pretrain.tubelet_size", tubelet)
        if self.optimization.warmup > self.optimization.num_epochs:
            text = f"{self.optimization.warmup:g} epochs do not fit {self.optimization.num_epochs} epochs; use fewer"
            raise KeyProblem("optimization.warmup", text)
        return self


C = TypeVar("C", bound=_Config)


def load_pretrain(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Loads a pretraining config; `overrides` are "key.sub=value" with YAML values.

    Raises ConfigError, one sentence naming file and key, for anything that cannot be used.
    """
    return _load(PretrainConfig, path, overrides)


def load_eval(path: str | Path, overrides: Sequence[str] = ()) -> EvalConfig:
    """Loads an evaluation config; see load_pretrain."""
    return _load(EvalConfig, path, overrides)


def _load(schema: type[C], path: str | Path, overrides: Sequence[str]) -> C:
    config, notices = load(schema, Path(path), overrides)
    config._notices.extend(notices)
    return config
