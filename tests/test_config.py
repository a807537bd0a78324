"""Config files: those of V-JEPA and of the seed project keep their meaning, ours load, overrides apply."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vmjepa.config import EvalConfig, PretrainConfig, load_eval, load_pretrain
from vmjepa.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN_FILES = sorted((ROOT / "configs/pretrain").glob("*.yaml"))
EVAL_FILES = sorted((ROOT / "configs/evals").glob("*.yaml"))

# The key structure of the originals, with values of our own; numbers in every spelling that those files use.
VJEPA_PRETRAIN = """
app: vjepa
nodes: 2
tasks_per_node: 4
data:
  dataset_type: VideoDataset
  datasets:
    - /data/one.csv
    # - /data/two.csv
    - /data/three.csv
  decode_one_clip: true
  batch_size: 6
  num_clips: 1
  num_frames: 8
  tubelet_size: 2
  sampling_rate: 3
  crop_size: 96
  patch_size: 8
  pin_mem: true
  num_workers: 5
  filter_short_videos: false
  clip_duration: null
data_aug:
  auto_augment: false
  motion_shift: false
  random_resize_aspect_ratio:
  - 0.8
  - 1.2
  random_resize_scale:
  - 0.5
  - 1.0
  reprob: 0.0
logging:
  folder:  /runs/first/
  write_tag: first
loss:
  loss_exp: 1.0
  reg_coeff: 0.0
mask:
  - aspect_ratio: [0.5, 2.0]
    num_blocks: 3
    spatial_scale: [0.2, 0.2]
    temporal_scale: [1.0, 1.0]
    max_temporal_keep: 1.0
    max_keep: null
  - aspect_ratio: [0.5, 2.0]
    num_blocks: 1
    spatial_scale: [0.6, 0.6]
    temporal_scale: [1.0, 1.0]
    max_temporal_keep: 1.0
    max_keep: 40
meta:
  load_checkpoint: false
  read_checkpoint: null
  seed: 7
  eval_freq: 50
  use_sdpa: true
  dtype: bfloat16
model:
  model_name: vit_small
  pred_depth: 4
  pred_embed_dim: 96
  uniform_power: true
  use_mask_tokens: true
  zero_init_mask_tokens: true
optimization:
  ipe: 20
  ipe_scale: 1.25
  clip_grad: 10.0
  weight_decay: 0.05
  final_weight_decay: 0.3
  epochs: 30
  warmup: 4
  start_lr: 0.0001
  lr: 0.0005
  final_lr: 1.0e-06
  ema:
  - 0.99
  - 1.0
"""
VIDEO_EVAL = """
nodes: 1
tasks_per_node: 2
tag: gestures-8x2x3
eval_name: video_classification_frozen
resume_checkpoint: false
data:
  dataset_train: /data/train.csv
  dataset_val: /data/val.csv
  dataset_type: VideoDataset
  num_classes: 12
  frames_per_clip: 8
  num_segments: 2
  num_views_per_segment: 3
  frame_step: 3
optimization:
  attend_across_segments: true
  num_epochs: 5
  resolution: 96
  batch_size: 6
  weight_decay: 0.02
  lr: 0.002
  start_lr: 0.002
  final_lr: 0.0
  warmup: 0.
  use_bfloat16: true
pretrain:
  model_name: vit_small
  checkpoint_key: target_encoder
  clip_duration: null
  frames_per_clip: 8
  tubelet_size: 2
  uniform_power: true
  use_silu: false
  tight_silu: false
  use_sdpa: true
  patch_size: 8
  folder: /runs/first/
  checkpoint: first-latest.pth.tar  # inside folder
  write_tag: first
