"""Pretraining on shards of real clips, whole: ranks, ZeRO stages and kills change nothing.

One reference run (2 ranks, ZeRO 1, 20 steps) is compared with the same run at other ZeRO stages, and killed.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.conftest import ROOT

STEPS = 20
CLIPS = 24
CONFIG = {
    "data": {"datasets": [], "batch_size": 1, "global_batch_size": 8, "num_frames": 8, "tubelet_size": 2},
    "mask": [{"num_blocks": 4, "spatial_scale": [0.15, 0.15]}, {"num_blocks": 2, "spatial_scale": [0.5, 0.5]}],
    "model": {"model_name": "videomamba_custom", "embed_dim": 32, "depth": 2, "pred_depth": 1, "pred_embed_dim": 32},
    "optimization": {"ipe": 4, "epochs": 5, "warmup": 1, "lr": 1e-3, "start_lr": 1e-4, "final_lr": 1e-5},
    "meta": {"seed": 5},
    "engine": {"zero_stage": 1, "threads_per_rank": 1},
    "monitor": {"every_steps": 1, "rank_every_steps": 4, "tensorboard": False},
    "checkpoint": {"every_steps": 3, "keep": 2},
    "logging": {"folder": "set by the test"},
}
CONFIG["data"] |= {"sampling_rate": 1, "crop_size": 48, "patch_size": 8}
CONFIG["model"] |= {"pred_num_heads": 4, "drop_path": 0.1}
CONFIG["optimization"] |= {"clip_grad": 0.5, "accumulation_steps": 2, "ema": [0.9, 1.0]}


@pytest.fixture(scope="module")
def config(tmp_path_factory, data_dir) -> Path:
    """A config file whose data are shards of a few real clips."""
    folder = tmp_path_factory.mktemp("pretrain")
    clips = sorted((data_dir / "actions").rglob("*.mp4"))[:: max(1, 380 // CLIPS)][:CLIPS]
    (folder / "clips.csv").write_text("".join(f"{clip} {i % 2}\n" for i, clip in enumerate(clips)))
    command = [sys.executable, "-m", "tools.shard", "run", str(folder / "clips.csv"), str(folder / "shards")]
    done = subprocess.run([*command, "--shard-size", "500KB"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = CONFIG | {"data": CONFIG["data"] | {"datasets": [str(folder / "shards")]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


def command_of(config: Path, run: Path, ranks: int, *overrides: str) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launch, "-m", "vmjepa.cli", "pretrain", str(config), f"logging.folder={run}", *overrides]


def train(config: Path, run: Path, ranks: int, *overrides: str) -> dict[int, float]:
    done = subprocess.run(command_of(config, run, ranks, *overrides), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return losses(run)


def losses(run: Path) -> dict[int, float]:
    """Logged loss by step; every step stands once."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory) -> tuple[Path, dict[int, float]]:
    """The unbroken run: its directory and losses."""
    run = tmp_path_factory.mktemp("reference") / "run"
    found = train(config, run, 2)
    assert sorted(found) == list(range(1, STEPS + 1))
    return run, found


def assert_agree(found: dict[int, float], expected: dict[int, float], tolerance: float) -> None:
    assert sorted(found) == sorted(expected)
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=tolerance), f"step {step}"


@pytest.mark.slow
def test_a_run_writes_what_it_promises(reference):
    """Checkpoints (newest two), status, provenance, resolved config, and metrics that mean something."""
    run, found = reference
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000018", "step_00000020"]
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", STEPS)
    assert (run / "attempts/1/provenance.json").is_file()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {
        "skill",
        "grad_norm_encoder",
        "grad_norm_predictor",
        "target_variance",
        "rank",
        "clips_per_s",
    } <= last.keys()
    assert 1 <= last["rank"] <= CONFIG["model"]["embed_dim"]
    assert found[STEPS] < found[1]


@pytest.mark.slow
def test_one_rank_equals_two(config, reference, tmp_path):
    """Same global batch, same losses (drop path off: its noise is drawn per rank)."""
    two = train(config, tmp_path / "two", 2, "model.drop_path=0.0")
    one = train(config, tmp_path / "one", 1, "model.drop_path=0.0")
    assert_agree(one, two, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3], ids=lambda stage: f"zero{stage}")
def test_zero_stages_agree(config, reference, tmp_path, stage):
    assert_agree(train(config, tmp_path / "run", 2, f"engine.zero_stage={stage}"), reference[1], 1e-5)


