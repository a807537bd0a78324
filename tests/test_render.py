"""Job scripts: every ready profile gives a script that bash and shellcheck accept and that equals its golden copy;
hostile values are quoted or refused; and rendering works where torch and Slurm are absent.

VMJEPA_REWRITE_SCRIPTS=1 writes the golden copies anew; read the difference before committing it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jinja2
import pytest

from tests.conftest import ROOT
from tests.test_cluster import READY
from vmjepa.errors import ConfigError
from vmjepa.launch import render as rendering
from vmjepa.launch.cluster import load_cluster
from vmjepa.launch.render import Job, render, sbatch, shell
from vmjepa.launch.submit import Request, pretrain_job

SCRIPTS = Path(__file__).parent / "scripts"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
HOSTILE = {
    "spaces": "a  b",
    "single-quote": "it's",
    "double-quote": 'say "x"',
    "dollar": "$HOME",
    "command": "$(touch injected)",
    "backticks": "`touch injected`",
    "semicolon": "; touch injected #",
    "backslash": "a\\",
    "glob": "* ? [a]",
    "dash": "-rf",
    "jinja": "{{ 1 }}{% raw %}",
    "percent": "100%j",
    "unicode": "Größe",
}


def job_for(cluster: str, **changes) -> Job:
    """A job on two nodes where the profile allows, with paths of no particular machine."""
    profile = load_cluster(cluster)
    if profile.container.runtime == "none" and not profile.container.venv:
        container = profile.container.model_copy(update={"venv": "/home/me/vmjepa/.venv"})
        profile = profile.model_copy(update={"container": container})
    job = Job(
        command=["pretrain", "/home/me/vmjepa/configs/run.yaml", "logging.folder=/home/me/runs/a"],
        run=Path("/home/me/runs/a"),
        needs=[Path("/home/me/vmjepa/configs"), Path("/datasets/k400")],
        workdir=Path("/home/me/vmjepa"),
        cluster=cluster,
        profile=profile,
        nodes=1 if profile.scheduler == "none" else 2,
    )
    return replace(job, **changes)


def check(script: str, tmp_path: Path) -> None:
    """bash parses it, shellcheck has nothing to say."""
    parse(script)
    path = tmp_path / "script.sh"
    path.write_text(script)
    found = subprocess.run([str(SHELLCHECK), str(path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def parse(script: str) -> None:
    parsed = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr


@pytest.mark.parametrize("cluster", READY)
def test_scripts_equal_their_golden_copies(cluster, tmp_path):
    script = render("pretrain", job_for(cluster))
    check(script, tmp_path)
    golden = SCRIPTS / f"pretrain-{cluster}.sh"
    if os.environ.get("VMJEPA_REWRITE_SCRIPTS"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(script)
    assert script == golden.read_text(), "read the difference; VMJEPA_REWRITE_SCRIPTS=1 accepts it"


@pytest.mark.parametrize(
    "settings", [["container.runtime=docker"], ["container.runtime=podman", "node.gpus=2"]], ids=str
)
def test_containers_on_one_machine(settings, tmp_path):
    profile = load_cluster("local", [*settings, "container.image=vmjepa:latest", "node.ranks=null"])
    script = render("pretrain", job_for("local", profile=profile))
    check(script, tmp_path)
    runtime = settings[0].partition("=")[2]
    assert f"{runtime} run --rm" in script
    assert ("--device=nvidia.com/gpu=all" in script) == (profile.node.gpus > 0)


def everywhere(value: str) -> Job:
    """A job with `value` in its paths, its command, and every free text of the profile."""
    profile = load_cluster("slurm-bare", ["node.gpus=0", "node.ranks=1"])
    venv = f"/opt/{value}"
    profile = profile.model_copy(
        update={
            "container": profile.container.model_copy(update={"venv": venv}),
            "environment": {"HOSTILE": value},
        }
    )
    run = Path("/runs") / value
    return job_for("slurm-bare", profile=profile, run=run, workdir=Path("/") / value, command=["pretrain", value])


@pytest.mark.parametrize(
    "value",
    [value for name, value in HOSTILE.items() if name not in ("double-quote", "backslash")],
    ids=[name for name in HOSTILE if name not in ("double-quote", "backslash")],
)
def test_hostile_values_stay_values(value, tmp_path):
    """bash, running the script's assignments, sees the value as it was, and nothing else happens."""
    script = render("pretrain", everywhere(value))
    parse(script)
    lines = [line for line in script.splitlines() if line.startswith(("run=", "command=", "export HOSTILE="))]
    probe = "\n".join([*lines, 'printf "%s\\n" "$run" "${command[1]}" "$HOSTILE"'])
    done = subprocess.run(["bash", "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"/runs/{value}", value, value]
    assert not (tmp_path / "injected").exists()


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b", "a\x1b[2Jb"], ids=["newline", "return", "nul", "escape"])
def test_control_characters_are_refused(value):
    for job in (everywhere(value), job_for("slurm-bare", command=["pretrain", value])):
        with pytest.raises(ConfigError, match="control characters"):
            render("pretrain", job)


@pytest.mark.parametrize("name", ["double-quote", "backslash"])
def test_sbatch_lines_refuse_what_they_cannot_hold(name):
    with pytest.raises(ConfigError, match="#SBATCH"):
        render("pretrain", everywhere(HOSTILE[name]))
    assert shell(HOSTILE[name])  # the shell itself can


def test_a_percent_sign_is_no_pattern():
    """sbatch replaces %j in --output; one in the folder's name is doubled."""
    assert "--output=/runs/100%%j/slurm-%j.log" in render("pretrain", everywhere("100%j"))
    assert sbatch("a b") == '"a b"'


@pytest.mark.parametrize(
    "text", ["{{ value }}", "{{ value | upper }}", "{{ nothing | sh }}"], ids=["bare", "other", "undefined"]
)
def test_templates_cannot_print_unquoted(text, tmp_path, monkeypatch):
    """A template that forgets a filter, or a variable, fails instead of making a script."""
    (tmp_path / "t.sbatch.j2").write_text(text.replace("value", "job.cluster"))
    monkeypatch.setattr(rendering, "TEMPLATES", tmp_path)
    with pytest.raises((jinja2.TemplateRuntimeError, jinja2.UndefinedError)):
        render("t", job_for("local"))


def test_containers_show_parents_first():
    """A parent bound later would hide what is bound inside it."""
    job = job_for("slurm-apptainer", run=Path("/home/me/vmjepa/runs/a"))
    script = render("pretrain", job)
    binds = [line.split()[1] for line in script.splitlines() if line.strip().startswith("--bind")]
    assert binds.index("/home/me/vmjepa:/home/me/vmjepa:ro") < binds.index(
        "/home/me/vmjepa/runs/a:/home/me/vmjepa/runs/a"
    )
    with pytest.raises(ConfigError, match="comma or colon"):
        render("pretrain", replace(job, run=Path("/runs/a,b")))


def test_dry_run_needs_neither_torch_nor_slurm(tmp_path):
    """The command prints a script, touching nothing."""
    code = "import sys; sys.modules['torch'] = None; sys.argv[0] = 'vmjepa'; from vmjepa.cli import main; main()"
    words = ["submit", "pretrain", str(ROOT / "configs/pretrain/demo.yaml"), "data.global_batch_size=32", "--dry-run"]
    words += ["--cluster", "slurm-apptainer", "--nodes", "2", "--partition", "gpu", "--folder", "new run"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env={"PATH": "/nowhere", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check(done.stdout, tmp_path)
    assert "#SBATCH --partition=gpu" in done.stdout
    assert f"run='{tmp_path}/new run'" in done.stdout
    assert not (tmp_path / "new run").exists()


@pytest.mark.parametrize(
    ("cluster", "changes", "sentence"),
    [
        ("slurm-bare", {"nodes": 3}, "do not divide by 12 ranks"),
        ("local", {"nodes": 2}, "is one machine"),
        ("slurm-bare", {"overrides": ["data.cropsize=48"]}, "did you mean data.crop_size"),
        ("slurm-bare", {"settings": ["slurm.partition=a b"]}, "slurm.partition"),
    ],
    ids=["ranks", "one-machine", "config", "profile"],
)  # fmt: skip
def test_what_does_not_fit_is_refused_at_submission(cluster, changes, sentence, tmp_path):
    request = Request(ROOT / "configs/pretrain/demo.yaml", [], cluster)
    with pytest.raises(ConfigError) as error:
        pretrain_job(replace(request, **changes), tmp_path)
    assert sentence in str(error.value)


@pytest.mark.parametrize("folder", ["it's", "a: b", "#x", "null", "plain"], ids=str)
def test_the_run_directory_survives_yaml(folder, tmp_path):
    """logging.folder on the ranks' command line reads back as the folder that was asked for."""
    from vmjepa.config import load_pretrain

    request = Request(ROOT / "configs/pretrain/demo.yaml", ["logging.folder=other"], "local", folder=Path(folder))
    _, job = pretrain_job(request, tmp_path)
    assert load_pretrain(job.command[1], job.command[2:]).logging.folder == str(tmp_path / folder)
