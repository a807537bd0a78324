"""Watching real runs: logs per rank, stop and save, a second job, and a rank that hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.small_run import command_of, write_config
from vmjepa.launch.status import view
from vmjepa.run_dir import RunDir
from vmjepa.train.rank_log import RankLog
from vmjepa.train.watchdog import accuse

LONG = ("optimization.ipe=100000", "checkpoint.every_steps=100000")


def vmjepa(*words: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vmjepa.cli", *map(str, words)]
    env = os.environ | (environment or {})
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)


def wait_for(condition, process: subprocess.Popen, what: str) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, f"ended before {what}"
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture
def start(tmp_path, data_dir):
    """Starts a run without end and waits until it has stepped; kills what is left of it afterwards."""
    config = write_config(tmp_path, data_dir)
    started = []

    def go(*more: str) -> tuple[subprocess.Popen, Path]:
        run = tmp_path / "run"
        with open(tmp_path / "output", "w") as out:
            process = subprocess.Popen(command_of(config, run, *LONG, *more), cwd=ROOT, stdout=out, stderr=out)
        started.append(process)
        metrics = run / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process, "three steps")
        return process, run

    yield go
    for process in started:
        if process.poll() is None:
            for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
                victim.kill()
            process.wait()


@pytest.mark.slow
def test_the_life_of_a_watched_run(start):
    """A second job is refused and changes nothing; save keeps it going; stop ends it with 85; its log is there."""
    process, run = start()
    assert view(RunDir(run)).state == "running"
    as_rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for environment in ({}, as_rank):  # refused by the launcher, and by the trainer where another launcher started it
        second = vmjepa("pretrain", run / "config.yaml", environment=environment)
        assert second.returncode == 93
        assert f"in use by process {process.pid}" in second.stderr
    assert (view(RunDir(run)).state, RunDir(run).last_attempt()) == ("running", 1)
    assert "save and go on" in vmjepa("save", run).stdout
    wait_for(lambda: list((run / "checkpoints").glob("step_*")), process, "the checkpoint")
    follower = subprocess.Popen([sys.executable, "-m", "vmjepa.cli", "logs", str(run), "--follow"], cwd=ROOT)
    assert "exit code 85" in vmjepa("stop", run).stdout
    assert process.wait(timeout=60) == 85
    assert follower.wait(timeout=60) == 0
    assert view(RunDir(run)).state == "stopped"
    assert "no job is running there (stopped)" in vmjepa("stop", run).stderr
    assert "run: step 1/" in vmjepa("logs", run).stdout
    assert "attempt 1 has logs of rank 0" in vmjepa("logs", run, "--rank", 3).stderr


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_job_ends(start):
    """SIGSTOP of rank 1 of 2: rank 0 names it, leaves all stacks in its log, and the launch ends with a crash code."""
    process, run = start("monitor.hang_seconds=8", "--devices", "cpu", "cpu")
    alive = run / "attempts/1/alive/rank_1"
    wait_for(alive.exists, process, "rank 1's sign of life")
    victim = json.loads(alive.read_text())["pid"]
    os.kill(victim, signal.SIGSTOP)
    assert process.wait(timeout=100) == 87
    error = json.loads((run / "attempts/1/error-rank0.json").read_text())
    assert f"(process {victim}) is stopped or dead" in error["reason"]
    assert error["suspects"] == [os.uname().nodename]
    found = view(RunDir(run))
    assert found.state == "failed"
    assert "rank 1 on" in found.reason
    log = (run / "attempts/1/rank_0.log").read_text()
    assert "most recent call first" in log
    assert "pretrain.py" in log
    assert not psutil.pid_exists(victim)


def note(rank: int, beat: int, count: int, place: str = "computing step 8") -> dict:
    return {"rank": rank, "host": f"n{rank}", "pid": 100 + rank, "beat": beat, "count": count, "place": place}


@pytest.mark.parametrize(
    ("before", "after", "words", "suspects"),
    [
        ([(1, 9), (4, 9)], [(3, 9), (4, 9)], "rank 1 on n1 (process 101) is stopped or dead", ("n1",)),
        ([(1, 9), (4, 8)], [(3, 9), (6, 8)], "rank 1 on n1 (process 101) has not arrived", ("n1",)),
        ([(1, 9), (4, 9)], [(3, 9), (6, 9)], "no rank has come further (2 of 2 are here)", ()),
        ([(1, 9)], [(3, 9)], "rank 1 has not shown any sign of life", ()),
    ],
    ids=["stopped", "behind", "all-together", "never-seen"],
)
def test_who_is_accused(before, after, words, suspects):
    """Two readings of (beat, count) for each rank."""
    readings = [{rank: note(rank, *pair) for rank, pair in enumerate(pairs)} for pairs in (before, after)]
    found = accuse(*readings, 2)
    assert words in found[0]
    assert found[1] == suspects


def test_the_log_holds_what_native_code_writes_and_the_last_words_of_a_crash(tmp_path):
    """Through file descriptor 2, up to a fatal signal; the terminal gets it too."""
    code = "import os, sys, faulthandler; from pathlib import Path; from vmjepa.train.rank_log import RankLog\n"
    code += f"faulthandler.enable(); RankLog(Path({str(tmp_path / 'log')!r}))\n"
    code += "print('from python', file=sys.stderr); os.write(2, b'from C\\n'); os.abort()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert (tmp_path / "log").read_text() == done.stderr
    assert done.stderr.startswith("from python\nfrom C\nFatal Python error: Aborted")


def test_the_log_gives_stderr_back(tmp_path, capfd):
    log = RankLog(tmp_path / "log")
    os.write(2, b"inside\n")
    log.note("noted")
    log.close()
    os.write(2, b"outside\n")
    assert capfd.readouterr().err == "inside\noutside\n"
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["inside", "noted"]