@pytest.mark.slow
def test_bfloat16_stays_close(config, reference, tmp_path):
    """ZeRO 3 in bfloat16, parameters and target in fp32: the first losses within 1 %, and not equal."""
    found = train(config, tmp_path / "run", 2, "engine.zero_stage=3", "meta.dtype=bfloat16", "optimization.epochs=1")
    first = {step: reference[1][step] for step in (1, 2)}
    assert_agree({step: found[step] for step in first}, first, 1e-2)
    assert found[2] != first[2]


def kill_after(process: subprocess.Popen, run: Path, step: int) -> None:
    """SIGKILL to every process of the launch (ranks have sessions of their own) once `step` is logged."""
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and any(f'"step": {step},' in line for line in metrics.read_text().splitlines())):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for victim in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        victim.kill()
    process.wait()


@pytest.mark.slow
def test_killed_runs_continue_bit_for_bit(config, reference, tmp_path):
    """SIGKILL of all ranks at random steps, then the same command: every later loss and weight is bit-identical."""
    run = tmp_path / "run"
    chance = random.Random(11)
    for steps in (range(4, 8), range(11, STEPS - 2)):
        with open(tmp_path / "log", "a") as log:
            process = subprocess.Popen(command_of(config, run, 2), cwd=ROOT, stdout=log, stderr=log)
            kill_after(process, run, chance.choice(steps))
    assert train(config, run, 2) == reference[1]
    name = f"checkpoints/step_{STEPS:08d}/model.safetensors"
    assert (run / name).read_bytes() == (reference[0] / name).read_bytes()
    assert (run / "attempts/latest").resolve() == (run / "attempts/3").resolve()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [[], ["--devices", "cpu", "cpu"]], ids=["one-rank", "two-devices"])
def test_a_stop_request_saves_and_asks_for_requeue(config, tmp_path, devices):
    """SIGTERM to the command finishes the step, saves on all ranks, exits 85; the next start goes on to the end."""
    run = tmp_path / "run"
    command = [*command_of(config, run, 1), *devices]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 4):
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.01)
        process.terminate()
        assert process.wait(timeout=60) == 85, (tmp_path / "log").read_text()[-3000:]
    stopped = json.loads((run / "status.json").read_text())
    assert stopped["state"] == "stopped"
    assert (run / "checkpoints" / f"step_{stopped['step']:08d}").is_dir()
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert sorted(losses(run)) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_damaged_shard_ends_all_ranks_with_one_sentence(config, tmp_path):
    """The rank that reads it names shard and key; the launch ends with 93, without a traceback."""
    import pyarrow.parquet as parquet

    shards = tmp_path / "shards"
    shutil.copytree(config.parent / "shards", shards)
    row = parquet.read_table(shards / "manifest.parquet").to_pylist()[3]
    with open(shards / row["shard"], "rb+") as tar:
        tar.seek(row["offset"] + row["length"] // 2)
        byte = tar.read(1)[0]
        tar.seek(-1, 1)
        tar.write(bytes([byte ^ 0xFF]))
    command = command_of(config, tmp_path / "run", 1, f"data.datasets=[{shards}]")
    done = subprocess.run([*command, "--devices", "cpu", "cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 93
    assert f"{row['shard']} key {row['key']}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_divergence_ends_the_run_and_keeps_its_checkpoints(config, tmp_path):
    """A loss that is no number: exit 93 with a remedy, nothing saved. A run asked for less than it has done is done."""
    run = tmp_path / "run"
    train(config, run, 1, "optimization.epochs=1")
    command = command_of(config, run, 1, "optimization.lr=1e20", "optimization.start_lr=1e20", "optimization.epochs=5")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 93, done.stderr
    assert "diverged" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name > "step_00000004"] == []
    command = command_of(config, run, 1, "optimization.epochs=1", "optimization.ipe=3", "optimization.warmup=0")
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert json.loads((run / "status.json").read_text())["state"] == "done"


@pytest.mark.slow
def test_a_single_clip_is_a_batch(config, tmp_path):
    """Batch 1 on one rank trains; there is no skill to speak of, since the clip is its own mean."""
    overrides = ("data.global_batch_size=1", "optimization.accumulation_steps=1", "optimization.epochs=1")
    assert len(train(config, tmp_path / "run", 1, *overrides)) == 4
    assert "skill" not in (tmp_path / "run/metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(config, reference, tmp_path):
    """Same run directory, another width: one sentence, exit 93, and the run stays as it was."""
    run = reference[0]
    before = sorted((p.name, p.stat().st_mtime) for p in (run / "checkpoints").rglob("*"))
    command = command_of(config, run, 1, "model.embed_dim=48")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 93
    assert "checkpoint of another model" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted((p.name, p.stat().st_mtime) for p in (run / "checkpoints").rglob("*")) == before
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["embed_dim"] == 32
