"""The demo: how it understands the user's videos, and its whole course on a few tiny ones."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.clip_maker import make_clip
from tools import demo
from tools.demo_input import find_sets
from vmjepa.data.files import read_clip_csv
from vmjepa.errors import UserError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def listed(csv: Path, folder: Path) -> dict[str, int]:
    return {str(Path(path).relative_to(folder)): label for _, path, label in read_clip_csv(csv)}


def test_class_folders_are_split_by_name(tmp_path: Path) -> None:
    """50 videos of one class, 3 and 1 of two others: every video once; 10, 1 and 0 for the test; the same twice."""
    sizes = {"run x": 50, 'say "hi", jump': 3, "rare": 1}
    names = [f"{name}/{i}.mp4" for name, count in sizes.items() for i in range(count)]
    folder = touch(tmp_path / "videos", *names)
    sets = find_sets(folder, tmp_path / "lists")
    assert sets.classes == sorted(sizes)
    train, test = listed(sets.train, folder), listed(sets.test, folder)
    assert sorted([*train, *test]) == sorted(names)
    assert all(label == sets.classes.index(name.split("/")[0]) for name, label in (train | test).items())
    assert Counter(name.split("/")[0] for name in test) == {"run x": 10, 'say "hi", jump': 1}
    assert listed(find_sets(folder, tmp_path / "again").test, folder) == test


def test_given_split_is_kept_and_labels_agree(tmp_path: Path) -> None:
    """The test folder lacks the first class: its labels are still those of the training folder."""
    folder = touch(tmp_path / "videos", "train/a/1.mp4", "train/b/2.mp4", "val/b/3.mp4")
    sets = find_sets(folder, tmp_path / "lists")
    assert listed(sets.train, folder) == {"train/a/1.mp4": 0, "train/b/2.mp4": 1}
    assert listed(sets.test, folder) == {"val/b/3.mp4": 1}


@pytest.mark.parametrize(
    ("names", "why"),
    [
        pytest.param(["1.mp4", "2.mp4"], "two class folders", id="flat"),
        pytest.param(["a/1.mp4", "a/2.mp4"], "two class folders", id="one-class"),
        pytest.param(["a/1.mp4", "b/2.mp4"], "no class has two videos", id="too-few"),
    ],
)
def test_no_probe_without_labels_to_split(tmp_path: Path, names: list[str], why: str) -> None:
    folder = touch(tmp_path / "videos", *names)
    sets = find_sets(folder, tmp_path / "lists")
    assert (sets.train, sets.test) == (folder, None)
    assert why in sets.why_no_probe


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not a demo's folder"):
        demo.Demo(tmp_path, None).run()
    with pytest.raises(UserError, match="no such folder"):
        demo.Demo(tmp_path / "out", tmp_path / "nowhere").run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex"]


def test_report_without_labels_says_why_there_is_no_probe(tmp_path: Path, capsys) -> None:
    """Skill 0.1 in the first tenth of 40 logged steps and 0.3 in the last."""
    rows = [{"step": s, "loss": 1.0, "skill": 0.1 if s <= 4 else 0.3, "rank_content": 9.0} for s in range(1, 41)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    demo.Demo(tmp_path, tmp_path)._report(find_sets(touch(tmp_path / "videos", "1.mp4"), tmp_path / "lists"))
    said = capsys.readouterr().out
    assert "0.10 → 0.30" in said
    assert "not possible: a probe needs at least two class folders" in said
    assert (tmp_path / "curves.png").is_file()


@pytest.fixture
def tiny_configs(tmp_path: Path, monkeypatch) -> None:
    """The demo's own configs, cut down to a few steps."""
    pretrain, evaluate = (yaml.safe_load(path.read_text()) for path in (demo.PRETRAIN, demo.EVALUATE))
    pretrain["optimization"] |= {"ipe": 2, "epochs": 2}
    pretrain["monitor"] |= {"every_steps": 1, "rank_every_steps": 1}
    pretrain["data"] |= {"global_batch_size": 4, "batch_size": 4}
    pretrain["model"] |= {"depth": 1}
    evaluate["optimization"] |= {"num_epochs": 1, "batch_size": 4}
    for name, content in (("PRETRAIN", pretrain), ("EVALUATE", evaluate)):
        path = tmp_path / f"{name.lower()}.yaml"
        path.write_text(yaml.safe_dump(content))
        monkeypatch.setattr(demo, name, path)
    monkeypatch.chdir(demo.ROOT)


@pytest.mark.slow
def test_demo_on_own_videos_from_end_to_end(tmp_path: Path, tiny_configs, monkeypatch, capfd) -> None:
    """Class folders: shards, run, probes and curves appear, and a second run repeats nothing."""
    monkeypatch.setattr(demo.os, "sched_getaffinity", lambda pid: {0})  # one process: quicker here
    for i in range(16):
        path = tmp_path / "videos" / ("left", "right")[i % 2] / f"{i}.webm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_clip(frames=20, seed=i))
    out = tmp_path / "out"
    demo.Demo(out, tmp_path / "videos").run()
    said = capfd.readouterr().out
    assert {"curves.png", "shards", "run"} <= {path.name for path in out.iterdir()}
    assert re.search(r"prediction skill +-?\d\.\d\d → -?\d\.\d\d ", said)
    assert "random encoder" in said
    assert "attentive probe" in said
    assert "one frame only" in said
    assert "guessing 50 %" in said
    assert "--logdir" in said
    demo.Demo(out, tmp_path / "videos").run()
    again = capfd.readouterr().out
    assert again.count("done before") == 2
    assert "attentive probe" in again
