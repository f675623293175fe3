"""A job on Ray: two workers of a local cluster, of which one is killed; every row stands in the output once."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="Ray is an extra of its own")

import psutil  # noqa: E402 - comes with Ray's own needs

from aphrodite_jax.batch import open_parts  # noqa: E402
from aphrodite_jax.batch.on_ray import RayOptions, run_on_ray  # noqa: E402
from aphrodite_jax.config import ModelConfig  # noqa: E402
from aphrodite_jax.errors import BatchError, ConfigError  # noqa: E402

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's, of its own options
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

ROWS, ROWS_PER_PART = 48, 8
ENGINE = {"max_num_seqs": 4, "warm_up": False, "show_progress": False}


@pytest.fixture(scope="module")
def cluster():
    """The address of two cores, started as a program of its own, as a cluster is."""
    with pytest.MonkeyPatch.context() as patch, socket.socket() as listener:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")  # of each worker
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.close()
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
        command += [f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
        command += ["--disable-usage-stats", f"--object-store-memory={100 * 2**20}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        head = subprocess.Popen(command, start_new_session=True, **quiet)
        yield f"127.0.0.1:{port}"
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()


@pytest.fixture
def job(tmp_path, picture):
    lines = [
        {
            "custom_id": f"row {number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "max_tokens": 2,
                "temperature": 0,
                "messages": [{"role": "user", "content": [picture, {"type": "text", "text": f"{number}?"}]}],
            },
        }
        for number in range(ROWS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "input_path": str(tmp_path / "rows.jsonl"),
        "output_path": str(tmp_path / "out"),
        "rows_per_part": ROWS_PER_PART,
    }


@pytest.fixture(scope="session")
def picture():
    path = Path(__file__).parents[2] / "docs" / "assets" / "example.png"
    return {"type": "image_url", "image_url": {"url": path.as_uri()}}


def ids(job):
    parts = sorted((Path(job["output_path"]) / "parts").iterdir())
    return [json.loads(line)["custom_id"] for part in parts for line in part.read_text().splitlines()]


def workers():
    """Processes of this machine that run a worker of Ray Data."""
    return [p for p in psutil.process_iter(["cmdline"]) if "MapWorker" in " ".join(p.info["cmdline"] or ())]


def test_a_worker_that_is_killed_costs_no_row_and_repeats_none(cluster, job):
    killed = []

    def kill_one():
        """Once the first part is there, and both are at work."""
        done = Path(job["output_path"]) / "done"
        while not (done.is_dir() and any(done.iterdir())):
            time.sleep(0.01)
        victim = workers()[0]
        victim.send_signal(signal.SIGKILL)
        killed.append(victim.pid)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    report = run_on_ray(job, ENGINE, RayOptions(workers=2, address=cluster), show_progress=False)
    killer.join(timeout=1)
    assert killed
    assert ids(job) == [f"row {number}" for number in range(ROWS)]
    assert (report.rows, report.answered, report.failed, report.held, report.stopped) == (ROWS, ROWS, 0, 0, False)
    open_job = open_parts(**job, model_config=ModelConfig())
    assert open_job.finish()
    again = run_on_ray(job, ENGINE, RayOptions(workers=2, address=cluster), show_progress=False)
    assert (again.answered, again.resumed, again.completion_tokens) == (ROWS, ROWS, 0)


def test_a_worker_of_two_hosts(cluster, job):
    """Each with one device, which serve one model together."""
    engine = {**ENGINE, "tensor_parallel_size": 2}
    report = run_on_ray(job, engine, RayOptions(workers=1, hosts=2, address=cluster), show_progress=False)
    assert (report.rows, report.answered, report.failed, report.held, report.stopped) == (ROWS, ROWS, 0, 0, False)
    assert ids(job) == [f"row {number}" for number in range(ROWS)]


def test_a_stop_reaches_the_workers(cluster, job):
    stop = threading.Event()
    stop.set()
    report = run_on_ray(job, ENGINE, RayOptions(workers=1, address=cluster), stop=stop, show_progress=False)
    assert report.stopped
    assert report.answered == 0


def test_an_error_of_a_worker_is_told_as_it_is(cluster, job):
    with pytest.raises(ConfigError, match="max_num_batched_tokens must be at least 16, got 1"):
        run_on_ray(
            job, {**ENGINE, "max_num_batched_tokens": 1}, RayOptions(workers=1, address=cluster), show_progress=False
        )


def test_too_many_failures_stop_the_job(cluster, job):
    text = Path(job["input_path"]).read_text().replace("example.png", "missing.png")
    Path(job["input_path"]).write_text(text)
    with pytest.raises(BatchError, match=r"\d+ rows failed, more than max_failures 5 allows"):
        run_on_ray(job, ENGINE, RayOptions(workers=1, address=cluster), max_failures=5, show_progress=False)


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