"""


def edited(text: str, **changes: dict[str, Any]) -> str:
    """The YAML text with keys of some sections set; `...` removes a key."""
    raw = yaml.safe_load(text)
    for section, keys in changes.items():
        for key, value in keys.items():
            raw.setdefault(section, {})[key] = value
            if value is ...:
                del raw[section][key]
    return yaml.safe_dump(raw)


SEED_PRETRAIN = edited(
    VJEPA_PRETRAIN,
    meta={"use_sdpa": ..., "load_checkpoint": True, "dtype": "float32"},
    model={"model_name": "videomamba_tiny", "pred_head_dim": 24},
    optimization={"accumulation_steps": 4, "lr": 0.00001875, "betas": [0.9, 0.98], "eps": 1.0e-06},
)
# Keys that the originals' code reads although none of their files sets them.
OPTIONAL_PRETRAIN = edited(
    VJEPA_PRETRAIN,
    data={"mask_type": "multiblock3d", "datasets_weights": [0.3, 0.7], "log_resource_utilization": True},
    meta={"save_every_freq": 10, "skip_batches": -1},
)
SEED_EVAL = edited(VIDEO_EVAL, pretrain={"model_name": "videomamba_tiny"}, optimization={"accumulation_steps": 4})
FORK_EVAL = edited(VIDEO_EVAL, logging={"folder": "/logs"}, pretrain={"classifier": "probe.pth.tar"})
IMAGE_EVAL = edited(
    VIDEO_EVAL,
    data={
        "dataset_train": ..., "dataset_val": ..., "dataset_type": ..., "frames_per_clip": ..., "num_segments": ...,
        "num_views_per_segment": ..., "frame_step": ..., "root_path": "/images/", "image_folder": "birds/v1/",
        "resolution": 128, "dataset_name": "ImageNet",
    },
    optimization={"attend_across_segments": ..., "resolution": ...},
).replace("video_classification", "image_classification")  # fmt: skip


@pytest.fixture
def pretrain(tmp_path: Path):
    """Loads pretraining YAML text with overrides."""

    def load(text: str = VJEPA_PRETRAIN, *overrides: str) -> PretrainConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_pretrain(path, overrides)

    return load


@pytest.fixture
def evaluation(tmp_path: Path):
    """Loads evaluation YAML text with overrides."""

    def load(text: str = VIDEO_EVAL, *overrides: str) -> EvalConfig:
        path = tmp_path / "eval.yaml"
        path.write_text(text, encoding="utf-8")
        return load_eval(path, overrides)

    return load


def unused_keys(cfg: PretrainConfig | EvalConfig) -> set[str]:
    """The keys that the notices are about."""
    return {notice.split(": ")[1].split(" ")[0] for notice in cfg.notices}


def leaves(raw: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(raw, dict):
        return {k: v for key, value in raw.items() for k, v in leaves(value, f"{prefix}{key}.").items()}
    if isinstance(raw, list) and raw and isinstance(raw[0], dict):
        return {k: v for i, value in enumerate(raw) for k, v in leaves(value, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): raw}


# --- files of the originals -------------------------------------------------------------------------------------------

NO_NOTICE_NEUTRAL = {
    "model.use_mask_tokens",
    "data.clip_duration",
    "data_aug.auto_augment",
    "data_aug.motion_shift",
    "data_aug.reprob",
    "data.mask_type",
}


@pytest.mark.parametrize(
    ("text", "unused"),
    [
        pytest.param(VJEPA_PRETRAIN, {"data.decode_one_clip", "meta.eval_freq", "meta.use_sdpa"}, id="vjepa"),
        pytest.param(SEED_PRETRAIN, {"data.decode_one_clip", "meta.eval_freq", "model.pred_head_dim"}, id="seed"),
        pytest.param(
            OPTIONAL_PRETRAIN,
            {"data.decode_one_clip", "meta.eval_freq", "meta.use_sdpa", "data.datasets_weights",
             "data.log_resource_utilization", "meta.save_every_freq", "meta.skip_batches"},
            id="optional keys",
        ),
    ],
)  # fmt: skip
def test_original_pretrain_file_keeps_every_value(pretrain, text, unused):
    """Each key of the file is an attribute with the file's value, or named in a notice, or a neutral switch."""
    cfg = pretrain(text)
    assert unused_keys(cfg) == unused
    resolved = leaves(yaml.safe_load(cfg.to_yaml()))
    for key, value in leaves(yaml.safe_load(text)).items():
        if key not in unused | NO_NOTICE_NEUTRAL:
            assert resolved[key] == value, key


