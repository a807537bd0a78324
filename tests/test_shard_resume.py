"""The shard tool when something goes wrong: killed, interrupted, a full disk, clips that misbehave, a folder in use."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tools.shard.pack as pack_module
import tools.shard.pool as pool_module
from tests.clip_maker import make_clip
from tests.shard_helpers import ROOT, make_videos, prolonged, quarantine, run_shard, shard_command, tree
from tools.shard.encode import EncodeOptions
from tools.shard.pack import PackOptions, Summary, pack
from vmjepa.data.shard_writer import ShardWriter
from vmjepa.data.shards import ShardDataset
from vmjepa.errors import DataError, StorageError


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that most tests pack."""
    return make_videos(tmp_path_factory.mktemp("videos"))


# --- interruptions --------------------------------------------------------------------------------------------------

_DRIVER = """
import os, sys
from pathlib import Path
from tools.shard.encode import EncodeOptions
from tools.shard.pack import PackOptions, pack
source, output, deadly = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0
rename = os.rename
def deadly_rename(*arguments):
    global calls
    calls += 1
    if calls == deadly:
        os.kill(os.getpid(), 9)
    rename(*arguments)
os.rename = deadly_rename
pack(Path(source), Path(output), PackOptions(shard_size=30_000, encode=EncodeOptions("mjpeg", 16)), workers=2)
"""


