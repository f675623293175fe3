"""A job of parts that is killed or stopped at any moment ends with every row once; other outputs are refused."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
from batch_fakes import FakeLLM, completion_line, read_answers, write_requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts_processes import run_command, run_share

from aphrodite_jax.batch import open_parts, reader, run_parts
from aphrodite_jax.batch.answers import json_line
from aphrodite_jax.batch.sources.jsonl import JsonlSource
from aphrodite_jax.errors import BatchError

pytestmark = pytest.mark.once

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def some_lines(count):
    """Requests of which some are refused."""
    lines = [completion_line(f"r{i}", f"p{i}") for i in range(count)]
    for index in range(3, count, 7):
        lines[index] = "no json"
    for index in range(5, count, 7):
        lines[index] = lines[index - 5]
    return lines


def rows_of(output: Path) -> list[int]:
    """Numbers of the rows in the output, in their order there, each part's failures behind its answers."""
    rows = []
    for mark in sorted((output / "done").iterdir()):
        for folder in ("parts", "errors"):
            path = output / folder / f"{mark.stem}.jsonl"
            values = read_answers(path) if path.exists() else []
            rows += [value["row"] if "row" in value else int(value["id"].rpartition("_")[2]) - 1 for value in values]
    return rows


@pytest.fixture
def job(tmp_path):
    """A job of 30 rows in 4 parts, and how to run it."""
    requests = write_requests(tmp_path / "requests.jsonl", some_lines(30))
    llm = FakeLLM(tmp_path / "model")

    def run(*, llm=llm, source=requests, output=tmp_path / "answers", model_config=None, **options):
        job = open_parts(source, output, model_config=model_config or llm.model_config, **options)
        report = run_parts(llm, job, show_progress=False)
        job.finish()
        return report

    run(rows_per_part=9)
    return run


NO_LINES = [
    b"", b"\0" * 9, b"x\n", b'{"row":3}\n', b'{"row":99,"failure":{}}\n', b'{"record":{},"row":3}\n',
    b'{"row": 3, "record": {}}\n',
]  # fmt: skip
"""What a journal may end with that no run writes."""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_was_written_it_goes_on(job, tmp_path, data):
    """Any state that a kill can leave: parts without a mark, journals cut at any byte, files that are half written."""
    output, pristine = tmp_path / "answers", tmp_path / "pristine"
    if not pristine.exists():
        shutil.copytree(output, pristine)
    shutil.rmtree(output)
    shutil.copytree(pristine, output)
    whole = {path: path.read_bytes() for path in output.rglob("*.json*")}
    for index in range(4):
        name = f"part-{index:06d}"
        if data.draw(st.booleans(), f"part {index} is whole"):
            continue
        lines = []
        for folder, key in (("parts", "record"), ("errors", "failure")):
            path = output / folder / f"{name}.jsonl"
            lines += [{"row": row_number(value), key: value} for value in (read_answers(path) if path.exists() else [])]
            if path.exists() and data.draw(st.booleans(), f"{folder} is away"):
                path.unlink()
        (output / "done" / f"{name}.json").unlink()
        lines = data.draw(st.permutations(lines))
        journal = b"".join(map(json_line, lines))
        journal = journal[: data.draw(st.integers(0, len(journal)))]
        journal += data.draw(st.sampled_from(NO_LINES))
        (output / "journal").mkdir(exist_ok=True)
        (output / "journal" / f"{name}.jsonl").write_bytes(journal)
        (output / "parts" / f".{name}.jsonl.partial").write_bytes(b"half")
    (output / "manifest.json").unlink()
    report = job()
    assert (report.rows, report.answered, report.failed) == (30, 22, 8)
    assert sorted(rows_of(output)) == list(range(30))
    # Answers of the fake hang on what runs beside them, as those of a device may, but all else is equal.
    for path, content in whole.items():
        if path.parent.name not in ("parts", "done") and path.name != "manifest.json":
            assert path.read_bytes() == content, path.name
    assert not list((output / "journal").glob("*"))


def row_number(value):
    return value["row"] if "row" in value else int(value["id"].rpartition("_")[2]) - 1


def test_a_finished_job_asks_the_engine_for_nothing(job, tmp_path):
    llm = FakeLLM(tmp_path / "model")
    report = job(llm=llm)
    assert (report.resumed, llm.engine.num_steps, report.seconds < 1) == (30, 0, True)