@pytest.mark.parametrize(
    ("text", "unused"),
    [
        pytest.param(VIDEO_EVAL, set(), id="vjepa video"),
        pytest.param(SEED_EVAL, set(), id="seed video"),
        pytest.param(IMAGE_EVAL, set(), id="vjepa image"),
        pytest.param(FORK_EVAL, {"logging", "pretrain.classifier"}, id="a fork's logging section"),
    ],
)
def test_original_eval_file_keeps_every_value(evaluation, text, unused):
    """As for pretraining files; a single CSV path becomes a list of one."""
    cfg = evaluation(text)
    assert unused_keys(cfg) == unused | {"pretrain.use_sdpa", "pretrain.tight_silu"}
    resolved = leaves(yaml.safe_load(cfg.to_yaml()))
    for key, value in leaves(yaml.safe_load(text)).items():
        if key not in unused_keys(cfg) | {"logging.folder", "pretrain.use_silu", "pretrain.clip_duration"}:
            assert resolved[key] in (value, [value]), key


def test_image_eval_takes_its_resolution_from_data(evaluation):
    assert evaluation(IMAGE_EVAL).resolution == 128
    assert evaluation(VIDEO_EVAL).resolution == 96


def test_dataset_type_is_compared_without_case_as_the_originals_do(pretrain):
    assert pretrain(edited(VJEPA_PRETRAIN, data={"dataset_type": "videodataset"})).data.dataset_type == "VideoDataset"


# --- our own files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PRETRAIN_FILES, ids=lambda path: path.stem)
def test_our_pretrain_files_load_without_notices(path):
    cfg = load_pretrain(path)
    assert cfg.notices == []
    if path.stem != "demo":
        assert path.stem == f"{cfg.model.model_name}_16x224"
        assert cfg.grid == (8, 14, 14)
        assert cfg.global_batch(cfg.nodes * cfg.tasks_per_node) == 3072


@pytest.mark.parametrize("path", EVAL_FILES, ids=lambda path: path.stem)
def test_our_eval_files_load_without_notices(path):
    """All models are evaluated alike: files of one benchmark differ in the model and the batch split only."""
    cfg = load_eval(path)
    assert cfg.notices == []
    if path.stem == "demo":
        return
    model, tag, views = path.stem.rsplit("_", 2)
    assert (cfg.pretrain.model_name, cfg.tag) == (model, f"{tag}-{views}")
    assert views == f"{cfg.data.frames_per_clip}x{cfg.data.num_segments}x{cfg.data.num_views_per_segment}"
    ranks = cfg.nodes * cfg.tasks_per_node
    assert cfg.optimization.batch_size * cfg.optimization.accumulation_steps * ranks == 256
    like = load_eval(ROOT / "configs/evals" / f"vit_large_{tag}_{views}.yaml")
    split = {"batch_size", "accumulation_steps"}
    assert cfg.data == like.data
    assert cfg.optimization.model_dump(exclude=split) == like.optimization.model_dump(exclude=split)


def test_our_files_cover_the_promised_models():
    models = {f"videomamba_{size}" for size in ("tiny", "small", "middle")}
    models |= {f"vit_{size}" for size in ("tiny", "small", "base", "large", "huge")}
    assert {path.stem.removesuffix("_16x224") for path in PRETRAIN_FILES} - {"demo"} == models
    evals = {f"{model}_{benchmark}" for model in models for benchmark in ("ssv2_16x2x3", "k400_16x8x3")}
    assert {path.stem for path in EVAL_FILES} - {"demo"} == evals


# --- resolved config, derived values, overrides -----------------------------------------------------------------------


@pytest.mark.parametrize("text", [VJEPA_PRETRAIN, SEED_PRETRAIN], ids=["vjepa", "seed"])
def test_resolved_pretrain_config_loads_again_unchanged(pretrain, text):
    first = pretrain(text)
    again = pretrain(first.to_yaml())
    assert again.model_dump() == first.model_dump()
    assert again.to_yaml() == first.to_yaml()
    assert again.notices == []


@pytest.mark.parametrize("text", [VIDEO_EVAL, IMAGE_EVAL], ids=["video", "image"])
def test_resolved_eval_config_loads_again_unchanged(evaluation, text):
    first = evaluation(text)
    again = evaluation(first.to_yaml())
    assert again.model_dump() == first.model_dump()
    assert again.notices == []


