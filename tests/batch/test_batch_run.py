"""A whole job with an LLM that needs no model: what comes out, in which order, with how much in flight."""

import errno
import fcntl
import json
import os
import shutil
import tracemalloc

import batch_fakes
import pytest
from batch_fakes import FakeLLM, chat_line, completion_line, read_answers, write_requests

from aphrodite_jax.batch import BatchReport, answer_job, open_job, run_batch
from aphrodite_jax.batch.output import OutputHeld, open_output
from aphrodite_jax.batch.run import GROUP_ROUNDS
from aphrodite_jax.errors import BatchError
from aphrodite_jax.outputs import Logprob


@pytest.fixture
def llm(tmp_path):
    return FakeLLM(tmp_path / "model")


def run(llm, tmp_path, lines, **options):
    requests = write_requests(tmp_path / "requests.jsonl", lines)
    return run_batch(llm, requests, tmp_path / "answers.jsonl", show_progress=False, **options)


def test_answers_have_the_format_of_the_api(llm, tmp_path):
    report = run(llm, tmp_path, [completion_line("one", "p", n=2), chat_line("two", "q", max_tokens=7)])
    assert report == BatchReport(num_lines=2, num_answered=2, num_failed=0, num_resumed=0)
    one, two = read_answers(tmp_path / "answers.jsonl")
    assert one["error"] is None
    assert (one["id"], one["custom_id"]) == ("batch_req_000000001", "one")
    assert one["response"]["status_code"] == 200
    body = one["response"]["body"]
    assert (body["object"], body["model"]) == ("text_completion", "model")
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][0].keys() == {"index", "text", "logprobs", "finish_reason"}
    body = two["response"]["body"]
    assert body["object"] == "chat.completion"
    choice = body["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].endswith("é")
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)


