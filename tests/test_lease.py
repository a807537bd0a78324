"""The lease on a run directory: one holder, none after any kind of death, no trust in a lock across machines."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.conftest import ROOT
from vmjepa import lease
from vmjepa.errors import ConfigError
from vmjepa.launch.status import view
from vmjepa.lease import Lease, LeaseError, lease_file, lost_holder
from vmjepa.run_dir import RunDir
from vmjepa.run_status import StatusFile, failures_shown, read_status

HOLD = """
import sys, time
from vmjepa.lease import Lease
from vmjepa.run_dir import RunDir
Lease(RunDir(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDir:
    monkeypatch.setattr(lease, "_RETRY_S", 0.2)
    return RunDir(tmp_path)


@pytest.fixture
def other_job(run):
    """Another process that holds the lease."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.root)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_job_is_told_who_holds_the_run(run, other_job):
    with pytest.raises(LeaseError, match=f"in use by process {other_job.pid} on .* since 20.*vmjepa stop"):
        Lease(run).acquire()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_dead_holder_is_no_obstacle(run, other_job, number):
    """Status sees the death, and the next job starts at once."""
    StatusFile(run, run.next_attempt())
    assert lost_holder(run) is None
    other_job.send_signal(number)
    other_job.wait()
    found = view(run)
    assert (found.state, found.reason.endswith("has died without a word")) == ("silent", True)
    started = time.monotonic()
    Lease(run).acquire()
    assert time.monotonic() - started < 1


def test_a_released_lease_is_free(run):
    first = Lease(run)
    first.acquire()
    first.release()
    Lease(run).acquire()


def foreign(run: RunDir, age: float) -> None:
    """A lease file of a job on another machine, whose lock does not reach here."""
    here = {"host": "n7", "pid": 12, "since": "2026-01-01 10:00:00", "machine": "another"}
    lease_file(run).write_text(json.dumps(here))
    os.utime(lease_file(run), (time.time() - age,) * 2)


def test_a_silent_job_on_another_machine_is_taken_over_at_once(run):
    foreign(run, age=lease.STALE_S + 5)
    started = time.monotonic()
    Lease(run).acquire()
    assert time.monotonic() - started < 1


def test_a_job_on_another_machine_that_fell_silent_just_now_is_waited_for(run, monkeypatch):
    monkeypatch.setattr(lease, "STALE_S", 2.0)
    foreign(run, age=0)
    started = time.monotonic()
    Lease(run).acquire()
    assert 1 < time.monotonic() - started < 10


def test_a_live_job_on_another_machine_is_respected(run):
    foreign(run, age=0)
    threading.Timer(0.5, os.utime, [lease_file(run)]).start()
    with pytest.raises(LeaseError, match="process 12 on n7"):
        Lease(run).acquire()


def test_without_locks_the_touching_decides(run, monkeypatch):
    """A file system that has no locks: nobody is called dead, and a second job waits for a sign of life."""
    monkeypatch.setattr(lease, "TOUCH_S", 0.2)
    first = Lease(run)
    first.acquire()

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr(lease.fcntl, "flock", unsupported)
    assert lost_holder(run) is None
    with pytest.raises(LeaseError, match=f"process {os.getpid()}"):
        Lease(run).acquire()
    first.release()


def test_a_config_error_of_a_second_job_does_not_mark_the_first_one(run, other_job):
    StatusFile(run, run.next_attempt())
    with pytest.raises(ConfigError), failures_shown(run.root):
        raise ConfigError("wrong")
    assert read_status(run)["state"] == "running"
