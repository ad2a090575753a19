"""The scripts of launch/ are sound as far as that shows without a cluster."""

import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_have_no_known_mistake(script):
    lint = shutil.which("shellcheck")
    assert lint, "shellcheck comes with jaxcl[dev]"
    found = subprocess.run([lint, str(script)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_run_and_say_what_was_run_of_them(script):
    assert script.stat().st_mode & 0o111
    comments = " ".join(
        line.lstrip("# ") for line in script.read_text().splitlines() if line.startswith("# ")
    )
    assert any(word in comments for word in ("Not run", "Runs in the tests", "Runs on"))


def test_the_pods_of_kubernetes_are_as_many_as_their_slice_has_hosts():
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
    """The job within the JobSet, as Kubernetes makes one of it."""
    inside = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())["spec"]["replicatedJobs"][0]
    named = {"metadata": {"name": inside["name"]}, **inside["template"]}
    return {"apiVersion": "batch/v1", "kind": "Job", **named}


def test_the_job_of_kubernetes_fits_its_schema():
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(job(), version, strict=True)
    wrong = job()
    wrong["spec"]["template"]["spec"]["containers"][0]["arg"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="arg"):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_a_mistake_would_be_found(tmp_path):
    script = tmp_path / "bad.sh"
    script.write_text('#!/usr/bin/env bash\nrm -rf "$1"/* $2\n')
    found = subprocess.run([str(shutil.which("shellcheck")), str(script)], capture_output=True)
    assert found.returncode == 1
