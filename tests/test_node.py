"""The node launcher: whose exit code speaks, what becomes of requests, and one real launch of two ranks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from vmjepa.launch.node import ask_to_stop, last_line, telling_rank
from vmjepa.run_dir import ATTEMPT, RunDir
from vmjepa.train.attempt import Attempt


@pytest.mark.parametrize(
    ("codes", "first", "speaks"),
    [
        ({0: 1, 1: 93, 2: 1}, 0, 1),
        ({2: -15, 3: 85}, 2, 3),
        ({0: 85, 1: 93}, 0, 1),
        ({4: -9, 5: 1}, 4, 4),
    ],
    ids=["never-retry-wins", "saved-wins-over-a-crash", "never-retry-wins-over-saved", "else-the-first"],
)
def test_the_rank_that_knows_speaks(codes, first, speaks):
    assert telling_rank(codes, first) == speaks


def test_a_machine_asks_in_words_and_never_over_a_person(tmp_path):
    """The stop file of a signal has text; a person's empty one stays empty; before a run there is none."""
    ask_to_stop(tmp_path, "SIGTERM")
    assert not (tmp_path / "control").exists()
    RunDir(tmp_path).create()
    ask_to_stop(tmp_path, "SIGTERM")
    assert (tmp_path / "control/stop").read_text() == "SIGTERM\n"
    (tmp_path / "control/stop").write_text("")
    ask_to_stop(tmp_path, "SIGTERM")
    assert (tmp_path / "control/stop").read_text() == ""


def test_a_job_keeps_its_attempt_and_early_requests(tmp_path, monkeypatch, single_world):
    """Alone, a run numbers its attempt and clears old requests; in a job the script did so, and a request that comes
    while the ranks start counts."""
    run = RunDir(tmp_path)
    run.create()
    for in_job, expected in ((False, 1), (True, 7)):
        (run.control / "stop").touch()
        os.utime(run.control / "stop", (0, 0))  # older than this process
        if in_job:
            run.attempt(7).mkdir()
            monkeypatch.setenv(ATTEMPT, str(run.attempt(7)))
        with Attempt(run, single_world, None) as attempt:
            assert attempt.number == expected
            assert (run.control / "stop").exists() == in_job


@pytest.mark.slow
def test_two_ranks_fail_with_one_reason(tmp_path):
    """Their output lies in files; the launcher's exit code is theirs, and its one line names rank and reason."""
    command = [sys.executable, "-m", "vmjepa.launch.node", "--nodes", "1", "--ranks", "2", "--cpu", "--head"]
    command += ["127.0.0.1:0", "--run", str(tmp_path), "--logs", str(tmp_path), "--", "pretrain", "no-such.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 93, done.stderr
    printed = "".join(path.read_text() for path in tmp_path.glob("rank_*.out"))  # the slower rank may be ended early
    assert "no-such.yaml: no such config file" in printed
    code, reason = (tmp_path / "node_0.exit").read_text().splitlines()
    assert (code, done.stderr.strip()) == ("93", reason)
    assert "ended with exit code 93: error" in reason
    assert last_line(tmp_path / "absent") == "it printed nothing"
