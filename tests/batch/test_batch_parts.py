"""Jobs whose output is a directory of parts, with an LLM that needs no model."""

import base64
import errno
import fcntl
import io
import itertools
import json
import os
import sys
import threading
import tracemalloc
from concurrent.futures import Future
from pathlib import Path

import batch_fakes
import fsspec
import pytest
from batch_fakes import FakeLLM, chat_line, completion_line, read_answers, write_requests
from PIL import Image

from aphrodite_jax.batch import open_parts, run_parts
from aphrodite_jax.batch.requests import Defaults
from aphrodite_jax.batch.shared_images import SharedImages
from aphrodite_jax.batch.sources import FORMS, RemoteFile, RowOptions, open_source
from aphrodite_jax.errors import BatchError, MediaError
from aphrodite_jax.outputs import Logprob

pytestmark = pytest.mark.once


@pytest.fixture
def llm(tmp_path):
    llm = FakeLLM(tmp_path / "model")
    llm.engine.seen = []
    return llm


def write_images(folder: Path, count: int, kinds: int | None = None) -> Path:
    """Images of one pixel; ``kinds`` of them differ."""
    (folder / "deep").mkdir(parents=True)
    for index in range(count):
        color = (index if kinds is None else index % kinds, 7, 9)
        name = f"deep/{index:03}.png" if index % 4 == 3 else f"{index:03}.png"
        Image.new("RGB", (1 + index % 2, 1), color).save(folder / name)
    return folder


def answer(llm, source, output, *, indices=None, run=None, **options):
    job = open_parts(source, output, model_config=llm.model_config, **options)
    report = run_parts(llm, job, indices, show_progress=False, **(run or {}))
    job.finish()
    return report


def rows_of(output: Path) -> tuple[dict[str, str], list[tuple[int | None, str | None, str]]]:
    """Answers by custom_id, and failures as row, name and code; each row may stand once."""
    answers, failures = {}, []
    for path in sorted((output / "parts").glob("part-*.jsonl")):
        for value in read_answers(path):
            name = value.get("custom_id") or value["id"]
            assert name not in answers
            answers[name] = value["text"] if "text" in value else value["response"]["body"]
    for path in sorted((output / "errors").glob("*")) if (output / "errors").exists() else ():
        failures += [(value["row"], value["custom_id"], value["code"]) for value in read_answers(path)]
    return answers, failures


def names_in(output: Path) -> list[str]:
    return sorted(
        str(path.relative_to(output)) for path in output.rglob("*") if path.is_file() and path.name != ".lock"
    )


def test_jsonl_to_parts(llm, tmp_path):
    lines = [completion_line(f"r{i}", f"p{i}", n=1 + i % 2) for i in range(10)]
    lines[3], lines[5], lines[7] = "no json", lines[0], completion_line("image", "broken image")
    requests = write_requests(tmp_path / "requests.jsonl", ["", *lines])
    report = answer(llm, requests, tmp_path / "out", rows_per_part=4)
    assert (report.parts, report.rows, report.answered, report.failed, report.resumed) == (3, 10, 7, 3, 0)
    answers, failures = rows_of(tmp_path / "out")
    assert list(answers) == ["r0", "r1", "r2", "r4", "r6", "r8", "r9"]
    assert failures == [
        (3, None, "invalid_json"), (5, "r0", "duplicate_custom_id"), (7, "image", "invalid_media"),
    ]  # fmt: skip
    assert [len(body["choices"]) for body in answers.values()] == [1, 2, 1, 1, 1, 1, 2]
    assert names_in(tmp_path / "out") == [
        "done/part-000000.json", "done/part-000001.json", "done/part-000002.json",
        "errors/part-000000.jsonl", "errors/part-000001.jsonl", "job.json", "manifest.json",
        "parts/part-000000.jsonl", "parts/part-000001.jsonl", "parts/part-000002.jsonl", "units.jsonl",
    ]  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("form", "rows", "answered", "failed", "num_parts")} == {
        "form": "jsonl", "rows": 10, "answered": 7, "failed": 3, "num_parts": 3,
    }  # fmt: skip
    assert [part["part"] for part in manifest["parts"]] == [f"part-00000{i}.jsonl" for i in range(3)]
    assert manifest["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out" / "parts").iterdir())