def test_derived_values(pretrain):
    cfg = pretrain(SEED_PRETRAIN)
    assert cfg.grid == (4, 12, 12)
    assert cfg.num_tokens == 576
    assert cfg.total_steps == 600
    assert cfg.global_batch(world=3) == 6 * 3 * 4


def test_config_cannot_be_changed_after_loading(pretrain):
    cfg = pretrain()
    with pytest.raises(ValueError, match="frozen"):
        cfg.data.batch_size = 3


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimization.lr=1e-4", "optimization", "lr", 1e-4),
        ("optimization.ema=[.9, 1.0]", "optimization", "ema", (0.9, 1.0)),
        ("optimization.clip_grad=null", "optimization", "clip_grad", None),
        ("engine.zero_stage=3", "engine", "zero_stage", 3),
        ("data.datasets=[a b.csv, ü.csv]", "data", "datasets", ["a b.csv", "ü.csv"]),
        ("data.datasets=shards/x=1", "data", "datasets", ["shards/x=1"]),
        ("data.datasets.1=/new.csv", "data", "datasets", ["/data/one.csv", "/new.csv"]),
        ("model.init_std=fan_in", "model", "init_std", "fan_in"),
        ("model.init_std=0.01", "model", "init_std", 0.01),
        ("meta.dtype=BFloat16", "meta", "dtype", "bfloat16"),
    ],
)
def test_override_sets_the_key(pretrain, override, section, key, value):
    assert getattr(getattr(pretrain(VJEPA_PRETRAIN, override), section), key) == value


def test_override_reaches_list_entries_and_the_last_one_wins(pretrain):
    cfg = pretrain(VJEPA_PRETRAIN, "mask.1.num_blocks=4", "mask.1.num_blocks=5", "nodes=3")
    assert [mask.num_blocks for mask in cfg.mask] == [3, 5]
    assert cfg.nodes == 3


def test_numbers_that_yaml_reads_as_text_are_numbers(pretrain):
    """YAML 1.1 takes 1e-6 and 2.E-4 without sign or point for text."""
    text = VJEPA_PRETRAIN.replace("1.0e-06", "1e-6").replace("start_lr: 0.0001", "start_lr: 1E-4")
    assert isinstance(yaml.safe_load(text)["optimization"]["final_lr"], str)
    cfg = pretrain(text)
    assert (cfg.optimization.final_lr, cfg.optimization.start_lr) == (1e-6, 1e-4)


def test_empty_optional_section_means_defaults(pretrain):
    cfg = pretrain(VJEPA_PRETRAIN + "\nengine:\nmonitor:\n")
    assert (cfg.engine.zero_stage, cfg.monitor.every_steps) == (1, 10)


def test_eval_of_a_run_directory_needs_only_the_folder(evaluation):
    raw = yaml.safe_load(VIDEO_EVAL)
    raw["pretrain"] = {"folder": "runs/mine"}
    cfg = evaluation(yaml.safe_dump(raw))
    assert (cfg.pretrain.model_name, cfg.pretrain.patch_size, cfg.pretrain.checkpoint) == (None, None, None)
    raw["pretrain"]["model_name"] = "vit_tiny"
    cfg = evaluation(yaml.safe_dump(raw))
    assert (cfg.pretrain.frames_per_clip, cfg.pretrain.tubelet_size, cfg.pretrain.patch_size) == (16, 2, 16)


def test_config_does_not_import_torch():
    """A login node checks configs and submits jobs without it."""
    code = "import sys, vmjepa.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_global_batch_is_split_over_ranks_and_micro_batches():
    cfg = load_pretrain(ROOT / "configs/pretrain/videomamba_tiny_16x224.yaml", ["data.global_batch_size=24"])
    parts = cfg.optimization.accumulation_steps
    assert cfg.micro_batch(2) * 2 * parts == cfg.global_batch(2) == 24
    with pytest.raises(ConfigError, match=rf"24 videos do not divide by 7 ranks x {parts} .*multiple of {7 * parts}"):
        cfg.micro_batch(7)
