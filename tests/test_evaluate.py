"""A whole frozen evaluation on small shards: deterministic, resumable, equal cached and uncached; what it refuses."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.clip_maker import make_clip
from tools.shard.pack import PackOptions, pack
from vmjepa.config import load_eval, load_pretrain
from vmjepa.errors import CheckpointError, ConfigError, DataError
from vmjepa.evals import earlier, video
from vmjepa.evals.features import Arm, Looks, TokenStatistics, build_arms, find_pretrained
from vmjepa.models import build_encoder
from vmjepa.run_dir import RunDir
from vmjepa.train.checkpoint import MODEL, Checkpoint, save
from vmjepa.train.distributed import World

ALONE = World(0, 1, torch.device("cpu"))
PRETRAIN = {
    "data": {
        "datasets": ["none"],
        "batch_size": 2,
        "num_frames": 4,
        "sampling_rate": 1,
        "crop_size": 16,
        "patch_size": 8,
    },
    "mask": [{"num_blocks": 1, "spatial_scale": [0.5, 0.5]}],
    "model": {"model_name": "videomamba_custom", "embed_dim": 24, "depth": 1, "pred_depth": 1, "pred_embed_dim": 24},
    "optimization": {"ipe": 1, "epochs": 1, "warmup": 0, "lr": 1e-3, "start_lr": 1e-3, "final_lr": 1e-3},
    "meta": {"seed": 3},
    "logging": {"folder": "set below"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Shards of 10 training and 5 validation videos in 2 classes, and a run whose encoder has left its start."""
    folder = tmp_path_factory.mktemp("evaluate")
    for part, count in (("train", 10), ("val", 5)):
        for i in range(count):
            path = folder / part / f"class{i % 2}" / f"{i}.webm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make_clip(frames=6 + i % 2, seed=100 * (part == "val") + i))
        pack(folder / part, folder / "shards" / part, PackOptions())
    run = RunDir(folder / "run")
    run.create()
    content = PRETRAIN | {"logging": {"folder": str(run.root)}}
    run.config.write_text(yaml.safe_dump(content))
    torch.manual_seed(99)
    encoder = build_encoder(load_pretrain(run.config))
    state = {f"target_encoder.{name}": value for name, value in encoder.state_dict().items()}
    save(run, Checkpoint(7, state, {"step": 7, "exp_avg": {}, "exp_avg_sq": {}}), {}, keep=2)
    return folder


def config(folder: Path, tmp_path: Path, *overrides: str) -> Any:
    content = {
        "tag": tmp_path.name,
        "eval_name": "video_classification_frozen",
        "data": {
            "dataset_train": str(folder / "shards/train"),
            "dataset_val": str(folder / "shards/val"),
            "num_classes": 2,
            "frames_per_clip": 4,
            "frame_step": 1,
            "num_segments": 2,
            "num_views_per_segment": 2,
            "num_workers": 2,
        },
        "optimization": {"num_epochs": 2, "batch_size": 4, "lr": 0.01, "start_lr": 0.01, "resolution": 16},
        "pretrain": {"folder": str(folder / "run")},
    }
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(content))
    return load_eval(tmp_path / "eval.yaml", overrides)


def probes_of(cfg: Any) -> list[torch.Tensor]:
    state = torch.load(earlier.output_folder(cfg) / earlier.PROBES, weights_only=True)
    return [value for head in state["heads"] for value in head["probe"].values()]


def test_report_holds_every_probe_and_counts_every_video(folder: Path, tmp_path: Path) -> None:
    """Two encoders and the single frame, 2 kinds, 2 seeds, 5 validation videos each; the JSON file is what returned."""
    cfg = config(folder, tmp_path, "optimization.seeds=[0,1]", "probe.single_frame_baseline=true")
    report = video.evaluate(cfg)
    assert json.loads((earlier.output_folder(cfg) / earlier.RESULTS).read_text()) == report
    found = {(p["encoder"], p["single_frame"], p["probe"], p["seed"]) for p in report["probes"]}
    assert len(found) == len(report["probes"]) == 12
    assert {p["total"] for p in report["probes"]} == {5}
    assert report["chance"] == {"uniform": 0.5, "majority": 0.6}
    assert report["checkpoint"] == "step_00000007"
    assert set(report["verdict"]) == {"attentive", "linear"}
    assert load_eval(earlier.output_folder(cfg) / "config.yaml").model_dump() == cfg.model_dump()


