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


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def claim(out: Path, videos: Path | None = None) -> None:
    demo.Demo(out, videos)._claim_folder()


@pytest.mark.parametrize(
    "mark",
    [
        pytest.param(b"{}", id="no-marker"),
        pytest.param(b"", id="empty"),
        pytest.param(b"[1]", id="list"),
        pytest.param(b'\xff{"fing', id="garbled"),
        pytest.param(b'{"made by": "vmjepa tools.demo", "fingerprint": "", "entries": ["../x"]}', id="forged-entries"),
    ],
)
def test_folder_with_a_strange_demo_json_is_left_alone(tmp_path: Path, mark: bytes) -> None:
    out = touch(tmp_path / "out", "thesis.txt", "videos/holiday.mp4")
    (out / demo.MARK).write_bytes(mark)
    before = tree(tmp_path)
    with pytest.raises(UserError, match="not a demo's folder"):
        demo.Demo(out, None).run()
    assert tree(tmp_path) == before


def test_starting_anew_removes_only_what_the_demo_made(tmp_path: Path, monkeypatch) -> None:
    """Going on keeps all; other code removes the old demo, but not beside a file of the user's, nor behind a link."""
    out, elsewhere = tmp_path / "out", touch(tmp_path / "big-disk", "run/config.yaml")
    claim(out)
    touch(out, "videos/clips.json", "shards/train/a.tar", "curves.png")
    (out / "run").symlink_to(elsewhere / "run")
    before = tree(out)
    claim(out)
    assert tree(out) == before
    monkeypatch.setattr(demo, "_fingerprint", lambda videos: "other")
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds what no demo made \(thesis.txt\)"):
        claim(out)
    assert before.items() <= tree(out).items()
    (out / "thesis.txt").unlink()
    claim(out)
    assert list(tree(out)) == [demo.MARK]
    assert (elsewhere / "run/config.yaml").is_file()


def test_own_videos_are_checked_before_the_old_demo_goes(tmp_path: Path) -> None:
    """Missing or empty videos, the demo's folder in the videos and the videos in it: sentences, and nothing changes."""
    out = tmp_path / "videos/out"
    claim(out)
    touch(out, "videos/a/1.mp4", "run/config.yaml")
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    for videos, message in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "empty", "holds no files"),
        (tmp_path / "videos", "lies inside the videos"),
        (out, "lies inside the videos"),
        (out / "videos", "lie inside"),
    ):
        with pytest.raises(UserError, match=message):
            demo.Demo(out, videos).run()
    assert tree(tmp_path) == before


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