def test_another_job_is_refused_and_nothing_overwritten(job, tmp_path):
    before = {path: path.read_bytes() for path in (tmp_path / "answers").rglob("*") if path.is_file()}
    other = write_requests(tmp_path / "other.jsonl", some_lines(29))
    retrained = FakeLLM(tmp_path / "retrained")
    (tmp_path / "retrained" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "pictures").mkdir()
    for options, words in (
        ({"source": other}, "input.sha256"),
        ({"source": tmp_path / "pictures", "form": "folder", "prompt": "p"}, "form, input.bytes"),
        ({"llm": FakeLLM(tmp_path / "model", seed=5)}, "model.seed"),
        ({"llm": retrained}, "model.checkpoint"),
        ({"max_tokens": 5}, "options.max_tokens"),
        ({"rows_per_part": 8}, "rows_per_part"),
    ):
        with pytest.raises(BatchError, match=words):
            job(**options)
    assert {path: path.read_bytes() for path in (tmp_path / "answers").rglob("*") if path.is_file()} == before


def test_an_output_of_something_else_is_refused(job, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("notes")
    (tmp_path / "file").write_text("notes")
    folder = tmp_path / "input"
    folder.mkdir()
    shutil.copy(tmp_path / "requests.jsonl", folder)
    for options, words in (
        ({"output": tmp_path / "foreign"}, "no job.json in it, but notes.txt"),
        ({"output": tmp_path / "file"}, "is a file"),
        ({"output": tmp_path / "file" / "below"}, "Not a directory"),
        ({"output": folder / "answers", "source": folder}, "lies in the input"),
        ({"output": folder, "source": folder}, "lies in the input"),
    ):
        with pytest.raises(BatchError, match=words):
            job(**options)
    assert sorted(path.name for path in folder.iterdir()) == ["requests.jsonl"]
    assert sorted(path.name for path in (tmp_path / "foreign").iterdir()) == ["notes.txt"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("job.json", b"{", "can't read .*job.json"),
        ("units.jsonl", b"{}\n", "line 1 of .*units.jsonl is damaged"),
        ("done/part-000001.json", b"{", "part-000001.json is damaged; remove it"),
        ("parts/part-000002.jsonl", b"changed", "part-000002.jsonl is not what a run wrote there"),
        ("parts/part-000002.jsonl", None, "part-000002.jsonl is not what a run wrote there"),
    ],
)
def test_a_damaged_output_is_refused(job, tmp_path, name, content, words):
    path = tmp_path / "answers" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(BatchError, match=words):
        job()


def test_a_part_can_be_made_again(job, tmp_path):
    (tmp_path / "answers" / "done" / "part-000001.json").unlink()
    (tmp_path / "answers" / "parts" / "part-000001.jsonl").write_text("other answers\n")
    (tmp_path / "answers" / "errors" / "part-000001.jsonl").write_text("other reasons\n")
    assert job().resumed == 21
    assert sorted(rows_of(tmp_path / "answers")) == list(range(30))


def test_a_part_without_answers_or_without_failures_leaves_no_file(tmp_path):
    lines = [*(completion_line(f"r{i}") for i in range(3)), *["no json"] * 3]
    requests = write_requests(tmp_path / "requests.jsonl", lines)
    llm, out = FakeLLM(tmp_path / "model"), tmp_path / "out"
    for attempt in range(2):
        job = open_parts(requests, out, model_config=llm.model_config, rows_per_part=3)
        report = run_parts(llm, job, show_progress=False)
        assert (report.answered, report.failed) == (3, 3)
        assert [path.name for path in (out / "parts").iterdir()] == ["part-000000.jsonl"]
        assert [path.name for path in (out / "errors").iterdir()] == ["part-000001.jsonl"]
        assert job.finish()
        if attempt == 0:  # as if a part had been of another time
            (out / "parts" / "part-000001.jsonl").write_text("old")
            (out / "errors" / "part-000000.jsonl").write_text("old")
            for mark in (out / "done").iterdir():
                mark.unlink()


@pytest.mark.parametrize("limit", [300, 1500, 2600])
def test_a_full_disk_leaves_what_is_whole_and_the_job_goes_on(tmp_path, limit):
    requests = write_requests(tmp_path / "requests.jsonl", some_lines(30))
    llm, output = FakeLLM(tmp_path / "model"), tmp_path / "answers"

    def run():
        job = open_parts(requests, output, model_config=llm.model_config, rows_per_part=10)
        return run_parts(llm, job, show_progress=False)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        with pytest.raises(BatchError, match="File too large"):
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not llm.engine.has_unfinished_requests()
    assert not list(output.rglob("*.partial"))
    report = run()
    assert (report.answered, report.failed, report.resumed > 0) == (22, 8, limit > 300)
    assert sorted(rows_of(output)) == list(range(30))


