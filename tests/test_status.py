"""`vmjepa status`: states and reasons from run directories written by hand, and by runs that fail."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.small_run import command_of, write_config
from vmjepa import run_status
from vmjepa.errors import ConfigError, DataError, PeerLostError
from vmjepa.launch.status import duration, find_runs, view
from vmjepa.run_dir import RunDir
from vmjepa.run_status import StatusFile, failures_shown, read_status, record_error

METRICS = {"epoch": 1, "loss": 0.5, "skill": 0.25, "clips_per_s": 8.0, "data_wait": 0.125, "step_seconds": 2.0}


@pytest.fixture
def run(tmp_path) -> RunDir:
    """A run directory in its second attempt, at step 10 of 40."""
    run = RunDir(tmp_path / "run")
    run.create()
    run.next_attempt()
    StatusFile(run, run.next_attempt()).beat("running", 10, 40, METRICS)
    return run


def age(run: RunDir, seconds: float, **changes: object) -> None:
    status = read_status(run) | changes
    run.status.write_text(json.dumps(status | {"time": time.time() - seconds}))


def test_a_running_run(run):
    found = view(run)
    assert (found.state, found.step, found.total_steps, found.epoch, found.restarts) == ("running", 10, 40, 1, 1)
    assert found.seconds_left == 60.0
    assert found.heartbeat_age < 10


@pytest.mark.parametrize(
    ("seconds", "changes", "state"),
    [
        (100, {}, "running"),
        (400, {}, "silent"),
        (400, {"phase": "starting"}, "running"),
        (400, {"metrics": METRICS | {"step_seconds": 100.0}}, "running"),
        (400, {"state": "done"}, "done"),
        (400, {"state": "stopped"}, "stopped"),
    ],
    ids=["fresh", "old", "starting", "long-steps", "done", "stopped"],
)
def test_silence_is_an_old_heartbeat_of_a_running_run(run, seconds, changes, state):
    age(run, seconds, **changes)
    assert view(run).state == state


def test_the_rank_that_failed_is_named_not_those_it_took_along(run):
    """Rank 0 reports first, but only that another ended; rank 1's own error is the reason."""
    record_error(run, 2, 0, PeerLostError("another rank has ended"))
    record_error(run, 2, 1, DataError("clip 7 is broken; remove it"))
    found = view(run)
    assert found.state == "failed"
    assert found.reason.startswith("rank 1 on ")
    assert found.reason.endswith("clip 7 is broken; remove it")


def test_a_new_attempt_forgets_the_failure(run):
    record_error(run, 2, 1, ValueError("odd"))
    assert view(run).reason.endswith("ValueError: odd")
    StatusFile(run, run.next_attempt())
    found = view(run)
    assert (found.state, found.reason, found.step, found.loss, found.restarts) == ("running", None, 10, 0.5, 2)


def test_an_error_before_the_attempt_is_noted_where_the_folder_exists(run, tmp_path):
    for folder in (run.root, tmp_path / "absent", None):
        with pytest.raises(ConfigError), failures_shown(folder):
            raise ConfigError("data.crop: unknown key; remove it")
    found = view(run)
    assert (found.state, found.step, found.reason) == ("failed", 10, "data.crop: unknown key; remove it")
    assert not (tmp_path / "absent").exists()


def test_the_heartbeat_is_kept_fresh_but_not_written_every_step(run, monkeypatch):
    status = StatusFile(run, 2)
    status.tick(11)
    assert read_status(run)["step"] == 10
    monkeypatch.setattr(run_status, "TICK_S", 0.0)
    status.tick(12)
    assert read_status(run)["step"] == 12


def test_runs_are_found_in_a_folder(run, tmp_path):
    (tmp_path / "other").mkdir()
    assert [found.root for found in find_runs([tmp_path])] == [run.root]
    with pytest.raises(ConfigError, match="no run here"):
        find_runs([tmp_path / "other"])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 s"), (125, "2 min"), (7500, "2 h 05 min"), (200_000, "2 d 7 h")],
    ids=lambda value: str(value),
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_status_needs_no_torch_and_prints_a_table_or_json(run):
    code = "import sys; from vmjepa.cli import main; sys.argv = ['vmjepa', *sys.argv[1:]]\ntry: main()\n"
    code += "finally: assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "status", str(run.root)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "10/40" in shown.stdout
    as_json = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(as_json.stdout)[0]["skill"] == 0.25


@pytest.mark.slow
def test_a_run_that_cannot_train_leaves_its_reason(tmp_path, data_dir):
    """A missing data file found by the trainer, then a config error found before it: status shows each in turn."""
    config, run = write_config(tmp_path, data_dir), tmp_path / "run"
    for override, words in (("data.datasets=[/nowhere.csv]", "/nowhere.csv"), ("data.crop_sise=64", "crop_sise")):
        done = subprocess.run(command_of(config, run, override), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 93, done.stderr
        found = view(RunDir(run))
        assert found.state == "failed"
        assert words in found.reason
