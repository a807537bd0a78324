"""Cluster profiles: the ready ones load, mistakes are one sentence, and a login node needs no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT
from vmjepa.errors import ConfigError
from vmjepa.launch.cluster import PROFILES, load_cluster

READY = ["example-large-site", "example-university", "local", "slurm-apptainer", "slurm-bare", "slurm-pyxis"]


def test_ready_profiles_are_all_there():
    assert sorted(path.stem for path in PROFILES.glob("*.yaml")) == READY


@pytest.mark.parametrize("name", READY)
def test_ready_profiles_load(name):
    """By name and by path alike."""
    profile = load_cluster(name)
    assert profile == load_cluster(str(PROFILES / f"{name}.yaml"))
    assert profile.ranks_per_node == (profile.node.gpus or 2)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"slurm": {"partion": "a"}}, "slurm.partion: unknown key; did you mean slurm.partition?"),
        ({"slurm": {"partition": "a b"}}, "without spaces, quotes or shell characters"),
        ({"slurm": {"account": "$(id)"}}, "slurm.account"),
        ({"slurm": {"time_limit": "a day"}}, "slurm.time_limit"),
        ({"slurm": {"time_limit": 86400}}, "in quotation marks"),
        ({"slurm": {"extra": ["--wrap='rm -rf x'"]}}, "slurm.extra.0"),
        ({"slurm": {"extra": ["exclusive"]}}, "slurm.extra.0"),
        ({"node": {"gpus": 4, "ranks": 2}}, "node.ranks: 2 ranks do not fit 4 GPUs"),
        ({"node": {"gpu_type": "a100"}}, "node.gpu_type"),
        ({"container": {"runtime": "apptainer"}}, "container.image: missing"),
        ({"container": {"image": "x.sif"}}, "container.image: given, but runtime is none"),
        ({"container": {"runtime": "pyxis", "image": "x", "venv": "/v"}}, "container.venv"),
        ({"container": {"runtime": "docker", "image": "x"}}, "use apptainer or pyxis with Slurm"),
        ({"container": {"runtime": "pyxis", "image": "x", "binds": ["data"]}}, "container.binds.0"),
        ({"container": {"runtime": "pyxis", "image": "x", "binds": ["/a,/b"]}}, "which holds a comma"),
        ({"environment": {"A B": "1"}}, "environment"),
        ({"scheduler": "none", "nodes": 2}, "nodes: 2 computers need a scheduler"),
        ({"scratch": {"folder": "/tmp", "variable": "TMPDIR"}}, "scratch.variable"),
        ({"container": {"runtime": "pyxis", "image": "x"}, "scratch": {"variable": "TMPDIR"}}, "scratch.variable"),
        ({"requeue": {"mode": "chain", "lead_seconds": 5}}, "requeue.lead_seconds"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_mistakes_name_the_key(tmp_path, content, sentence):
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as error:
        load_cluster(str(path))
    assert str(error.value).startswith(str(path))
    assert sentence in str(error.value)


def test_unknown_profile_lists_the_known():
    with pytest.raises(ConfigError, match="slurm-apptainer"):
        load_cluster("slurm-aptainer")


def test_overrides_are_checked_like_the_file():
    assert load_cluster("slurm-bare", ["slurm.partition=gpu", "node.gpus=8"]).ranks_per_node == 8
    with pytest.raises(ConfigError, match=r"override 'node\.gpu=8'"):
        load_cluster("slurm-bare", ["node.gpu=8"])


def test_launching_needs_no_torch():
    """Rendering and submitting work on a login node, where torch may be absent."""
    code = "import sys; sys.modules['torch'] = None; import vmjepa.cli, vmjepa.launch.cluster"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