def test_an_input_that_changes_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "PAUSES", (0.0, 0.0))
    llm = FakeLLM(tmp_path / "model")
    for name, changed in (
        ("shorter", some_lines(8)),
        ("other", [completion_line(f"r{i}", f"q{i}") for i in range(9)]),
        ("gone", None),
    ):
        requests = write_requests(tmp_path / f"{name}.jsonl", [completion_line(f"r{i}", f"p{i}") for i in range(9)])
        job = open_parts(requests, tmp_path / name, model_config=llm.model_config)
        write_requests(requests, changed) if changed else requests.unlink()
        if changed is None:  # it may come back
            report = run_parts(llm, job, show_progress=False)
            assert (report.answered, report.failed) == (0, 9)
            assert {value["code"] for value in read_answers(tmp_path / name / "errors" / "part-000000.jsonl")} == {
                "unreadable_shard"
            }
            continue
        with pytest.raises(BatchError, match="not as it was when the job was made"):
            run_parts(llm, job, show_progress=False)
        assert not (tmp_path / name / "parts").exists()


def test_a_shard_that_can_not_be_read_is_one_failure(tmp_path, monkeypatch):
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in "abc":
        write_requests(shards / f"{name}.jsonl", [completion_line(f"{name}{i}", f"p{i}") for i in range(5)])
    scan = JsonlSource._scan

    def broken(self, file, *args):
        if file.name == "b.jsonl":
            scan(self, file, *args)  # all of it, and then an error
            raise PermissionError(13, "Permission denied")
        scan(self, file, *args)

    monkeypatch.setattr(JsonlSource, "_scan", broken)
    llm = FakeLLM(tmp_path / "model")
    job = open_parts(shards, tmp_path / "out", model_config=llm.model_config, rows_per_part=4)
    report = run_parts(llm, job, show_progress=False)
    assert (report.rows, report.answered, report.failed) == (15, 15, 1)
    assert job.finish()
    (failure,) = [value for path in (tmp_path / "out" / "errors").iterdir() for value in read_answers(path)]
    assert (failure["row"], failure["code"]) == (None, "unreadable_shard")
    assert failure["message"].startswith("b.jsonl: can't be read from byte")


def test_what_fails_for_a_moment_is_read_again(tmp_path, monkeypatch):
    rows, fails = JsonlSource.rows, iter([3, 0])

    def shaky(self, unit):
        stop = next(fails, None)
        for index, row in enumerate(rows(self, unit)):
            if index == stop:
                raise ConnectionError("reset by peer")
            yield row

    monkeypatch.setattr(JsonlSource, "rows", shaky)
    monkeypatch.setattr(reader, "PAUSES", (0.0, 0.0))
    requests = write_requests(tmp_path / "requests.jsonl", [completion_line(f"r{i}") for i in range(6)])
    llm = FakeLLM(tmp_path / "model")
    report = run_parts(llm, open_parts(requests, tmp_path / "out", model_config=llm.model_config), show_progress=False)
    assert (report.answered, report.failed) == (6, 0)


# In processes of their own.


@pytest.fixture(scope="module")
def processes():
    """Forks from a process that has imported the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["parts_processes"])
        forkserver.ensure_running()
        yield context
        forkserver._forkserver._stop()


def test_kills_in_a_row_and_other_numbers_of_workers_lose_nothing(processes, tmp_path):
    """Every other round's workers share the parts by their numbers; those of the others take any part."""
    write_requests(tmp_path / "requests.jsonl", some_lines(1600))
    (tmp_path / "model").mkdir()
    rng, killed = random.Random(1), 0

    def written():
        return len(list((tmp_path / "answers").glob("done/[!.]*")))  # files that are written are hidden

    for number in range(8):
        count = rng.randint(1, 3)
        shares = [(index, count) for index in range(count)] if number % 2 else [None] * count
        workers = [processes.Process(target=run_share, args=(tmp_path, share)) for share in shares]
        before = written()
        for worker in workers:
            worker.start()
        while number in (1, 4) and written() == before:  # the others are killed whatever they have come to
            time.sleep(0.001)
        for worker in workers:
            worker.join(rng.uniform(0.0, 0.15))
            worker.kill()
            worker.join()
            killed += worker.exitcode == -signal.SIGKILL
    assert killed > 8
    assert written()
    assert not (tmp_path / "answers" / "manifest.json").exists()
    worker = processes.Process(target=run_share, args=(tmp_path, None))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert sorted(rows_of(tmp_path / "answers")) == list(range(1600))
    manifest = json.loads((tmp_path / "answers" / "manifest.json").read_text())
    assert (manifest["rows"], manifest["answered"] + manifest["failed"]) == (1600, 1600)
    left = {path.name for path in (tmp_path / "answers").iterdir()}
    assert left == {".lock", "done", "errors", "job.json", "journal", "manifest.json", "parts", "units.jsonl"}
    assert not list((tmp_path / "answers" / "journal").iterdir())