def test_logprobs_have_the_format_of_the_api(llm, tmp_path):
    run(llm, tmp_path, [chat_line("a", logprobs=True, top_logprobs=1), chat_line("b", logprobs=True)])
    (first, second), (alone, _) = (
        line["response"]["body"]["choices"][0]["logprobs"]["content"]
        for line in read_answers(tmp_path / "answers.jsonl")
    )
    best = {"token": "b", "logprob": -0.25, "bytes": [98]}
    assert first == {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": [best]}
    assert second == {"token": "\ufffd", "logprob": -9999.0, "bytes": None, "top_logprobs": []}
    assert alone["top_logprobs"] == []


def test_answers_stand_in_the_order_of_the_input(llm, tmp_path):
    run(llm, tmp_path, [completion_line(f"r{i}", f"p{i}") for i in range(100)])
    answers = read_answers(tmp_path / "answers.jsonl")
    assert [line["custom_id"] for line in answers] == [f"r{i}" for i in range(100)]
    assert len({line["response"]["body"]["choices"][0]["text"] for line in answers}) == 100


def test_answers_do_not_depend_on_where_a_run_began(tmp_path):
    size = 4 * GROUP_ROUNDS
    requests = write_requests(tmp_path / "requests.jsonl", [chat_line(f"r{i}", f"p{i}") for i in range(3 * size)])

    def run(name):
        run_batch(
            FakeLLM(tmp_path / "model"), requests, tmp_path / name, served_model_names=("m",), show_progress=False
        )
        return (tmp_path / name).read_bytes()

    whole = run("whole")
    for count in (1, size - 1, size, size + 1, 3 * size - 1):
        shutil.copy(tmp_path / "whole.job.json", tmp_path / f"{count}.job.json")
        lines = whole.splitlines(keepends=True)[:count]
        (tmp_path / f"{count}").write_bytes(b"".join(lines))
        assert run(f"{count}") == whole


def test_requests_are_refilled_as_others_finish(llm, tmp_path):
    lines = [completion_line(f"r{i}", f"p{i}") for i in range(16 * GROUP_ROUNDS)]
    run(llm, tmp_path, lines)
    assert llm.engine.most_at_once == 8
    # Requests of 5 steps on average in 4 places: one set of 4 after the other would take over 7 steps each.
    assert llm.engine.num_steps < 6 * len(lines) / 4


def test_a_bad_line_gets_its_own_error_and_leaves_the_others_alone(llm, tmp_path):
    lines = [
        completion_line("good"),
        "not json",
        "",
        {"method": "POST", "url": "/v1/completions", "body": {"prompt": "no id"}},
        completion_line("good"),
        {**completion_line("url"), "url": "/v1/nothing"},
        completion_line("image", "broken image"),
        completion_line("late", "too long"),
        completion_line("bug", "bug"),
        completion_line("option", frequency=1),
        completion_line("last"),
        "[1, 2",
    ]
    report = run(llm, tmp_path, lines)
    assert report == BatchReport(num_lines=11, num_answered=2, num_failed=9, num_resumed=0)
    answers = read_answers(tmp_path / "answers.jsonl")
    found = [
        (
            line["id"][-2:],
            line["custom_id"],
            line["error"] and line["error"]["code"],
            line["response"]["status_code"],
        )
        for line in answers
    ]
    assert found == [
        ("01", "good", None, 200),
        ("02", None, "invalid_json", 400),
        ("04", None, "missing_custom_id", 400),
        ("05", "good", "duplicate_custom_id", 400),
        ("06", "url", "invalid_url", 404),
        ("07", "image", "invalid_media", 400),
        ("08", "late", "context_length_exceeded", 400),
        ("09", "bug", "internal_error", 500),
        ("10", "option", "unknown_option", 400),
        ("11", "last", None, 200),
        ("12", None, "invalid_json", 400),
    ]
    broken = answers[5]["response"]["body"]["error"]
    assert broken["message"] == "the image can't be opened: <object object>"  # no address, which would differ
    assert broken["type"] == "invalid_request_error"
    assert answers[7]["response"]["body"]["error"]["type"] == "server_error"


def test_an_empty_input_has_an_empty_output(llm, tmp_path):
    assert run(llm, tmp_path, ["", " "]).num_lines == 0
    assert (tmp_path / "answers.jsonl").read_bytes() == b""


def test_strange_ids_and_texts_survive(llm, tmp_path):
    names = ["\ud800", "\u2028", "日本", 'a"b', "x" * 10_000, "NaN"]
    run(llm, tmp_path, [json.dumps(completion_line(name)) for name in names])
    assert [line["custom_id"] for line in read_answers(tmp_path / "answers.jsonl")] == names


def test_an_input_that_changes_under_the_run_is_noticed(llm, tmp_path):
    requests = write_requests(tmp_path / "requests.jsonl", [completion_line(f"r{i}") for i in range(9)])
    with open_job(requests, tmp_path / "answers.jsonl", model_config=llm.model_config) as job:
        write_requests(requests, [completion_line("r0")])
        with pytest.raises(BatchError, match="changed while it was read"):
            answer_job(llm, job, show_progress=False)


def test_what_is_unfinished_is_aborted(llm, tmp_path, monkeypatch):
    step = llm.engine.step

    def interrupted(max_decode_steps):
        if llm.engine.num_steps == 3:
            raise KeyboardInterrupt
        return step(max_decode_steps)

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(llm, tmp_path, [completion_line(f"r{i}", f"p{i}") for i in range(50)])
    assert not llm.engine.has_unfinished_requests()


def test_an_engine_that_loses_requests_is_noticed(llm, tmp_path, monkeypatch):
    monkeypatch.setattr(llm.engine, "has_unfinished_requests", lambda: False)
    with pytest.raises(RuntimeError, match="lost batch-1"):
        run(llm, tmp_path, [completion_line("a")])


def test_memory_does_not_grow_with_the_input(llm, tmp_path):
    peaks = []
    for count in (200, 2000):
        lines = [completion_line(f"r{i}", f"p{i}" + "x" * 2000) for i in range(count)]
        requests = write_requests(tmp_path / f"{count}.jsonl", lines)
        del lines
        tracemalloc.start()
        run_batch(llm, requests, tmp_path / f"{count}.out", show_progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000  # 1,800 more lines are 4 MB of input and 0.6 MB of output


def test_the_engine_must_be_free(llm, tmp_path):
    llm.engine.waiting.append(("other", "p", None))
    with pytest.raises(BatchError, match="other requests"):
        run(llm, tmp_path, [completion_line("a")])


def test_progress_goes_to_stderr(llm, tmp_path, capsys):
    requests = write_requests(tmp_path / "requests.jsonl", [completion_line("a")])
    run_batch(llm, requests, tmp_path / "answers.jsonl")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1/1" in captured.err


def test_an_answer_that_is_no_number_is_its_lines_error(llm, tmp_path, monkeypatch):
    """A model that overflows gives NaN, which has no form in JSON."""
    for value in (float("nan"), float("inf")):
        monkeypatch.setattr(
            batch_fakes, "Logprob", lambda value=value, **fields: Logprob(**{**fields, "logprob": value})
        )
        answers = tmp_path / f"{value}.jsonl"
        requests = write_requests(tmp_path / "requests.jsonl", [chat_line("a"), chat_line("b", logprobs=True)])
        report = run_batch(llm, requests, answers, show_progress=False)
        assert (report.num_answered, report.num_failed) == (1, 1)
        error = read_answers(answers)[1]["error"]
        assert error["code"] == "invalid_output"
        assert "'bfloat16' or 'float32'" in error["message"]


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks(llm, tmp_path, monkeypatch, code):
    """The output is written all the same, and whoever finds that another run writes it stops."""

    def flock(fd, how):
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert run(llm, tmp_path, [completion_line(f"r{i}") for i in range(9)]).num_answered == 9
    path = str(tmp_path / "file")
    with open_output(path) as one, open_output(path) as other:
        one.append(b"first\n")
        one.append(b"second\n")
        with pytest.raises(OutputHeld, match="another run is writing"):
            other.append(b"other\n")
        one.append(b"third\n")
    assert (tmp_path / "file").read_bytes() == b"first\nsecond\nthird\n"


def test_locks_that_the_system_refuses(tmp_path, monkeypatch):
    def flock(fd, how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(BatchError, match="Input/output error"), open_output(str(tmp_path / "file")):
        pass


def test_a_disk_that_lost_lines_is_given_no_more(tmp_path, monkeypatch):
    with open_output(str(tmp_path / "file")) as output:
        output.append(b"kept\n")
        output.sync()
        output.append(b"lost\n")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
            with pytest.raises(BatchError, match="Input/output error"):
                output.sync()
        with pytest.raises(BatchError, match="has lost lines"):
            output.append(b"more\n")
    assert (tmp_path / "file").read_bytes() == b"kept\n"


def test_lines_before_a_refused_write_are_still_to_be_synced(tmp_path, monkeypatch):
    synced = []
    with open_output(str(tmp_path / "file")) as output:
        output.append(b"one\n")
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(BatchError, match="No space left"):
                output.append(b"two\n")
        monkeypatch.setattr("aphrodite_jax.batch.output.SYNC_SECONDS", -1.0)
        monkeypatch.setattr(os, "fsync", synced.append)
        output.sync_if_due()
        assert len(synced) == 1
