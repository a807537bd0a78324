"""The command line: device lists, and errors that are one sentence with an exit code and no traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from vmjepa.cli import spread_devices
from vmjepa.errors import ConfigError
from vmjepa.launch.local import check_devices


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["pretrain", "c.yaml"], ["pretrain", "c.yaml"]),
        (["c.yaml", "--devices", "cpu", "cpu"], ["c.yaml", "--devices", "cpu", "--devices", "cpu"]),
        (["--devices", "cuda:0", "cuda:1", "a.b=1"], ["--devices", "cuda:0", "--devices", "cuda:1", "a.b=1"]),
        (["c.yaml", "--devices"], ["c.yaml", "--devices"]),
    ],
    ids=["none", "two-cpus", "before-overrides", "empty"],
)
def test_devices_are_a_list(given, expected):
    assert spread_devices(given) == expected


@pytest.mark.parametrize("devices", [["gpu"], ["cuda"], ["cuda:99"], ["cpu", "tpu:0"], ["cpu:x"]], ids=" ".join)
def test_devices_that_are_not_there_are_refused(devices):
    with pytest.raises(ConfigError, match="--devices"):
        check_devices(devices)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain", "missing.yaml"], "missing.yaml: no such config file"),
        (["pretrain", "{config}", "data.crop_sise=64"], "did you mean data.crop_size"),
        (["pretrain", "{config}", "data.crop_size=100"], "not divisible"),
        (["pretrain", "{config}", "data.datasets=[/nowhere.csv]"], "/nowhere.csv"),
        (["pretrain", "{config}", "meta.read_checkpoint=/nowhere"], "/nowhere"),
    ],
    ids=["no-config", "unknown-key", "crop", "no-csv", "no-checkpoint"],
)
def test_mistakes_are_one_sentence(arguments, words, tmp_path):
    """Exit code 93, the remedy on stderr, no traceback."""
    config = str(ROOT / "configs/pretrain/demo.yaml")
    words_in = [word.format(config=config) for word in arguments]
    if words_in[1] == config:
        words_in.insert(2, f"logging.folder={tmp_path}")
    command = [sys.executable, "-m", "vmjepa.cli", *words_in]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 93, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
