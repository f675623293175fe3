"""Job specs: the syntax of their languages, commands that the command line takes, and chips that there are."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from aphrodite_jax.batch.on_ray import RayOptions
from aphrodite_jax.cli import _parser

pytestmark = pytest.mark.once

DEPLOY = Path(__file__).parents[1] / "deploy"


def parsed(command):
    """The options of a command line of `aphrodite-jax`."""
    program, *arguments = shlex.split(command)
    assert program == "aphrodite-jax"
    return _parser().parse_args(arguments)


def test_every_file_is_told_of():
    readme = (DEPLOY / "README.md").read_text()
    assert {path.name for path in DEPLOY.iterdir()} - {"README.md"} == set(re.findall(r"^\| `(.*?)`", readme, re.M))


def test_the_kuberay_job():
    job = yaml.safe_load((DEPLOY / "kuberay_tpu.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    args = parsed(job["spec"]["entrypoint"])
    options = RayOptions(workers=args.ray_workers, resources=args.ray_resources)
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    [container] = pod["containers"]
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert rows * columns == chips * group["numOfHosts"]
    assert options.resources == {"TPU": chips}
    assert args.tensor_parallel_size == chips
    assert options.workers == group["replicas"] <= group["maxReplicas"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert head["image"] == container["image"]


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """A `gcloud` that says what it was asked for."""
    tool = tmp_path / "bin" / "gcloud"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nfor x in "$@"; do printf \'%s\\n\' "$x"; done\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")

    def run(*arguments, **environment):
        command = [str(DEPLOY / "tpu_vm.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)

    return run


def command_of(done):
    [command] = re.findall(r"^ *(aphrodite-jax batch (?:.|\\\n)*?)$", done.stdout, re.M)
    return parsed(command.replace("\\\n", " "))


def test_the_script_for_tpu_vms(gcloud):
    assert subprocess.run(["bash", "-n", str(DEPLOY / "tpu_vm.sh")], check=False).returncode == 0
    assert "queued-resources" in gcloud("create").stdout
    assert "delete" in gcloud("delete").stdout
    by_host = command_of(gcloud("run", PROMPT="What's this?"))
    assert (by_host.processes, by_host.tensor_parallel_size, by_host.prompt) == ("auto", 4, "What's this?")
    of_all = command_of(gcloud("run", DIVIDED="all"))
    assert (of_all.processes, of_all.tensor_parallel_size) == ("auto", 16)
    assert "export JAX_COMPILATION_CACHE_DIR=gs://b/xla\n" in gcloud("run", CACHE="gs://b/xla").stdout
    nothing = gcloud()
    assert nothing.returncode == 2
    assert "tpu_vm.sh run" in nothing.stderr