@pytest.mark.slow
def test_killed_before_every_publication(videos: Path, tmp_path: Path) -> None:
    """Killed before its first rename, then before its second, … until it is through: the same files as unbroken."""
    pack(videos, tmp_path / "whole", PackOptions(shard_size=30_000, encode=EncodeOptions("mjpeg", 16)))
    shards = len(list((tmp_path / "whole").glob("*.tar")))
    assert shards > 2
    for deadly in range(1, 100):
        done = subprocess.run(
            [sys.executable, "-c", _DRIVER, videos, tmp_path / "out", str(deadly)], cwd=ROOT, timeout=60
        )
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / "out" / "dataset.json").exists()
    assert 5 < deadly < 100
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_random_moments(videos: Path, tmp_path: Path) -> None:
    """SIGKILL at any time: the workers go, too, and the same command finishes the same dataset."""
    pack(videos, tmp_path / "whole", PackOptions(shard_size=20_000))
    command = shard_command("run", videos, tmp_path / "out", "--shard-size", "20kB", "--workers", 2)
    rng = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.2))
        children = _children(process.pid)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.05)
    assert run_shard(*command[3:]).returncode == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_interrupted(tmp_path: Path) -> None:
    """Ctrl-C: the workers end, and a sentence says how to go on."""
    (tmp_path / "long.webm").write_bytes(prolonged(make_clip(2, (2048, 2048), flat=True), 3000))
    process = subprocess.Popen(
        shard_command("run", tmp_path, tmp_path / "out"), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "out" / ".work" / "plan.json").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    children = _children(process.pid)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert error.startswith("stopped; run the same command again")
    assert error.count("\n") == 1
    assert children
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def test_finished_shards_are_kept(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on does not touch the shards that are finished, nor decode their clips again."""
    options = PackOptions(shard_size=20_000)
    publish, published = pack_module.Store.publish_shard, []

    def failing(self, number, *rest):  # type: ignore[no-untyped-def]
        if number == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        published.append(number)
        publish(self, number, *rest)

    monkeypatch.setattr(pack_module.Store, "publish_shard", failing)
    with pytest.raises(StorageError, match="disk is full"):
        pack(videos, tmp_path / "out", options)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    assert published == [0, 1]
    assert len(before) == 4
    monkeypatch.setattr(pack_module.Store, "publish_shard", publish)
    summary = pack(videos, tmp_path / "out", options)
    assert summary.reused_shards == 2
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before
    pack(videos, tmp_path / "whole", options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


# --- clips and disks that misbehave ---------------------------------------------------------------------------------

_BAD_WORKER = """
import os, sys, time
import tools.shard.worker as worker
prove = worker.prove
def misbehave(task):
    if "jump/4" in task["path"]:
        time.sleep(1000)
    if "run/9" in task["path"]:
        os.closerange(3, 64)
        time.sleep(0.2)
        os._exit(7)
    if "run/5" in task["path"] or ("run/7" in task["path"] and not os.path.exists(sys.argv[1])):
        open(sys.argv[1], "w").close()
        os.kill(os.getpid(), 11)
    return prove(task)
worker.prove = misbehave
worker.main()
"""


@pytest.mark.parametrize("workers", [1, 3])
def test_clip_that_hangs_or_crashes(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """It is quarantined and all others are packed; a worker that dies once, of something else, costs nothing."""
    monkeypatch.setattr(pool_module, "COMMAND", [sys.executable, "-c", _BAD_WORKER, str(tmp_path / "once")])
    began = time.monotonic()
    summary = pack(videos, tmp_path / "out", PackOptions(shuffle=False), workers=workers, clip_seconds=1.0)
    assert time.monotonic() - began < 30
    refused = {name: (row["reason"], row["detail"]) for name, row in quarantine(tmp_path / "out").items()}
    assert refused["jump/4.webm"] == ("time-out", "more than 1 s")
    assert refused["run/5.webm"] == ("decoder crashed", "signal SIGSEGV")
    assert refused["run/9.webm"] == ("decoder crashed", "status 7")  # seen, though it took a moment to end
    assert len(refused) == 6
    assert summary.dataset["samples"] == 9


def test_endless_clip_is_stopped(tmp_path: Path) -> None:
    """A small file that takes long to decode is stopped by its worker's own clock."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.webm").write_bytes(make_clip())
    (tmp_path / "in" / "long.webm").write_bytes(prolonged(make_clip(2, (2048, 2048), flat=True), 3000))
    pack(tmp_path / "in", tmp_path / "out", PackOptions(), workers=2, clip_seconds=0.3)
    assert {name: row["reason"] for name, row in quarantine(tmp_path / "out").items()} == {"long.webm": "time-out"}


def test_worker_that_cannot_start(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation stops the run instead of sending every clip to quarantine."""
    monkeypatch.setattr(pool_module, "COMMAND", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match=r"could not start \(status 3\)"):
        pack(videos, tmp_path / "out", PackOptions())


def test_clip_that_changes_while_being_packed(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is what was proved, or nothing."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.webm").write_bytes(make_clip(seed=i))
    open_clip = pack_module.open_clip

    def changing(path: str):  # type: ignore[no-untyped-def]
        if path.endswith("1.webm"):
            Path(path).write_bytes(make_clip(seed=9))
        return open_clip(path)

    monkeypatch.setattr(pack_module, "open_clip", changing)
    pack(folder, tmp_path / "out", PackOptions(shuffle=False))
    dataset = ShardDataset(tmp_path / "out")
    assert [dataset.source(i) for i in range(len(dataset))] == ["0.webm", "2.webm"]
    for i in range(2):
        dataset.verify(i)
    assert quarantine(tmp_path / "out")["1.webm"]["reason"] == "changed while being packed"


_ON_SMALL_DISK = """
disk="$1"; shift
mount -t tmpfs -o size=48k none "$disk" || exit 77
"$@" 2> full.txt; echo $? > full.status
find "$disk" > full.files
mount -o remount,size=2m "$disk"
exec "$@"
"""


@pytest.mark.parametrize("codec", [None, "mjpeg"])
def test_full_disk(videos: Path, tmp_path: Path, codec: str | None) -> None:
    """One sentence, an exit status, no half-written file; with room the same command goes on."""
    disk = tmp_path / "disk"  # 48 KiB, mounted for these commands only
    disk.mkdir()
    command = shard_command("run", videos, disk / "out", "--shard-size", "15kB", *(["--codec", codec] if codec else []))
    result = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", _ON_SMALL_DISK, "sh", disk, *command],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if result.returncode == 77 or "unshare failed" in result.stderr:
        pytest.skip("this system lets us mount no file system")
    error = (tmp_path / "full.txt").read_text()
    assert (tmp_path / "full.status").read_text().strip() == "1"
    assert error.count("\n") == 1
    assert error.startswith("error: packing into")
    assert "the disk is full" in error
    left = [Path(line).name for line in (tmp_path / "full.files").read_text().splitlines()]
    assert "plan.json" in left
    assert not [name for name in left if name.endswith(".tmp") or name.startswith("clip-")]
    assert result.returncode == 0, result.stderr
    assert "packed 12 clips" in result.stdout


@pytest.mark.parametrize("where", ["shard", "manifest"])
def test_write_error_is_a_sentence(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The same without a small disk: an error while writing keeps finished shards and drops temporaries."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if where == "shard":
            patch.setattr(ShardWriter, "finish", full)
        else:
            patch.setattr("tools.shard.store.csv.DictWriter.writeheader", full)
        with pytest.raises(StorageError, match="disk is full; make room"):
            pack(videos, tmp_path / "out", PackOptions())
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert pack(videos, tmp_path / "out", PackOptions()).dataset["samples"] == 12


# --- the output folder ----------------------------------------------------------------------------------------------


def _packed(videos: Path, output: Path) -> Summary:
    return pack(videos, output, PackOptions(shard_size=40_000))


def test_already_complete(videos: Path, tmp_path: Path) -> None:
    """The same command again does nothing and says so."""
    _packed(videos, tmp_path / "out")
    before = tree(tmp_path / "out")
    again = _packed(videos, tmp_path / "out")
    assert again.already_complete
    assert again.refused == {"not a video": 1, "empty file": 1, "truncated": 1}
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(PackOptions(seed=5, shard_size=40_000), "seed was 0, now 5", id="seed"),
        pytest.param(PackOptions(shard_size=50_000), "shard_size was 40000, now 50000", id="shard-size"),
        pytest.param(PackOptions(shard_size=40_000, encode=EncodeOptions("h264")), "encode was None", id="codec"),
    ],
)
def test_other_options_are_refused(
    videos: Path, tmp_path: Path, options: PackOptions, says: str, finished: bool
) -> None:
    """A folder that holds another dataset stays as it is, finished or not."""
    _packed(videos, tmp_path / "out")
    if not finished:
        plan = json.loads((tmp_path / "out" / "dataset.json").read_text())["options"]
        (tmp_path / "out" / "dataset.json").unlink()
        (tmp_path / "out" / ".work").mkdir()
        (tmp_path / "out" / ".work" / "plan.json").write_text(json.dumps(plan))
    before = tree(tmp_path / "out")
    with pytest.raises(DataError, match=says) as error:
        pack(videos, tmp_path / "out", options)
    assert "give another output folder" in str(error.value)
    after = tree(tmp_path / "out")
    after.pop(".work/lock", None)
    assert after == before


def test_other_input_is_refused(videos: Path, tmp_path: Path) -> None:
    """The same options, another list of clips."""
    _packed(videos, tmp_path / "out")
    before = tree(tmp_path / "out")
    table = tmp_path / "clips.csv"
    table.write_text(f"{videos}/jump/0.webm 0\n")
    with pytest.raises(DataError, match="input was classes, now csv"):
        _packed(table, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_foreign_folder_and_file_are_refused(videos: Path, tmp_path: Path) -> None:
    """A folder with other contents, or a file, is not written into."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"thesis\.tex"):
        _packed(videos, tmp_path)
    with pytest.raises(DataError, match="is a file"):
        _packed(videos, tmp_path / "thesis.tex")
    assert tree(tmp_path) == {"thesis.tex": hashlib.sha256(b"years of work").hexdigest()}


def test_two_runs_at_once(videos: Path, tmp_path: Path) -> None:
    """The second run into a folder is refused while the first is at work, and welcome after it."""
    work = tmp_path / "out" / ".work"
    work.mkdir(parents=True)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run is packing"):
            _packed(videos, tmp_path / "out")
    _packed(videos, tmp_path / "out")