@pytest.mark.parametrize("joined", ["true", "false"], ids=["across-segments", "segments-apart"])
def test_cached_and_fresh_tokens_train_equal_probes(folder: Path, tmp_path: Path, joined: str) -> None:
    """Two epochs on two cached draws against two epochs of fresh draws: equal clips, so equal probes to rounding."""
    made = []
    for draws in (0, 2):
        cfg = config(
            folder,
            tmp_path,
            f"probe.cached_draws={draws}",
            f"optimization.attend_across_segments={joined}",
            f"tag={tmp_path.name}-{draws}",
        )
        made.append((video.evaluate(cfg)["probes"], probes_of(cfg)))
    for fresh, cached in zip(made[0][1], made[1][1], strict=True):
        torch.testing.assert_close(fresh, cached, rtol=1e-4, atol=1e-5)
    assert [p["correct"] for p in made[0][0]] == [p["correct"] for p in made[1][0]]


def test_interrupted_evaluation_resumes_to_the_same_probes(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Stopped after the first of three epochs, then resumed: bit-identical to an unbroken evaluation."""
    overrides = ("optimization.num_epochs=3", "resume_checkpoint=true")
    whole = config(folder, tmp_path, *overrides, "tag=whole")
    video.evaluate(whole)
    broken = config(folder, tmp_path, *overrides, "tag=broken")
    original = video.Evaluation._epoch_done

    def stop(self: Any, result: Any) -> None:
        original(self, result)
        raise KeyboardInterrupt

    monkeypatch.setattr(video.Evaluation, "_epoch_done", stop)
    with pytest.raises(KeyboardInterrupt):
        video.evaluate(broken)
    epochs = []
    monkeypatch.setattr(video.Evaluation, "_epoch_done", lambda self, r: (epochs.append(r.epoch), original(self, r)))
    video.evaluate(broken)
    assert epochs == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(probes_of(whole), probes_of(broken), strict=True))


QUICK = ("probe.kinds=[linear]", "probe.random_baseline=false", "optimization.num_epochs=1")


def epochs_of(cfg: Any, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Runs an evaluation and returns the epochs it trained; `stop_after` interrupts it after that epoch."""
    epochs, original = [], video.Evaluation._epoch_done

    def done(self: Any, result: Any) -> None:
        original(self, result)
        epochs.append(result.epoch)
        if result.epoch == stop_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(video.Evaluation, "_epoch_done", done)
        video.evaluate(cfg)
    return epochs


def test_only_the_same_evaluation_is_resumed(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Interrupted without resume_checkpoint: with it, it goes on; with another config, checkpoint or damage it says so.

    The weights change by the run being trained anew into its folder: the checkpoint's name stays.
    """
    two, resume = (*QUICK, "optimization.num_epochs=2"), "resume_checkpoint=true"
    assert epochs_of(config(folder, tmp_path, *two), monkeypatch, stop_after=0) == [0]
    with pytest.raises(ConfigError, match=r"optimization.lr was 0.01 and is 0.02.*another tag, or resume_checkpoint=f"):
        video.evaluate(config(folder, tmp_path, *two, resume, "optimization.lr=0.02"))
    cfg = config(folder, tmp_path, *two, resume, "data.num_workers=1")
    pretrained = find_pretrained(cfg)
    with monkeypatch.context() as patch:
        patch.setattr(earlier, "identity", lambda _: {"name": "step_00000007", "sha256": "other"})
        with pytest.raises(ConfigError, match="the weights of step_00000007 have changed"):
            earlier.saved_state(earlier.output_folder(cfg), cfg, pretrained, ALONE.device)
    assert epochs_of(cfg, monkeypatch) == [1]


@pytest.mark.parametrize("draws", [0, 2], ids=["fresh", "cached"])
def test_replaced_clips_are_reported(folder: Path, tmp_path: Path, draws: int, monkeypatch, caplog, capsys) -> None:
    """One of ten training videos is broken: each of its two clips is named, and counted, over an interruption too."""
    rows = []
    for i in range(10):
        path = tmp_path / f"{i}.webm"
        path.write_bytes((folder / f"train/class{i % 2}/{i}.webm").read_bytes() if i != 3 else b"no video")
        rows.append(f"{path} {i % 2}\n")
    (tmp_path / "train.csv").write_text("".join(rows))
    common = (
        *QUICK,
        f"probe.cached_draws={draws}",
        f"data.dataset_train={tmp_path}/train.csv",
        "optimization.batch_size=5",
    )
    cfg = config(folder, tmp_path, *common, "optimization.num_epochs=2", "resume_checkpoint=true")
    assert epochs_of(cfg, monkeypatch, stop_after=0) == [0]
    caplog.clear()
    report = video.evaluate(cfg)
    assert report["replaced_clips"] == 2
    assert "another's in their place: 2" in " ".join(capsys.readouterr().out.split())
    named = [r.getMessage() for r in caplog.records if "3.webm" in r.getMessage() and r.levelname == "WARNING"]
    assert len(named) == (2 if draws else 1)  # cached clips are made again, fresh ones of the first epoch are not


def test_damaged_probes_are_named(folder: Path, tmp_path: Path) -> None:
    """A flipped byte anywhere, a truncated, an empty and a foreign file: one sentence with a remedy, never a state."""
    cfg = config(folder, tmp_path, *QUICK)
    video.evaluate(cfg)
    out, pretrained = earlier.output_folder(cfg), find_pretrained(cfg)
    whole = (out / earlier.PROBES).read_bytes()
    weights = max(zipfile.ZipFile(out / earlier.PROBES).infolist(), key=lambda info: info.file_size)
    damaged = [whole[: len(whole) // 2], b"", b"not a file of ours", whole[:-1]]
    for place in (weights.header_offset + 200 + weights.file_size // 2, len(whole) - 30):
        damaged.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    other = io.BytesIO()
    torch.save({"epochs": 1}, other)
    for data in (*damaged, other.getvalue()):
        (out / earlier.PROBES).write_bytes(data)
        with pytest.raises(CheckpointError, match=r"is damaged.*remove it, or set resume_checkpoint=false"):
            earlier.saved_state(out, cfg, pretrained, ALONE.device)
    (out / earlier.PROBES).write_bytes(whole)
    assert earlier.saved_state(out, cfg, pretrained, ALONE.device)["epochs"] == 1


def test_results_of_another_evaluation_are_not_overwritten(folder: Path, tmp_path: Path) -> None:
    """The same evaluation may run again; another one, or illegible results, are refused and nothing changes."""
    cfg = config(folder, tmp_path, *QUICK)
    first = video.evaluate(cfg)
    assert video.evaluate(config(folder, tmp_path, *QUICK, "pretrain.checkpoint=step_00000007")) == first
    out = earlier.output_folder(cfg)
    before = (out / earlier.RESULTS).read_bytes(), (out / earlier.CONFIG).read_bytes()
    for resume in ("true", "false"):
        with pytest.raises(ConfigError, match=r"results of another evaluation.*seeds was .0. and is .1.*another tag"):
            video.evaluate(config(folder, tmp_path, *QUICK, "optimization.seeds=[1]", f"resume_checkpoint={resume}"))
    assert ((out / earlier.RESULTS).read_bytes(), (out / earlier.CONFIG).read_bytes()) == before
    shutil.copytree(folder / "run/checkpoints/step_00000007", folder / "run/checkpoints/copy")
    with pytest.raises(ConfigError, match="the checkpoint was step_00000007 and is copy"):
        video.evaluate(config(folder, tmp_path, *QUICK, "pretrain.checkpoint=copy"))
    for results in (b"", b"[]", b"{}", b"\xff"):
        (out / earlier.RESULTS).write_bytes(results)
        with pytest.raises(ConfigError, match=r"not legibly.*use another tag"):
            video.evaluate(cfg)


@pytest.mark.parametrize("tag", ["../../escaped", "a/b", "/tmp/escaped", "..", ".", r"a\\b", r"a\0b"])
def test_tag_names_one_folder(folder: Path, tmp_path: Path, tag: str) -> None:
    with pytest.raises(ConfigError, match=r"^tag: .* is not the name of a folder inside"):
        video.evaluate(config(folder, tmp_path, f'tag="{tag}"'))


def test_arms_hold_the_checkpoint_and_the_start_of_the_run(folder: Path, tmp_path: Path) -> None:
    cfg = config(folder, tmp_path)
    pretrained, random = build_arms(cfg, find_pretrained(cfg), ALONE)
    trained = load_pretrain(folder / "run/config.yaml")
    for arm, seed in ((pretrained, 99), (random, 3)):
        torch.manual_seed(seed)
        for name, value in build_encoder(trained).state_dict().items():
            assert torch.equal(arm.encoder.state_dict()[name], value), name
    assert not any(p.requires_grad for p in pretrained.encoder.parameters())


class Flatten(torch.nn.Module):
    """An encoder whose tokens are the frames' mean colours: (b, 3, T, h, w) -> (b, T, 3)."""

    def forward(self, pixels: torch.Tensor, context: None) -> torch.Tensor:
        return pixels.mean((3, 4)).transpose(1, 2)


def test_single_frame_repeats_the_middle_frame() -> None:
    clip = torch.randint(0, 256, (2, 5, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    looks = Looks(1, 1, False)
    moving = Arm("random", False, Flatten(), "imagenet").encode([clip], looks, ALONE, False)
    still = Arm("random", True, Flatten(), "imagenet").encode([clip], looks, ALONE, False)
    torch.testing.assert_close(still, moving[:, :, 2:3].expand_as(still))
    assert not torch.allclose(still, moving)


@pytest.mark.parametrize("joined", [True, False])
def test_clips_are_arranged_by_segment_and_view(joined: bool) -> None:
    """Clip [segment·V + view] holds the number 10·segment + view in all its 4 tokens."""
    clips = [torch.full((2, 4, 1), 10.0 * s + v) for s in range(3) for v in range(2)]
    looks = Looks(3, 2, joined)
    tokens = looks.arrange(clips)[0, :, :, 0]
    assert tokens.shape == ((2, 12) if joined else (6, 4)) == (looks.count, 4 * looks.clips_per_look)
    expected = [[0, 10, 20], [1, 11, 21]] if joined else [[0], [1], [10], [11], [20], [21]]
    assert tokens[:, ::4].tolist() == expected


def test_statistics_equal_those_of_all_tokens_at_once() -> None:
    tokens = torch.randn(7, 2, 5, 3, generator=torch.Generator().manual_seed(0)) * 4 + 9
    tokens[..., 2] = 1.5  # never varies
    statistics = TokenStatistics()
    for part in tokens.split(2):
        statistics.add(part)
    mean, deviation = statistics.mean_and_deviation(ALONE)
    flat = tokens.flatten(0, 2).numpy()
    np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(deviation[:2], flat.std(0)[:2], rtol=1e-6)
    arm = Arm("random", False, Flatten(), "imagenet", (mean, deviation))
    assert arm.standardize(tokens)[..., 2].abs().max() == 0
    np.testing.assert_allclose(arm.standardize(tokens)[..., :2].std(dim=(0, 1, 2), correction=0), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        pytest.param(["data.num_classes=3", "pretrain.folder=nowhere"], ConfigError, "no run directory", id="no-run"),
        pytest.param(["pretrain.checkpoint=step_5"], CheckpointError, "it holds: step_00000007", id="no-checkpoint"),
        pytest.param(
            ["pretrain.model_name=videomamba_tiny"], ConfigError, "trained with videomamba_custom", id="model"
        ),
        pytest.param([f"optimization.seeds=[0,{2**63}]"], ConfigError, "seeds.*less than 4294967296", id="seed"),
        pytest.param(["optimization.resolution=20"], ConfigError, "patch size 8", id="resolution"),
        pytest.param(["data.frames_per_clip=5"], ConfigError, "tubelet size 2", id="frames"),
        pytest.param(["probe.cached_draws=1000000000"], ConfigError, "use 0 to encode", id="memory"),
        pytest.param(["probe.num_heads=5"], ConfigError, "does not divide", id="heads"),
        pytest.param(
            ["eval_name=image_classification_frozen", "data.root_path=/x"],
            ConfigError,
            "not supported yet",
            id="images",
        ),
    ],
)
def test_what_cannot_be_used_is_named(folder: Path, tmp_path: Path, overrides, error, message) -> None:
    with pytest.raises(error, match=message):
        video.evaluate(config(folder, tmp_path, *overrides))


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu cpu"])
def test_devices_that_are_not_there_are_named(folder: Path, tmp_path: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=device):
        video.evaluate(config(folder, tmp_path), device)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_named_checkpoint_is_verified(folder: Path, tmp_path: Path, damage: str) -> None:
    """One byte of the weights flipped, half of them missing, or all: a sentence, where the newest would be taken."""
    whole = folder / "run/checkpoints/step_00000007"
    broken = folder / f"run/checkpoints/{damage}"
    shutil.copytree(whole, broken)
    data = bytearray((broken / MODEL).read_bytes())
    data[-5] ^= 1
    (broken / MODEL).write_bytes({"flipped": data, "truncated": data[: len(data) // 2], "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=rf"{damage} does not verify \({MODEL}"):
        find_pretrained(config(folder, tmp_path, f"pretrain.checkpoint={damage}"))
    assert find_pretrained(config(folder, tmp_path, f"pretrain.checkpoint={whole.name}")).checkpoint == whole


def test_labels_are_checked_before_anything_is_encoded(folder: Path, tmp_path: Path) -> None:
    """A CSV whose third row has no label, and one whose label is beyond num_classes, are named by row."""
    paths = sorted((folder / "val").rglob("*.webm"))
    rows = tmp_path / "val.csv"
    for label, message in ((-1, "row 3.*has no label"), (2, "row 3.*label 2, but data.num_classes is 2")):
        rows.write_text("".join(f"{path} {label if i == 2 else i % 2}\n" for i, path in enumerate(paths)))
        with pytest.raises(DataError, match=message):
            video.evaluate(config(folder, tmp_path, f"data.dataset_val={rows}"))


def test_classes_that_are_numbered_differently_are_refused(folder: Path, tmp_path: Path) -> None:
    """A class folder missing from one packing shifts the numbers of the others: a wrong accuracy without a warning."""
    shutil.copytree(folder / "val/class1", tmp_path / "videos/class1")
    pack(tmp_path / "videos", tmp_path / "shards", PackOptions())
    with pytest.raises(DataError, match="label 0 means 'class0' and 'class1'"):
        video.evaluate(config(folder, tmp_path, f"data.dataset_val={tmp_path / 'shards'}"), "cpu")