def test_a_folder_of_images(llm, tmp_path):
    pictures = write_images(tmp_path / "pictures", 10)
    (pictures / "notes.txt").write_text("no image")
    (pictures / ".hidden.png").write_bytes(b"")
    (pictures / "002.png").write_bytes(b"damaged")
    report = answer(llm, pictures, tmp_path / "out", prompt="what?", system="be short", rows_per_part=3, max_tokens=7)
    assert (report.parts, report.answered, report.failed) == (4, 9, 1)
    answers, failures = rows_of(tmp_path / "out")
    names = [f"{i:03}.png" for i in range(10) if i % 4 != 3] + ["deep/003.png", "deep/007.png"]
    assert list(answers) == [name for name in names if name != "002.png"]
    assert failures == [(2, "002.png", "invalid_media")]
    assert all(text.endswith("é") for text in answers.values())  # of max_tokens
    shown = {prompt.text for prompt in llm.engine.seen}
    assert len(shown) == 9
    assert all(text.startswith("system: be short\nuser: <image> what? ") for text in shown)
    assert llm.num_rendered <= 2  # threads may come to it together


def test_an_image_that_is_gone_fails_its_row_alone(llm, tmp_path):
    pictures = write_images(tmp_path / "pictures", 4)
    job = open_parts(pictures, tmp_path / "out", model_config=llm.model_config, prompt="what?")
    (pictures / "001.png").unlink()
    report = run_parts(llm, job, show_progress=False)
    assert (report.answered, report.failed) == (3, 1)
    assert rows_of(tmp_path / "out")[1] == [(1, "001.png", "invalid_media")]