class Command:
    """The command on a job that takes a while, in a process."""

    def __init__(self, processes, directory, *options, **settings):
        requests = directory / "requests.jsonl"
        if not requests.exists():
            write_requests(requests, [completion_line(f"r{i}", f"p{i}") for i in range(400)])
        FakeLLM(directory / "model")
        self.log = directory / "log"
        argv = ["batch", str(requests), "-o", str(directory / "out"), "--model", str(directory / "model")]
        argv += ["--rows-per-part", "32", *options]
        self.process = processes.Process(target=run_command, args=(argv, str(self.log)), kwargs=settings)
        self.process.start()

    def wait_until(self, condition):
        while not condition():
            assert self.process.is_alive(), self.log.read_text()
            time.sleep(0.01)

    def end(self, number=None):
        """Send it a signal, perhaps; its exit status and what it said last, when it has ended."""
        if number is not None:
            os.kill(self.process.pid, number)
        self.process.join(30)
        return self.process.exitcode, self.log.read_text().splitlines()[-1]


def report_of(tmp_path):
    return json.loads((tmp_path / "out" / "report.json").read_text())


def test_sigterm_finishes_what_runs_and_the_command_goes_on(processes, tmp_path):
    command = Command(processes, tmp_path, step_seconds=0.02)
    command.wait_until(lambda: any((tmp_path / "out" / "parts").glob("*.jsonl")))
    status, said = command.end(signal.SIGTERM)
    assert status == 143
    assert said.endswith("stopped: the same command goes on from here")
    stopped = report_of(tmp_path)
    assert (stopped["stopped"], stopped["complete"]) == (True, False)
    assert 32 <= stopped["answered"] < 400
    status, said = Command(processes, tmp_path).end()
    assert (status, report_of(tmp_path)["resumed"]) == (0, stopped["answered"]), said
    assert report_of(tmp_path)["complete"]
    assert sorted(rows_of(tmp_path / "out")) == list(range(400))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_that_loads_or_hangs(processes, tmp_path, number):
    loading = Command(processes, tmp_path, load_seconds=60)
    loading.wait_until(lambda: loading.log.exists() and "loading" in loading.log.read_text())
    assert loading.end(number)[0] == 128 + number
    hanging = Command(processes, tmp_path, step_seconds=60, leaves_within=0.2)
    hanging.wait_until(lambda: "step" in hanging.log.read_text())
    assert hanging.end(number)[0] == 128 + number
    assert not (tmp_path / "out" / "report.json").exists()


def test_the_exit_status_is_honest(processes, tmp_path):
    lines = [completion_line(f"r{i}", "broken image" if i % 3 == 0 else f"p{i}") for i in range(12)]
    write_requests(tmp_path / "requests.jsonl", lines)
    status, said = Command(processes, tmp_path, "--max-failures", "1").end()
    assert status == 1
    assert "more than max_failures 1 allows" in said
    config = FakeLLM(tmp_path / "model").model_config
    job = open_parts(tmp_path / "requests.jsonl", tmp_path / "out", model_config=config)
    work = job.take(next(job.units()))
    status, said = Command(processes, tmp_path).end()
    assert status == 4
    assert said.endswith("another run works on 1 of the parts")
    job.keep(work)
    status, said = Command(processes, tmp_path, "--worker", "0/2").end()
    assert status == 3
    assert "8 answered, 4 failed of 12 rows" in said
    assert (tmp_path / "out" / "report-0-of-2.json").exists()
