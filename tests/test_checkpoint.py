"""Checkpoints: whole or absent, verified, walked back, and refused when they are of another model."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from vmjepa.errors import CheckpointError, StorageError
from vmjepa.run_dir import RunDir
from vmjepa.train import checkpoint
from vmjepa.train.checkpoint import Checkpoint


def sample(step: int) -> Checkpoint:
    model = {"encoder.w": torch.full((2, 3), float(step)), "target_encoder.w": torch.full((2, 3), step + 0.5)}
    moments = {key: {"encoder.w": torch.rand(2, 3)} for key in ("exp_avg", "exp_avg_sq")}
    return Checkpoint(step, model, {"step": step, **moments})


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def test_what_was_saved_comes_back(run):
    saved = sample(7)
    loaded = checkpoint.load(checkpoint.save(run, saved, {}, keep=3))
    assert loaded.step == 7
    assert loaded.optimizer["step"] == 7
    for name, value in saved.model.items():
        assert torch.equal(loaded.model[name], value)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(loaded.optimizer[key]["encoder.w"], saved.optimizer[key]["encoder.w"])
    assert torch.equal(checkpoint.load_encoder_state(checkpoint.latest(run.root))["w"], saved.model["target_encoder.w"])


def test_only_the_newest_are_kept(run):
    for step in (1, 2, 3, 4):
        checkpoint.save(run, sample(step), {}, keep=2)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step_00000003", "step_00000004"]


def cut_short(folder):
    path = folder / checkpoint.MODEL
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(folder):
    path = folder / checkpoint.OPTIMIZER
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        flip_a_bit,
        lambda f: (f / checkpoint.STATE).write_text("{"),
        lambda f: (f / checkpoint.MODEL).unlink(),
    ],
    ids=["truncated", "bit-flipped", "state-garbled", "file-missing"],
)
def test_a_damaged_newest_is_passed_over(run, damage):
    checkpoint.save(run, sample(1), {}, keep=3)
    damage(checkpoint.save(run, sample(2), {}, keep=3))
    assert checkpoint.latest(run.root).name == "step_00000001"
    damage(run.checkpoints / "step_00000001")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        checkpoint.latest(run.root)


def test_no_checkpoint_is_no_error(run):
    assert checkpoint.latest(run.root) is None
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        checkpoint.resolve(run.root)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_earlier_checkpoints_intact(run, monkeypatch, call):
    checkpoint.save(run, sample(1), {}, keep=1)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError, match=r"step 2.*disk is full"):
        checkpoint.save(run, sample(2), {}, keep=1)
    monkeypatch.undo()
    assert [p.name for p in run.checkpoints.iterdir()] == ["step_00000001"]
    assert checkpoint.latest(run.root).name == "step_00000001"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"encoder.w": torch.zeros(3, 3)}, r"\(2, 3\) instead of \(3, 3\)"),
        ({"encoder.v": torch.zeros(2, 3)}, "encoder.v missing"),
    ],
    ids=["shape", "name"],
)
def test_another_model_is_refused(run, other, words):
    folder = checkpoint.save(run, sample(1), {}, keep=1)
    found = {"encoder.w": torch.zeros(2, 3)}
    with pytest.raises(CheckpointError, match=f"another model.*{words}"):
        checkpoint.check_fits(folder, found, other)


def test_damaged_newer_ones_do_not_push_out_the_one_just_saved(run):
    for step in (5, 6):
        cut_short(checkpoint.save(run, sample(step), {}, keep=2))
    checkpoint.save(run, sample(3), {}, keep=2)
    assert checkpoint.latest(run.root).name == "step_00000003"