def test_any_address_that_fsspec_opens(llm, tmp_path):
    memory = fsspec.filesystem("memory")
    lines = [completion_line(f"r{i}", f"p{i}") for i in range(60)]
    lines[4] = "no json"
    memory.pipe("/batch/in/requests.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    stop = Counted(llm.engine, 3)
    source, output = "memory://batch/in/requests.jsonl", "memory://batch/out"
    stopped = answer(llm, source, output, rows_per_part=40, run={"stop": stop})
    assert stopped.stopped
    assert 0 < stopped.answered < 59
    assert memory.ls("/batch/out/journal", detail=False)
    with pytest.raises(BatchError, match="of another job"):
        open_parts(
            "memory://batch/in/requests.jsonl", "memory://batch/out", model_config=llm.model_config, max_tokens=3
        )
    report = answer(llm, source, output)
    assert (report.answered, report.failed, report.resumed) == (59, 1, stopped.answered + stopped.failed)
    assert not memory.ls("/batch/out/journal", detail=False)
    memory.get("/batch/out", str(tmp_path / "out"), recursive=True)
    answers, failures = rows_of(tmp_path / "out")
    assert list(answers) == [f"r{i}" for i in range(60) if i != 4]
    assert failures == [(4, None, "invalid_json")]
    assert "manifest.json" in names_in(tmp_path / "out")


def test_images_of_a_remote_folder(llm, tmp_path):
    write_images(tmp_path / "pictures", 5)
    fsspec.filesystem("memory").put(str(tmp_path / "pictures"), "/remote/pictures", recursive=True)
    answer(llm, tmp_path / "pictures", tmp_path / "local", prompt="what?")
    answer(llm, "memory://remote/pictures", tmp_path / "remote", prompt="what?")
    assert rows_of(tmp_path / "remote")[0].keys() == rows_of(tmp_path / "local")[0].keys()
    assert len({prompt.text for prompt in llm.engine.seen}) == 5  # the same images


class Counted:
    """Set after some steps of an engine."""

    def __init__(self, engine, steps):
        self.engine, self.last = engine, engine.num_steps + steps

    def is_set(self):
        return self.engine.num_steps >= self.last


def test_stopped_it_finishes_what_runs_and_goes_on_later(llm, tmp_path):
    requests = write_requests(tmp_path / "requests.jsonl", [completion_line(f"r{i}", f"p{i}") for i in range(100)])
    report = answer(llm, requests, tmp_path / "out", rows_per_part=8, run={"stop": Counted(llm.engine, 12)})
    assert report.stopped
    assert not llm.engine.has_unfinished_requests()
    assert 8 < report.answered < 60
    assert len(llm.engine.seen) == report.answered  # whatever ran has its answer
    assert not (tmp_path / "out" / "manifest.json").exists()
    again = answer(llm, requests, tmp_path / "out")
    assert (again.answered, again.resumed, again.stopped) == (100, report.answered, False)
    assert len(llm.engine.seen) == 100
    assert list(rows_of(tmp_path / "out")[0]) == [f"r{i}" for i in range(100)]


def test_workers_share_the_parts(llm, tmp_path):
    requests = write_requests(tmp_path / "requests.jsonl", [completion_line(f"r{i}", f"p{i}") for i in range(50)])
    reports = []
    for worker in range(3):
        reports.append(answer(llm, requests, tmp_path / "out", rows_per_part=8, indices=range(worker, 7, 3)))
        assert (tmp_path / "out" / "manifest.json").exists() == (worker == 2)
    assert [(report.parts, report.rows, report.answered) for report in reports] == [
        (3, 18, 18), (2, 16, 16), (2, 16, 16),
    ]  # fmt: skip
    assert list(rows_of(tmp_path / "out")[0]) == [f"r{i}" for i in range(50)]
    with pytest.raises(BatchError, match="parts 0 to 6"):
        answer(llm, requests, tmp_path / "out", indices=[7])


def test_a_part_that_another_run_has_is_left_to_it(llm, tmp_path):
    requests = write_requests(tmp_path / "requests.jsonl", [completion_line(f"r{i}", f"p{i}") for i in range(9)])
    job = open_parts(requests, tmp_path / "out", model_config=llm.model_config, rows_per_part=3)
    work = job.take(list(job.units())[1])
    report = run_parts(llm, job, show_progress=False)
    assert (report.answered, report.held) == (6, 1)
    assert not job.finish()
    job.keep(work)
    report = run_parts(llm, job, show_progress=False)
    assert (report.answered, report.resumed, report.held) == (9, 6, 0)
    assert job.finish()


class PreparesTogether(FakeLLM):
    """Prompts are ready once so many were asked for, and none before."""

    def __init__(self, directory, *, rows, **options):
        super().__init__(directory, **options)
        self.rows, self.asked = rows, []

    def prepare_later(self, make_prompt):
        self.asked.append((Future(), make_prompt))
        if len(self.asked) == self.rows:
            for future, make in self.asked:
                future.set_result(self.engine.prepare(make()))
        return self.asked[-1][0]


def test_windows_go_by_shape_and_keep_images_together(tmp_path):
    llm = PreparesTogether(tmp_path / "model", rows=32, max_num_seqs=8)  # a window of four rounds
    llm.engine.seen = []
    write_images(tmp_path / "pictures", 6)
    images = sorted((tmp_path / "pictures").rglob("*.png"))
    lines = []
    for index in range(32):
        content = [
            {"type": "image_url", "image_url": {"url": images[index * 5 % 6].as_uri()}},
            {"type": "text", "text": "x" * (1 + index % 3)},
        ]
        line = chat_line(f"r{index}")
        line["body"]["messages"] = [{"role": "user", "content": content}]
        lines.append(line)
    requests = write_requests(tmp_path / "requests.jsonl", lines)
    answer(llm, requests, tmp_path / "out")

    def changes(of):
        values = [of(prompt.media[0]) for prompt in llm.engine.seen]
        assert len(values) == 32
        return sum(one != other for one, other in itertools.pairwise(values)), len(set(values))

    for found, kinds in (
        changes(lambda item: item.mm_kwargs["pixel_values"].shape),
        changes(lambda item: item.content_hash),
    ):
        assert found == kinds - 1 > 0


def test_rows_that_share_an_image_open_it_once(llm, tmp_path, monkeypatch):
    write_images(tmp_path / "pictures", 3)
    fsspec.filesystem("memory").pipe("/shared/a.png", (tmp_path / "pictures" / "000.png").read_bytes())
    shared = SharedImages(llm.model_config)
    path = tmp_path / "pictures" / "000.png"
    data = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    for _ in range(3):
        for part in (
            {"type": "image_url", "image_url": {"url": path.as_uri()}},
            {"type": "image_url", "image_url": data},
            {"type": "image", "image": path},
            {"type": "image", "image": path.read_bytes()},
            {"type": "image", "image": RemoteFile("memory://shared/a.png")},
        ):
            ((opened,),) = ([m["content"]] for m in shared.in_messages([{"role": "user", "content": [part]}]))
            assert opened[0]["image"].getpixel((0, 0)) == (0, 7, 9)
    assert shared.num_decoded == 4  # a path and its address are one
    Image.new("RGB", (3, 1), (1, 1, 1)).save(path)
    assert shared.open(path).size == (3, 1)
    with pytest.raises(MediaError, match="can't fetch"):
        shared.open(RemoteFile("memory://shared/none.png"))
    with pytest.raises(MediaError, match="is not a file"):
        shared.open(tmp_path / "none.png")
    # What can't be understood is left for who renders it.
    for odd in ("text", {"role": "user", "content": "text"}, {"content": [{"type": "image_url", "image_url": 3}]}):
        assert shared.in_messages([odd]) == [odd]


def test_shared_images_have_a_limit_in_bytes_and_serve_threads(llm, tmp_path):
    shared = SharedImages(llm.model_config, capacity=10 * 3 * 5)  # five images of ten pixels
    contents = []
    for index in range(8):
        content = io.BytesIO()
        Image.new("RGB", (10, 1), (index, 0, 0)).save(content, "PNG")
        contents.append(content.getvalue())
    threads = [threading.Thread(target=lambda: [shared.open(content) for content in contents[:5]]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shared.num_decoded == 5
    shared.open(contents[5])
    shared.open(contents[4])
    assert shared.num_decoded == 6
    shared.open(contents[0])
    assert shared.num_decoded == 7


def test_too_many_failures_stop_the_run(llm, tmp_path):
    lines = [completion_line(f"r{i}", "broken image" if i % 2 else f"p{i}") for i in range(60)]
    requests = write_requests(tmp_path / "requests.jsonl", lines)
    with pytest.raises(BatchError, match=r"more than max_failures 5 allows \(.*row \d+, the image can't be"):
        answer(llm, requests, tmp_path / "out", rows_per_part=10, run={"max_failures": 5})
    assert not llm.engine.has_unfinished_requests()
    with pytest.raises(BatchError, match="max_failures 5"):  # those that were written count
        answer(llm, requests, tmp_path / "out", run={"max_failures": 5})
    report = answer(llm, requests, tmp_path / "out", run={"max_failures": 30})
    assert (report.answered, report.failed) == (30, 30)
    assert report.resumed > 5


def test_memory_does_not_grow_with_the_input(tmp_path, monkeypatch):
    # The engine here is faster than a disk that is asked to keep what it has answered.
    monkeypatch.setattr("aphrodite_jax.batch.output.SYNC_SECONDS", 3600)
    llm = FakeLLM(tmp_path / "model")
    peaks = []
    for count in (400, 2000):
        lines = [completion_line(f"r{i}", f"p{i}" + "x" * 2000) for i in range(count)]
        requests = write_requests(tmp_path / f"{count}.jsonl", lines)
        del lines
        tracemalloc.start()
        answer(llm, requests, tmp_path / f"{count}.out", rows_per_part=64)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 300_000  # 1,600 more lines are 3.5 MB of input


def test_progress_and_an_engine_that_is_busy(llm, tmp_path, capsys):
    requests = write_requests(tmp_path / "requests.jsonl", [completion_line("a"), "no json"])
    job = open_parts(requests, tmp_path / "out", model_config=llm.model_config)
    run_parts(llm, job)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2/2" in captured.err
    assert "tokens/s, 1 failed" in captured.err
    llm.engine.waiting.append(("other", "p", None))
    with pytest.raises(BatchError, match="other requests"):
        run_parts(llm, job)


def test_an_empty_input_is_complete(llm, tmp_path):
    report = answer(llm, write_requests(tmp_path / "requests.jsonl", [""]), tmp_path / "out")
    assert (report.rows, report.parts) == (0, 0)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["rows"] == 0


def options(**given):
    return RowOptions(defaults=Defaults(model_names=("m",), context_length=9), **given)


@pytest.mark.parametrize(
    ("names", "form"),
    [
        (["a.jsonl", "b.txt"], "jsonl"),
        (["a.png", "b.txt"], "folder"),
        (["deep/a.JPG"], "folder"),
        (["notes.txt", "a.jsonl", "a.png"], "jsonl and folder"),
        (["notes.txt"], "no file of a known form"),
    ],
)
def test_the_form_of_a_folder(tmp_path, names, form):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    given = options() if form == "jsonl" else options(prompt="p")
    if form in FORMS:
        assert open_source(tmp_path, given).form == form
    else:
        with pytest.raises(BatchError, match=form):
            open_source(tmp_path, given)


@pytest.mark.parametrize(
    ("path", "given", "form", "words"),
    [
        ("none", {}, None, "there is no input"),
        ("none.jsonl", {}, None, "there is no input"),
        ("file.txt", {}, None, "give --format"),
        ("file.txt", {"prompt": "p"}, "folder", "is no folder"),
        ("folder", {}, "folder", "need a prompt"),
        ("folder", {"prompt": "p", "columns": {"image": "i"}}, "folder", "no columns"),
        ("file.txt", {"prompt": "p"}, "jsonl", "whole requests: prompt"),
        ("file.txt", {}, "csv", "'csv' is not known"),
        ("nowhere://file.jsonl", {}, None, "can't read the input"),
    ],
)
def test_an_input_that_can_not_be_read(tmp_path, path, given, form, words):
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BatchError, match=words):
        open_source(path if "://" in path else tmp_path / path, options(**given), form)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"columns": {"picture": "x"}}, "'picture'"),
        ({"sampling": {"n": 2}}, "one answer"),
        ({"sampling": {"temprature": 2}}, "temprature"),
        ({"sampling": {"temperature": -1}}, "temperature must be at least 0"),
    ],
)
def test_options_that_are_wrong(given, words):
    with pytest.raises(BatchError, match=words):
        options(**given)


