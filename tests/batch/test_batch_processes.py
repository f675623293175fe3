"""Two processes of JAX on this machine, each with one device, do one job: with one model, or each with a copy."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aphrodite_jax import LLM, SamplingParams

pytestmark = pytest.mark.once

DRIVER = Path(__file__).with_name("processes_driver.py")
PICTURE = Path(__file__).parents[2] / "docs" / "assets" / "example.png"
ROWS, ROWS_PER_PART, ANSWER_TOKENS = 48, 8, 4
QUESTIONS = ("what color is the shape?", "what is the shape?", "is there a blue shape?")


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def messages(number):
    question = f"{QUESTIONS[number % 3]}{' please' * (number % 4)}"
    picture = {"type": "image_url", "image_url": {"url": PICTURE.as_uri()}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Rows, one of which has no image."""
    directory = tmp_path_factory.mktemp("processes")
    lines = lines_of(ROWS)
    lines[17] = lines[17].replace("example.png", "missing.png")
    (directory / "rows.jsonl").write_text("".join(lines))
    return directory


def lines_of(count):
    lines = []
    for number in range(count):
        body = {"max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True, "messages": messages(number)}
        line = {"custom_id": f"row {number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(line) + "\n")
    return lines


def start(job, *options, of_second=()):
    """Both processes, at work."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"JAX_PLATFORMS": "cpu"}
    port, processes = free_port(), []
    command = [sys.executable, str(DRIVER), str(job / "rows.jsonl"), "-o", str(job / "out"), "--max-num-seqs", "4"]
    command += ["--rows-per-part", str(ROWS_PER_PART), "--compilation-cache-dir", str(job / "cache"), *options]
    for index in range(2):
        log = open(job / f"log {index}", "w")  # noqa: SIM115 - closed with the process
        where = ["--processes", f"localhost:{port},2,{index}"]
        own = of_second if index else ()
        processes.append(subprocess.Popen([*command, *where, *own], env=environment, stdout=log, stderr=log))
        log.close()
    return processes


def statuses(processes, job):
    try:
        found = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return found, [(job / f"log {index}").read_text()[-2000:] for index in range(2)]


def rows_of(job, folder):
    parts = sorted((job / "out" / folder).glob("*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


def wait_for(condition, processes):
    until = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


def test_two_processes_stop_together_and_come_to_the_end(job):
    processes = start(job, "--tensor-parallel-size", "2")
    wait_for(lambda: any((job / "out" / "done").glob("*")), processes)
    processes[1].send_signal(signal.SIGTERM)  # the first hears of it
    stopped, logs = statuses(processes, job)
    assert stopped == [143, 143], logs
    report = json.loads((job / "out" / "report.json").read_text())
    assert report["stopped"]
    assert 0 < report["answered"] < ROWS - 1
    ended, logs = statuses(start(job, "--tensor-parallel-size", "2"), job)
    assert ended == [3, 3], logs  # one row has failed
    report = json.loads((job / "out" / "report.json").read_text())
    assert (report["answered"], report["failed"], report["complete"]) == (ROWS - 1, 1, True)
    assert report["resumed"] >= ROWS_PER_PART
    answered = rows_of(job, "parts")
    assert [row["custom_id"] for row in answered] == [f"row {number}" for number in range(ROWS) if number != 17]
    assert [row["custom_id"] for row in rows_of(job, "errors")] == ["row 17"]
    alone = LLM(warm_up=False, show_progress=False, max_num_seqs=4)
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    few = range(12)
    outputs = alone.chat([messages(number) for number in few], params, use_tqdm=False)
    texts = [row["response"]["body"]["choices"][0]["message"]["content"] for row in answered[: len(few)]]
    assert texts == [output.outputs[0].text for output in outputs]


def test_without_a_size_each_process_has_a_copy_and_its_share(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(lines_of(4 * ROWS_PER_PART)))
    ended, logs = statuses(start(tmp_path), tmp_path)
    assert ended == [0, 0], logs
    reports = [json.loads((tmp_path / "out" / f"report-{index}-of-2.json").read_text()) for index in range(2)]
    assert [report["answered"] for report in reports] == [2 * ROWS_PER_PART] * 2
    assert [row["custom_id"] for row in rows_of(tmp_path, "parts")] == [f"row {n}" for n in range(4 * ROWS_PER_PART)]
    assert (tmp_path / "out" / "manifest.json").exists()


def test_options_that_differ_stop_both(job):
    processes = start(job, "--tensor-parallel-size", "2", of_second=("--max-num-batched-tokens", "64"))
    ended, logs = statuses(processes, job)
    assert 0 not in ended
    assert any("processes of one replica differ in the engine's options" in log for log in logs)
