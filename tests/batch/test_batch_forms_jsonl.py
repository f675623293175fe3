"""JSONL files: what a network does for a moment, and a file that changes, neither shape a job nor get an answer."""

import json

import pytest
from batch_fakes import FakeLLM, completion_line, read_answers, write_requests
from batch_forms_files import check_units, options, read

from aphrodite_jax.batch import open_parts, run_parts
from aphrodite_jax.batch.sources import files, jsonl, open_source
from aphrodite_jax.batch.sources.files import InputFile
from aphrodite_jax.errors import BatchError

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))


def lines(name, count, text="p"):
    return [completion_line(f"{name}{index}", f"{text}{index}") for index in range(count)]


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in "abc":
        write_requests(folder / f"{name}.jsonl", lines(name, 5))
    return folder


class Failing:
    """Opening or reading a file fails so many times, behind three lines if it is read."""

    def __init__(self, monkeypatch, error, times, *, opening, name="b.jsonl"):
        self.left = times
        read_lines_from, open_file = jsonl.read_lines_from, InputFile.open

        def failing_open(file):
            if opening and file.name == name and self.fails():
                raise error
            return open_file(file)

        def failing_lines(stream, *args):
            is_file = stream.name.endswith(name)
            for number, line in enumerate(read_lines_from(stream, *args)):
                if not opening and is_file and number == 3 and self.fails():
                    raise error
                yield line

        monkeypatch.setattr(InputFile, "open", failing_open)
        monkeypatch.setattr(jsonl, "read_lines_from", failing_lines)

    def fails(self):
        self.left -= 1
        return self.left >= 0


PASSING = [TimeoutError("timed out"), ConnectionResetError(104, "reset"), OSError(5, "Input/output error")]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("opening", [False, True])
def test_what_fails_for_a_moment_is_read_again(shards, monkeypatch, error, opening):
    source = open_source(shards, options())
    identity, units = source.identity(), list(source.units(2))
    failing = Failing(monkeypatch, error, 2, opening=opening)
    assert source.identity() == identity
    failing.left = 2
    assert list(source.units(2)) == units
    assert failing.left < 0
    check_units(units, 2, 15)


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("opening", [False, True])
def test_what_fails_longer_makes_no_job(shards, tmp_path, monkeypatch, error, opening):
    config = FakeLLM(tmp_path / "model").model_config
    with monkeypatch.context() as patch:
        failing = Failing(patch, error, 3, opening=opening)
        with pytest.raises(BatchError, match=r"can't read 'b\.jsonl' of the input .*; give the same command again"):
            open_parts(shards, tmp_path / "out", model_config=config)
        assert failing.left == 0
    assert open_parts(shards, tmp_path / "out", model_config=config).num_rows == 15


@pytest.mark.parametrize("opening", [False, True])
def test_a_file_that_is_not_to_be_had_is_one_failure(shards, monkeypatch, opening):
    source = open_source(shards, options())
    failing = Failing(monkeypatch, PermissionError(13, "Permission denied"), 2, opening=opening)
    source.identity()
    units = list(source.units(2))
    assert failing.left == (0 if opening else 1)  # it was not tried again
    (error,) = [unit.error for unit in units if unit.error]
    assert error.startswith(f"b.jsonl: can't be read from byte {0 if opening else units[3].where['end']} on: Perm")
    check_units(units, 2, 10 if opening else 12)


def test_one_file_that_is_not_to_be_had_is_refused(shards, monkeypatch):
    source = open_source(shards / "b.jsonl", options())
    Failing(monkeypatch, PermissionError(13, "Permission denied"), 1, opening=True)
    with pytest.raises(BatchError, match=r"can't read the input .*Permission denied"):
        source.identity()


def test_no_answer_to_a_row_that_changed(tmp_path):
    """The change is at the unit's end, behind more rows than the engine is given at a time."""
    llm = FakeLLM(tmp_path / "model")
    requests = write_requests(tmp_path / "requests.jsonl", lines("r", 200))
    before = requests.read_bytes()
    job = open_parts(requests, tmp_path / "out", model_config=llm.model_config)
    requests.write_bytes(before.replace(b'"p5"', b'"q5"').replace(b'"p199"', b'"q199"'))
    with pytest.raises(BatchError, match="not as it was when the job was made"):
        run_parts(llm, job, show_progress=False)
    requests.write_bytes(before)
    report = run_parts(llm, job, show_progress=False)
    assert (report.answered, report.resumed) == (200, 0)


def test_no_answer_to_a_row_that_changes_while_it_is_read(tmp_path):
    requests = write_requests(tmp_path / "requests.jsonl", lines("r", 3000, "p" * 1000))
    source = open_source(requests, options())
    (unit,) = source.units(3000)
    rows = source.rows(unit)
    assert next(rows).number == 0
    requests.write_bytes(requests.read_bytes().replace(b"ppp2990", b"qqq2990"))
    with pytest.raises(BatchError, match="not as it was when the job was made"):
        assert all("q" not in row.request.source for row in rows)
    write_requests(requests, lines("r", 10, "p" * 1000))
    with pytest.raises(BatchError, match="not as it was when the job was made"):
        next(source.rows(unit))


def test_rows_are_those_that_units_were_made_of(tmp_path):
    """Blank lines, a byte-order mark and lines that are no JSON, from every unit's own place."""
    texts = ["\ufeff" + json.dumps(completion_line("a")), "", "no json", " ", *map(json.dumps, lines("r", 4))]
    requests = write_requests(tmp_path / "requests.jsonl", texts)
    source = open_source(requests, options())
    units = list(source.units(2))
    check_units(units, 2, 6)
    rows = read(source, reversed(units))
    assert sorted((row.number, row.custom_id) for row in rows if row.custom_id) == [
        (0, "a"), (2, "r0"), (3, "r1"), (4, "r2"), (5, "r3"),
    ]  # fmt: skip


def test_half_of_a_surrogate_pair_is_kept(tmp_path):
    """JSON may have it, and so may the parts: they are JSON in ASCII."""
    llm, names = FakeLLM(tmp_path / "model"), ["\ud83d", "\udc80"]
    requests = write_requests(tmp_path / "requests.jsonl", [completion_line(name) for name in names])
    job = open_parts(requests, tmp_path / "out", model_config=llm.model_config)
    assert run_parts(llm, job, show_progress=False).answered == 2
    assert [line["custom_id"] for line in read_answers(tmp_path / "out" / "parts" / "part-000000.jsonl")] == names
