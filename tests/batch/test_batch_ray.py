"""A job on Ray: workers of a local cluster, of which one is killed; every row stands in the output once."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aphrodite_jax.batch.on_ray import RayOptions, run_on_ray
from aphrodite_jax.errors import BatchError, ConfigError

pytest.importorskip("ray", reason="Ray is an extra of its own")

pytestmark = pytest.mark.once

DRIVER = Path(__file__).with_name("ray_driver.py")
PICTURE = Path(__file__).parents[2] / "docs" / "assets" / "example.png"
ROWS = 48
IDS = [f"row {number}" for number in range(ROWS)]


def line(number):
    picture = {"type": "image_url", "image_url": {"url": PICTURE.as_uri()}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": f"{number}?"}]}]
    body = {"max_tokens": 2, "temperature": 0, "messages": messages}
    return {"custom_id": f"row {number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


@pytest.fixture(scope="module")
def told(computed_once, tmp_path_factory):
    def compute():
        directory = tmp_path_factory.mktemp("ray")
        rows = directory / "rows.jsonl"
        rows.write_text("".join(json.dumps(line(number)) + "\n" for number in range(ROWS)))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        command = [sys.executable, str(DRIVER), str(rows), str(directory)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-5000:]
        return json.loads(done.stdout.splitlines()[-1])

    return computed_once("ray", compute)


def test_a_worker_that_is_killed_costs_no_row_and_repeats_none(told):
    kill = told["kill"]
    assert kill["killed"] == 1
    assert kill["ids"] == IDS
    report = kill["report"]
    assert (report["rows"], report["answered"], report["failed"], report["held"]) == (ROWS, ROWS, 0, 0)
    assert not report["stopped"]
    assert kill["complete"]
    again = kill["again"]
    assert (again["answered"], again["resumed"], again["completion_tokens"]) == (ROWS, ROWS, 0)


def test_a_worker_of_two_hosts_that_serve_one_model_together(told):
    assert told["hosts"]["ids"] == IDS
    report = told["hosts"]["report"]
    assert (report["rows"], report["answered"], report["failed"], report["held"]) == (ROWS, ROWS, 0, 0)


def test_a_stop_is_no_error(told):
    assert told["stop"]["stopped"]
    assert told["stop"]["answered"] == 0
    assert not told["left behind"]


def test_an_error_of_a_worker_is_told_as_it_is(told):
    assert told["error"]["error"] == "ConfigError: max_num_batched_tokens must be at least 16, got 1"


def test_too_many_failures_stop_the_job(told):
    assert told["failures"]["error"].startswith("BatchError: ")
    assert "rows failed, more than max_failures 5 allows" in told["failures"]["error"]


def test_a_cluster_that_is_not_there(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(line(0)) + "\n")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(BatchError, match=f"nobody listens at {address}, where a Ray cluster should be"):
        run_on_ray(
            {"input_path": str(rows), "output_path": str(tmp_path / "out")},
            {},
            RayOptions(address=address),
            stop=threading.Event(),
            show_progress=False,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"resources": {"TPU": 0}}, "resources of a worker are like CPU=1 or TPU=4"),
        ({"tpu_slice": "v5e"}, "a TPU slice is like v5e:4x4, got 'v5e'"),
    ],
)
def test_placements_that_are_none(options, message):
    with pytest.raises(ConfigError, match=message):
        RayOptions(**options)
