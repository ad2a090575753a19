"""Checks of the launch scripts that need no cluster."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing_in_a_script(script):
    lint = shutil.which("shellcheck")
    assert lint, "shellcheck comes with jaxcl[dev]"
    result = subprocess.run([lint, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_say_whether_they_were_tested(script):
    assert script.stat().st_mode & 0o111
    comments = " ".join(
        line.lstrip("# ") for line in script.read_text().splitlines() if line.startswith("# ")
    )
    assert any(word in comments for word in ("Not tested", "Covered by tests", "Runs on any CPU"))


def test_kubernetes_starts_one_pod_per_host_of_the_slice():
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())["spec"]["replicatedJobs"][0]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    hosts = rows * columns // container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == hosts
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert any(arg.startswith(f"--workdir={mounts['runs']}/") for arg in container["args"])


def job():
    """The job that JobSet creates from its template."""
    inside = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())["spec"]["replicatedJobs"][0]
    named = {"metadata": {"name": inside["name"]}, **inside["template"]}
    return {"apiVersion": "batch/v1", "kind": "Job", **named}


def test_the_kubernetes_job_matches_its_schema():
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(job(), version, strict=True)
    wrong = job()
    wrong["spec"]["template"]["spec"]["containers"][0]["arg"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="arg"):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_the_pods_have_no_more_rights_than_they_need():
    pod = job()["spec"]["template"]["spec"]
    context = pod["securityContext"]
    user = context["runAsUser"]
    assert context["runAsNonRoot"] is True
    assert user > 0
    assert context["fsGroup"] == context["runAsGroup"] == user
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    assert f"USER {user}:{user}" in lines
    assert lines.index(f"USER {user}:{user}") > lines.index("COPY . .")


def test_the_base_image_is_pinned_to_a_version():
    base = re.search(r"^ARG BASE=(\S+)$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)[1]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)


def test_the_image_contains_only_the_package():
    listed = (LAUNCH.parent / ".dockerignore").read_text().splitlines()
    rules = [line for line in listed if not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert all((LAUNCH.parent / name).exists() for name in allowed)
    assert allowed == {"LICENSE", "README.md", "pyproject.toml", "configs", "jaxcl"}


def test_the_readme_lists_every_file():
    table = re.findall(r"^\| `([^`]+)` \|", (LAUNCH / "README.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(path.name for path in LAUNCH.iterdir() if path.suffix != ".md")


HOSTILE = "x; touch pwned $(touch pwned) `touch pwned` 'a\" b"


def run_on_a_pod(folder: Path, *arguments: str) -> list[list[str]]:
    """The commands that the hosts of a pod run, with stubs for the programs that they need."""
    stubs = folder / "stubs"
    stubs.mkdir()
    record = '#!/bin/bash\nprintf "%s\\0" "${0##*/}" "$@" >> "$RECORD"; echo >> "$RECORD"\n'
    for name in ("git", "gcsfuse", "pip", "python3", "python"):
        (stubs / name).write_text(record)
    # A host's shell parses the command again, as over SSH.
    (stubs / "gcloud").write_text(
        '#!/bin/bash\ncase "$*" in *describe*) echo ACTIVE; exit;; esac\n'
        'for word in "$@"; do case $word in --command=*)\n'
        '    HOME="$HOSTS_HOME" bash -euc "${word#--command=}";; esac; done\n'
    )
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    for name in (".venv/bin", ""):
        (folder / "jaxcl" / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(stubs / "python", folder / "jaxcl" / ".venv" / "bin" / "python")
    subprocess.run(
        [LAUNCH / "tpu_pod.sh", *arguments],
        cwd=folder,
        env=os.environ
        | {"PATH": f"{stubs}:{os.environ['PATH']}", "RECORD": str(folder / "record")}
        | {"HOSTS_HOME": "/home/host"},
        check=True,
        timeout=60,
    )
    lines = (folder / "record").read_text().split("\0\n")
    return [line.split("\0") for line in lines if line]


@pytest.mark.slow
def test_the_hosts_of_a_pod_get_each_word_as_it_was_given(tmp_path):
    ran = run_on_a_pod(tmp_path, HOSTILE, "zone", "v5litepod-16", HOSTILE, HOSTILE, "--x", HOSTILE)
    assert ["git", "clone", "--quiet", "--", HOSTILE, "jaxcl"] in ran
    assert ["gcsfuse", HOSTILE, "runs"] in ran
    workdir = f"/home/host/runs/{HOSTILE}"
    trainer = ["python", "-m", "jaxcl.train", "--distributed", "--workdir", workdir]
    assert [*trainer, "--x", HOSTILE] in ran
    assert not list(tmp_path.rglob("pwned"))


def test_a_mistake_would_be_found(tmp_path):
    script = tmp_path / "bad.sh"
    script.write_text('#!/usr/bin/env bash\nrm -rf "$1"/* $2\n')
    found = subprocess.run([str(shutil.which("shellcheck")), str(script)], capture_output=True)
    assert found.returncode == 1