def test_rows_have_seeds_of_their_own(llm, tmp_path):
    params = [options(sampling={"temperature": 1.0}).sampling_params(name) for name in ("a", "b", "a")]
    assert params[0] == params[2] != params[1]
    assert (params[0].temperature, params[0].max_tokens) == (1.0, 256)
    assert options().sampling_params("a").temperature == 0.0


def test_answers_that_are_no_numbers_are_their_rows_failures(llm, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_fakes, "Logprob", lambda **fields: Logprob(**{**fields, "logprob": float("nan")}))
    lines = [chat_line(f"r{i}", f"p{i}", **({"logprobs": True} if i in (3, 4) else {})) for i in range(8)]
    requests = write_requests(tmp_path / "requests.jsonl", lines)
    with pytest.raises(BatchError, match=r"max_failures 1 allows .*dtype='bfloat16' or 'float32'"):
        answer(llm, requests, tmp_path / "limited", run={"max_failures": 1})
    report = answer(llm, requests, tmp_path / "out")
    assert (report.answered, report.failed) == (6, 2)
    assert rows_of(tmp_path / "out")[1] == [(3, "r3", "invalid_output"), (4, "r4", "invalid_output")]


class Syncs:
    """Counts what the disk is asked to keep of journals; may refuse."""

    def __init__(self, monkeypatch, output, *, refuses=False):
        self.rows, fsync = [], os.fsync

        def counted(fd):
            fsync(fd)
            for path in (output / "journal").glob("*"):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    if refuses and path.stat().st_size:
                        raise OSError(5, "Input/output error")
                    self.rows.append((path.name, len(path.read_bytes().splitlines())))

        monkeypatch.setattr(os, "fsync", counted)


