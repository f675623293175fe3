"""A job that stops at any moment and starts again ends as one that did not; other outputs are refused."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from batch_fakes import FakeLLM, completion_line, read_answers, write_requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aphrodite_jax.batch import open_job, run_batch
from aphrodite_jax.batch.output import open_output, replace_file
from aphrodite_jax.errors import BatchError

ROOT = Path(__file__).parents[2]


def some_lines(count):
    """Requests of which some are refused."""
    lines = [completion_line(f"r{i}", f"p{i}") for i in range(count)]
    for index in range(3, count, 7):
        lines[index] = "no json"
    for index in range(5, count, 7):
        lines[index] = lines[index - 5]
    return lines


@pytest.fixture
def job(tmp_path):
    """A job that has run to its end."""
    requests = write_requests(tmp_path / "requests.jsonl", some_lines(30))
    llm = FakeLLM(tmp_path / "model")

    def run(**options):
        options = {"llm": llm, "input_path": requests, "output_path": tmp_path / "answers.jsonl", **options}
        return run_batch(**options, show_progress=False)

    run()
    return run


@pytest.mark.once
def test_ten_kills_in_a_row_change_nothing(tmp_path):
    requests = write_requests(tmp_path / "requests.jsonl", some_lines(400))
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("batch_kill_driver.py")), str(tmp_path), "1"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed: True") == 10
    assert "\n0 resumed" not in done.stdout
    run_batch(FakeLLM(tmp_path / "model"), requests, tmp_path / "undisturbed.jsonl", show_progress=False)
    assert (tmp_path / "answers.jsonl").read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(data=st.data())
def test_cut_at_any_byte_it_goes_on(job, tmp_path, data):
    answers = tmp_path / "answers.jsonl"
    whole = answers.read_bytes()
    size = data.draw(st.integers(0, len(whole)))
    answers.write_bytes(whole[:size] + data.draw(st.sampled_from([b"", b"\0" * 9, b'{"id": 3}'])) * (size > 0))
    report = job()
    assert answers.read_bytes() == whole
    assert report.num_resumed == whole[:size].count(b"\n")
    assert (report.num_answered, report.num_failed) == (22, 8)


def test_a_finished_job_asks_the_engine_for_nothing(job, tmp_path):
    llm = FakeLLM(tmp_path / "model")
    report = job(llm=llm)
    assert (report.num_resumed, llm.engine.num_steps) == (30, 0)


def test_how_many_run_at_a_time_may_change(job, tmp_path):
    answers = tmp_path / "answers.jsonl"
    ids = [line["id"] for line in read_answers(answers)]
    written = answers.read_bytes()[:2000]
    answers.write_bytes(written)
    job(llm=FakeLLM(tmp_path / "model", max_num_seqs=1))
    assert [line["id"] for line in read_answers(answers)] == ids
    assert answers.read_bytes().startswith(written[: written.rindex(b"\n") + 1])


def test_another_job_is_refused_and_nothing_overwritten(job, tmp_path):
    before = {path.name: path.read_bytes() for path in tmp_path.glob("answers*")}
    other = write_requests(tmp_path / "other.jsonl", some_lines(29))
    retrained = FakeLLM(tmp_path / "retrained")
    (tmp_path / "retrained" / "model.safetensors").write_bytes(b"weights")
    for options, words in (
        ({"input_path": other}, "input.sha256"),
        ({"llm": FakeLLM(tmp_path / "model", seed=5)}, "model.seed"),
        ({"llm": retrained}, "model.checkpoint"),
        ({"max_tokens": 5}, "options.max_tokens"),
    ):
        with pytest.raises(BatchError, match=words):
            job(**options)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("answers*")} == before


def test_a_model_is_known_by_its_files_not_its_place(job, tmp_path):
    shutil.copytree(tmp_path / "model", tmp_path / "elsewhere" / "model")
    assert job(llm=FakeLLM(tmp_path / "elsewhere" / "model")).num_resumed == 30
    with pytest.raises(BatchError, match=r"options\.name"):
        job(llm=FakeLLM(tmp_path / "renamed"))
    with pytest.raises(BatchError, match=r"options\.served_model_names"):
        job(served_model_names=("other",))


@pytest.mark.parametrize("content", ["somebody's notes\n", '{"id": "batch_req_000000001"}\n'])
def test_a_file_of_no_job_is_refused(tmp_path, content):
    requests = write_requests(tmp_path / "requests.jsonl", some_lines(3))
    (tmp_path / "answers.jsonl").write_text(content)
    with pytest.raises(BatchError, match="not of this job"):
        run_batch(FakeLLM(tmp_path / "model"), requests, tmp_path / "answers.jsonl", show_progress=False)
    assert (tmp_path / "answers.jsonl").read_text() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "model", "requests.jsonl"]


def test_a_changed_output_is_refused(job, tmp_path):
    answers = tmp_path / "answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    for changed in (
        [*lines[:4], "{}\n", *lines[5:]],
        [lines[1], lines[0]],
        [*lines, lines[0]],
        lines[1:],
        [*lines[:4], lines[4][:50] + "\n"],
        ["\n", *lines],
    ):
        answers.write_text("".join(changed))
        with pytest.raises(BatchError, match="not what this job wrote"):
            job()
        assert answers.read_text() == "".join(changed)


def test_an_input_of_no_file_or_that_is_the_output(tmp_path):
    llm = FakeLLM(tmp_path / "model")
    requests = write_requests(tmp_path / "requests.jsonl", some_lines(3))
    before = requests.read_bytes()
    os.link(requests, tmp_path / "link.jsonl")
    for output in (requests, tmp_path / "link.jsonl"):
        with pytest.raises(BatchError, match="overwrite the input"):
            run_batch(llm, requests, output, show_progress=False)
    for source in (tmp_path / "none.jsonl", tmp_path, Path("/dev/null")):
        with pytest.raises(BatchError, match="not a file"):
            run_batch(llm, source, tmp_path / "answers.jsonl", show_progress=False)
    assert requests.read_bytes() == before
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("missing/answers.jsonl", "No such file or directory"),
        ("model", "Is a directory"),
        ("requests.jsonl/answers.jsonl", "Not a directory"),
        ("/dev/full", "no regular file"),
    ],
)
def test_an_output_that_can_not_be_written(tmp_path, output, words):
    llm = FakeLLM(tmp_path / "model")
    requests = write_requests(tmp_path / "requests.jsonl", some_lines(3))
    with pytest.raises(BatchError, match=words):
        run_batch(llm, requests, tmp_path / output, show_progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "requests.jsonl"]


def test_a_full_disk_leaves_whole_lines_and_the_job_goes_on(tmp_path):
    requests = write_requests(tmp_path / "requests.jsonl", some_lines(30))
    llm, answers = FakeLLM(tmp_path / "model"), tmp_path / "answers.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        with pytest.raises(BatchError, match="File too large"):
            run_batch(llm, requests, answers, show_progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    written = answers.read_bytes()
    assert 0 < len(written) <= 4000
    assert written.endswith(b"\n")
    assert not llm.engine.has_unfinished_requests()
    assert len(read_answers(answers)) == written.count(b"\n")
    report = run_batch(llm, requests, answers, show_progress=False)
    assert (report.num_lines, report.num_resumed) == (30, written.count(b"\n"))
    run_batch(llm, requests, tmp_path / "undisturbed.jsonl", show_progress=False)
    assert answers.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


def test_a_disk_that_loses_what_it_took(tmp_path, monkeypatch):
    with open_output(str(tmp_path / "answers.jsonl")) as output:
        output.append(b"kept\n")
        output.sync()
        output.append(b"lost\n")
        monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(BatchError, match="Input/output error"):
            output.sync()
    assert (tmp_path / "answers.jsonl").read_bytes() == b"kept\n"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl.job.json"
    replace_file(str(path), b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(BatchError, match="No space left"):
        replace_file(str(path), b"new")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [(path.name, b"old")]


def test_two_runs_on_one_output_refuse(tmp_path):
    requests = write_requests(tmp_path / "requests.jsonl", some_lines(3))
    llm, answers = FakeLLM(tmp_path / "model"), tmp_path / "answers.jsonl"
    with (
        open_job(requests, answers, model_config=llm.model_config),
        pytest.raises(BatchError, match="another run"),
    ):
        run_batch(llm, requests, answers, show_progress=False)
    run_batch(llm, requests, answers, show_progress=False)


def test_nothing_stays_behind_when_no_model_comes(tmp_path):
    requests = write_requests(tmp_path / "requests.jsonl", some_lines(3))
    config = FakeLLM(tmp_path / "model").model_config
    with (
        pytest.raises(RuntimeError, match="no model"),
        open_job(requests, tmp_path / "a", model_config=config),
    ):
        raise RuntimeError("no model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "requests.jsonl"]


def test_a_damaged_job_file_is_refused(job, tmp_path):
    (tmp_path / "answers.jsonl.job.json").write_text("{")
    with pytest.raises(BatchError, match="can't read"):
        job()


def test_the_job_file_says_whose_answers_these_are(job, tmp_path):
    identity = json.loads((tmp_path / "answers.jsonl.job.json").read_text())
    assert identity["model"]["dtype"] == "auto"
    assert identity["input"]["bytes"] == (tmp_path / "requests.jsonl").stat().st_size
