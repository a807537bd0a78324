"""Every mistake in a config file or an override gives one sentence that names the file, the key and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vmjepa.config import load_eval, load_pretrain
from vmjepa.errors import ConfigError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
LOADERS = {"pretrain": load_pretrain, "evals": load_eval}
BASE = {"pretrain": "videomamba_tiny_16x224.yaml", "evals": "vit_small_ssv2_16x2x3.yaml"}


def error_of(kind: str, path: Path, *overrides: str) -> str:
    """The message of the ConfigError that loading `path` raises."""
    with pytest.raises(ConfigError) as excinfo:
        LOADERS[kind](path, overrides)
    assert excinfo.value.exit_code == 93
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


def broken(kind: str, tmp_path: Path, key: str, value: Any = ...) -> Path:
    """One of our files with the dotted `key` set to `value`, or without it."""
    raw = yaml.safe_load((CONFIGS / kind / BASE[kind]).read_text(encoding="utf-8"))
    node: Any = raw
    *parents, last = (int(part) if part.isdecimal() else part for part in key.split("."))
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else node[parent]
    node[last] = value
    if value is ...:
        del node[last]
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


UNKNOWN = {
    "data.cropsize": "did you mean data.crop_size?",
    "data.lr": "did you mean optimization.lr?",
    "loss.zzz": "known keys here: loss_exp, reg_coeff",
    "optimisation": "did you mean optimization?",
    "mask.1.num_block": "did you mean mask.1.num_blocks?",
    "engine.zerostage": "did you mean engine.zero_stage?",
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_unknown_key_names_the_nearest_known_one(tmp_path, key):
    path = broken("pretrain", tmp_path, key, 3)
    assert error_of("pretrain", path) == f"{path}: {key}: unknown key; {UNKNOWN[key]}"


WRONG_PRETRAIN = [
    ("data.crop_size", "big", "given 'big' (text), expected a whole number"),
    ("data.crop_size", 96.0, "given 96.0, expected a whole number"),
    ("data.batch_size", True, "given true, expected a whole number"),
    ("data.batch_size", None, "given null, expected a whole number"),
    ("data.batch_size", [4], "given [4], expected a whole number"),
    ("data.batch_size", 0, "given 0, expected at least 1"),
    ("data.pin_mem", 1, "given 1, expected true or false"),
    ("data.datasets", [], "given [], expected a list of at least 1"),
    ("data.datasets.0", 3, "given 3, expected text"),
    ("data.dataset_type", "tape", "given 'tape' (text), expected one of 'VideoDataset' or 'shards'"),
    ("data.mask_type", "tube", "'tube' (text) is not supported yet; set it to 'multiblock3d' (text) or remove the key"),
    ("data.clip_duration", 2.0, "2.0 is not supported yet; set it to null or remove the key"),
    ("data.max_bad_fraction", 2, "given 2, expected at most 1"),
    ("data_aug.auto_augment", True, "true is not supported yet; set it to false or remove the key"),
    ("data_aug.motion_shift", True, "true is not supported yet; set it to false or remove the key"),
    ("data_aug.reprob", 0.25, "0.25 is not supported yet; set it to 0.0 or remove the key"),
    ("data_aug.reprob", False, "false is not supported yet; set it to 0.0 or remove the key"),
    ("data_aug.random_resize_scale", [0.9, 0.3], "given [0.9, 0.3], expected the smaller number first: [0.3, 0.9]"),
    ("data_aug.random_resize_scale", [0.3], "given [0.3], expected a list of two numbers, e.g. [0.3, 1.0]"),
    ("data_aug.random_resize_scale.1", 2, "given 2, expected at most 1"),
    ("logging.folder", "", "given '' (text), expected text of at least 1 character"),
    ("mask.1.num_blocks", "two", "given 'two' (text), expected a whole number"),
    ("mask.0.spatial_scale.0", 0, "given 0, expected more than 0"),
    ("mask", [], "given [], expected a list of at least 1"),
    ("mask.0", "tube", "given 'tube' (text), expected a section of `key: value` lines"),
    ("mask", {"num_blocks": 2}, "given a section, expected a list"),
    ("data", "shards", "given 'shards' (text), expected a section of `key: value` lines"),
    ("data", [1], "given [1], expected a section of `key: value` lines"),
    ("model.init_std", "small", "given 'small', expected a number between 0 and 1, \"fan_in\", or null for 0.02"),
    ("model.in_chans", 1, "1 is not supported yet; set it to 3 or remove the key"),
    ("model.embed_dim", 96, "videomamba_tiny has a fixed size; remove the key, or use model_name videomamba_custom"),
    ("model.drop_path", 1.0, "given 1.0, expected less than 1"),
    ("optimization.lr", "fast", "given 'fast' (text), expected a number"),
    ("optimization.lr", float("nan"), "given nan, expected a finite number"),
    ("optimization.lr", -1.0, "given -1.0, expected more than 0"),
    ("optimization.ema.1", 1.5, "given 1.5, expected at most 1"),
    ("optimization.ema", 0.99, "given 0.99, expected a list of two numbers, e.g. [0.3, 1.0]"),
    ("optimization.betas", [0.9, 1.0], "given [0.9, 1.0], expected numbers below 1, e.g. [0.9, 0.999]"),
    ("optimization.warmup", 500, "500 epochs do not fit a run of 300 epochs; use fewer"),
    ("meta.seed", 2**31, "given 2147483648, expected less than 2147483648"),
    ("engine.zero_stage", 4, "given 4, expected at most 3"),
    ("meta.dtype", "float16", "float16 needs loss scaling, which is not supported; use bfloat16 or float32"),
    ("meta.dtype", "int8", "given 'int8' (text), expected one of 'float32' or 'bfloat16'"),
    ("meta.seed", -1, "given -1, expected at least 0"),
    ("data.crop_size", 100, "100 is not divisible by data.patch_size (16); use 96 or 112, or change data.patch_size"),
    ("data.crop_size", 8, "8 is not divisible by data.patch_size (16); use 16, or change data.patch_size"),
    ("data.num_frames", 9, "9 is not divisible by data.tubelet_size (2); use 8 or 10, or change data.tubelet_size"),
]
WRONG_EVAL = [
    ("data.num_classes", 1, "given 1, expected at least 2"),
    ("data.frames_per_clip", 9, "9 is not divisible by pretrain.tubelet_size (2); use 8 or 10"),
    ("optimization.resolution", 100, "100 is not divisible by pretrain.patch_size (16); use 96 or 112"),
    ("optimization.warmup", 30, "30 epochs do not fit 20 epochs; use fewer"),
    ("optimization.seeds", [], "given [], expected a list of at least 1"),
    ("optimization.seeds", "all", "given 'all' (text), expected a list"),
    ("pretrain.use_silu", True, "true is not supported yet; set it to false or remove the key"),
    ("pretrain.clip_duration", 2, "2 is not supported yet; set it to null or remove the key"),
    ("pretrain.checkpoint_key", "model", "given 'model' (text), expected one of 'target_encoder' or 'encoder'"),
    ("probe.kinds.0", "knn", "given 'knn' (text), expected one of 'attentive' or 'linear'"),
    ("probe.standardise", True, "unknown key; did you mean probe.standardize?"),
    ("eval_name", "guessing", "given 'guessing' (text), expected one of 'video_classification_frozen' or"),
]


@pytest.mark.parametrize(
    ("kind", "key", "value", "expected"),
    [("pretrain", *row) for row in WRONG_PRETRAIN] + [("evals", *row) for row in WRONG_EVAL],
    ids=[f"{row[0]}={row[1]}" for row in WRONG_PRETRAIN + WRONG_EVAL],
)
def test_wrong_value_is_named_with_what_was_expected(tmp_path, kind, key, value, expected):
    path = broken(kind, tmp_path, key, value)
    assert error_of(kind, path).startswith(f"{path}: {key}: {expected}")


@pytest.mark.parametrize(
    ("kind", "key", "expected"),
    [
        ("pretrain", "data.batch_size", "missing; add it: Videos per rank in one micro batch"),
        ("pretrain", "optimization.ipe", "missing; add it: Optimizer steps per epoch."),
        ("pretrain", "mask.0.num_blocks", "missing; add it: Blocks per clip."),
        ("pretrain", "logging.folder", "missing; add it: The run directory."),
        ("pretrain", "data", "missing; add it: Which videos"),
        ("pretrain", "logging", "missing; add it: Where"),
        ("pretrain", "mask", "missing; add it: The masks"),
        ("pretrain", "model", "missing; add it: Encoder and predictor."),
        ("pretrain", "optimization", "missing; add it: AdamW"),
        ("evals", "data.dataset_val", "missing; video_classification_frozen needs it, so add it"),
        ("evals", "pretrain.folder", "missing; add it: A run directory"),
        ("evals", "eval_name", "missing; add it: What is classified."),
        ("evals", "data", "missing; add it: Labelled data"),
        ("evals", "optimization", "missing; add it: Training of the probe."),
        ("evals", "pretrain", "missing; add it: The frozen encoder."),
    ],
)
def test_missing_key_or_section_is_named_with_its_meaning(tmp_path, kind, key, expected):
    path = broken(kind, tmp_path, key)
    assert error_of(kind, path).startswith(f"{path}: {key}: {expected}")


def test_config_of_the_other_command_is_recognised():
    pretrain, evals = (CONFIGS / kind / BASE[kind] for kind in ("pretrain", "evals"))
    assert error_of("evals", pretrain) == f"{pretrain}: app: this is a pretraining config; use it with vmjepa pretrain"
    assert error_of("pretrain", evals) == f"{evals}: tag: this is an evaluation config; use it with vmjepa evaluate"


def test_several_problems_are_all_named_at_once(tmp_path):
    path = broken("pretrain", tmp_path, "optimization", {"lr": "fast", "ipe": 3, "epochs": 2, "warmup": 0})
    message = error_of("pretrain", path)
    assert ": optimization.lr: given 'fast' (text), expected a number (also to mend: " in message
    assert message.endswith("optimization.start_lr, optimization.final_lr)")


def test_section_left_empty_counts_as_missing_when_it_is_required(tmp_path):
    path = broken("pretrain", tmp_path, "data", None)
    assert error_of("pretrain", path).startswith(f"{path}: data: missing; add it: ")


def test_image_evaluation_needs_images(tmp_path):
    path = broken("evals", tmp_path, "eval_name", "image_classification_frozen")
    assert "data.root_path: missing; image_classification_frozen needs it" in error_of("evals", path)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"embed_dim": 96}, "model.depth: missing; model_name vit_custom has no size of its own, so add it"),
        ({"embed_dim": 96, "depth": 2}, "model.num_heads: missing; model_name vit_custom has no size"),
        ({"embed_dim": 96, "depth": 2, "num_heads": 5}, "model.embed_dim: 96 is not divisible by model.num_heads (5)"),
    ],
    ids=["no depth", "no heads", "heads"],
)
def test_custom_model_needs_its_sizes(tmp_path, sizes, expected):
    path = broken("pretrain", tmp_path, "model", {"model_name": "vit_custom", **sizes})
    assert f": {expected}" in error_of("pretrain", path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.cropsize=96", "data.cropsize: unknown key; did you mean data.crop_size?"),
        ("mask.0.blocks=4", "mask.0.blocks: unknown key; did you mean mask.0.num_blocks?"),
        ("optimisation=4", "optimisation: unknown key; did you mean optimization?"),
        ("data.crop_size=100", "data.crop_size: 100 is not divisible by data.patch_size (16)"),
        ("data.batch_size=many", "data.batch_size: given 'many' (text), expected a whole number"),
        ("optimization.lr=", "optimization.lr: given null, expected a number"),
        ("data.batch_size", "expected key.sub=value, e.g. optimization.lr=1e-4"),
        ("=4", "expected key.sub=value, e.g. optimization.lr=1e-4"),
        ("data..crop_size=96", "expected key.sub=value, e.g. optimization.lr=1e-4"),
        ("optimization.ema=[0.9, 1.0", "the value is not YAML: line 1, column 10: "),
        ("mask.2.num_blocks=4", "mask is a list of 2; name an entry from mask.0 to mask.1"),
        ("mask.last.num_blocks=4", "mask is a list of 2; name an entry from mask.0 to mask.1"),
        ("nodes.x=4", "nodes is the value 2, no section; set nodes="),
    ],
)
def test_wrong_override_is_named(override, expected):
    message = error_of("pretrain", CONFIGS / "pretrain" / BASE["pretrain"], "nodes=2", override)
    assert message.startswith(f"override {override!r}: {expected}")


def test_problem_of_another_key_mentions_file_and_overrides():
    path = CONFIGS / "pretrain" / BASE["pretrain"]
    message = error_of("pretrain", path, "data.patch_size=10")
    assert message.startswith(
        f"{path} with data.patch_size=10: data.crop_size: 224 is not divisible by data.patch_size"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"", "the file is empty; start from a file in configs/", id="empty"),
        pytest.param(b"# only a comment\n", "the file is empty", id="only comments"),
        pytest.param(b"- 1\n- 2\n", "expected `section:` lines, found [1, 2]", id="a list"),
        pytest.param(b"just text\n", "expected `section:` lines, found 'just text' (text)", id="text"),
        pytest.param(b"app: vjepa\ndata: [1, 2\nmodel: 3\n", "line 3, column", id="open bracket"),
        pytest.param(b"app: vjepa\ndata:\n\tbatch_size: 3\n", "line 3, column 1: ", id="tab"),
        pytest.param(b"a: 1\nb: {c: 1}\nb: {c: 2}\n", "line 3, column 1: key 'b' appears twice; keep one", id="twice"),
        pytest.param(b"app: \xff\xfe\n", "not a text file; name a YAML file in UTF-8", id="not text"),
        pytest.param(b"app: \x00\n", "", id="control character"),
    ],
)
@pytest.mark.parametrize("kind", ["pretrain", "evals"])
def test_unreadable_file_is_named_with_the_line(tmp_path, kind, content, expected):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    assert error_of(kind, path).startswith(f"{path}: {expected}")


@pytest.mark.parametrize("kind", ["pretrain", "evals"])
def test_missing_file_and_folder(tmp_path, kind):
    missing = tmp_path / "nowhere.yaml"
    assert error_of(kind, missing).startswith(f"{missing}: no such config file; check the path")
    assert error_of(kind, tmp_path) == f"{tmp_path}: this is a folder; name a YAML file inside it"