def test_the_disk_is_asked_to_keep_journals(llm, tmp_path, monkeypatch):
    """At a rhythm, not for each row, and at the end of a run that is stopped."""
    requests = write_requests(tmp_path / "requests.jsonl", [completion_line(f"r{i}", f"p{i}") for i in range(60)])
    syncs = Syncs(monkeypatch, tmp_path / "out")
    monkeypatch.setattr("aphrodite_jax.batch.output.SYNC_SECONDS", 1000.0)
    stopped = answer(llm, requests, tmp_path / "out", rows_per_part=40, run={"stop": Counted(llm.engine, 9)})
    assert stopped.stopped
    assert sum(dict(syncs.rows).values()) == stopped.answered > 0
    assert len(syncs.rows) == len(dict(syncs.rows))
    monkeypatch.setattr("aphrodite_jax.batch.output.SYNC_SECONDS", -1.0)
    monkeypatch.setattr(sys.modules["aphrodite_jax.batch.run_parts"], "WRITTEN_EVERY", 0.0)
    syncs.rows.clear()
    assert answer(llm, requests, tmp_path / "out").answered == 60
    assert len(syncs.rows) > 4


def test_a_disk_that_loses_a_journal_ends_the_run_and_no_row(llm, tmp_path, monkeypatch):
    monkeypatch.setattr("aphrodite_jax.batch.output.SYNC_SECONDS", -1.0)
    monkeypatch.setattr(sys.modules["aphrodite_jax.batch.run_parts"], "WRITTEN_EVERY", 0.0)
    requests = write_requests(tmp_path / "requests.jsonl", [completion_line(f"r{i}", f"p{i}") for i in range(60)])
    with monkeypatch.context() as patch:
        Syncs(patch, tmp_path / "out", refuses=True)
        with pytest.raises(BatchError, match="Input/output error"):
            answer(llm, requests, tmp_path / "out", rows_per_part=20)
    assert not (tmp_path / "out" / "done").exists()
    report = answer(llm, requests, tmp_path / "out")
    assert (report.answered, report.failed) == (60, 0)
    assert list(rows_of(tmp_path / "out")[0]) == [f"r{i}" for i in range(60)]


def test_a_file_system_without_locks_takes_a_job(llm, tmp_path, monkeypatch):
    def flock(fd, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    requests = write_requests(tmp_path / "requests.jsonl", [completion_line(f"r{i}", f"p{i}") for i in range(30)])
    stop = {"stop": Counted(llm.engine, 4)}
    stopped = answer(llm, requests, tmp_path / "out", rows_per_part=20, run=stop)
    report = answer(llm, requests, tmp_path / "out")
    assert (report.answered, report.resumed) == (30, stopped.answered)
    assert list(rows_of(tmp_path / "out")[0]) == [f"r{i}" for i in range(30)]
