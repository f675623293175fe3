"""Whole jobs over tables and tars, with an LLM that needs no model: each row ends as an answer or as a failure."""

import io
import itertools
import json
import shutil
import tarfile

import fsspec
import pytest
from batch_fakes import FakeLLM, read_answers
from batch_forms_files import picture

from aphrodite_jax.batch import open_parts, run_parts
from aphrodite_jax.errors import BatchError

pa = pytest.importorskip("pyarrow", reason="tables are read by pyarrow, which is not installed")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.once

NUM_ROWS = 24
NO_IMAGE, BROKEN, NO_PROMPT = 3, 9, 17


def cells():
    for number in range(NUM_ROWS):
        image = {NO_IMAGE: None, BROKEN: picture(number)[:30]}.get(number, picture(number % 5))
        yield f"row{number}", image, None if number == NO_PROMPT else f"what is {number}?"


def write_parquet(folder):
    """Two files, and one between them that can't be read."""
    names, images, questions = zip(*cells(), strict=True)
    images = [{"bytes": image, "path": None} for image in images]
    table = pa.table({"id": names, "image": images, "question": questions})
    for name, first, count in (("a.parquet", 0, 11), ("c.parquet", 11, 13)):
        pq.write_table(table.slice(first, count), folder / name, row_group_size=4)
    (folder / "b.parquet").write_bytes(b"no table")
    return folder


def write_dataset(folder):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.disable_progress_bars()
    names, images, questions = zip(*cells(), strict=True)
    features = datasets.Features(
        {"id": datasets.Value("string"), "image": datasets.Image(), "question": datasets.Value("string")}
    )
    columns = {"id": names, "image": [image and {"bytes": image, "path": None} for image in images]}
    datasets.Dataset.from_dict({**columns, "question": questions}, features).save_to_disk(folder, num_shards=3)
    return folder


def write_tars(folder):
    """Two tars; the first is cut off behind its samples."""
    for name, rows in itertools.groupby(cells(), lambda row: "a.tar" if int(row[0][3:]) < 11 else "b.tar"):
        with tarfile.open(folder / name, "w") as tar:
            for key, image, question in rows:
                members = {"json": json.dumps({"question": question}).encode(), **({"png": image} if image else {})}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            if name == "a.tar":
                info = tarfile.TarInfo("cut.png")
                info.size = 5000
                tar.addfile(info, io.BytesIO(bytes(5000)))
                cut = tar.offset - 1024
    with open(folder / "a.tar", "r+b") as file:
        file.truncate(cut)
    return folder


def parquet_records(parts):
    return [record for part in parts for record in pq.read_table(io.BytesIO(part)).to_pylist()]


def tar_records(parts):
    records = []
    for part in parts:
        with tarfile.open(fileobj=io.BytesIO(part)) as tar:
            for member in tar:
                records.append(json.loads(tar.extractfile(member).read()))
                assert member.name == f"{records[-1]['id']}.json"
    return records


FORMS = {
    "parquet": (write_parquet, parquet_records, 1),
    "datasets": (write_dataset, parquet_records, 0),
    "webdataset": (write_tars, tar_records, 1),
}
"""Form to how an input is written, how parts are read, and how many shards can't be read."""


def run(llm, source, output, indices=None):
    job = open_parts(source, output, model_config=llm.model_config, rows_per_part=5)
    report = run_parts(llm, job, indices, show_progress=False)
    return job, report


@pytest.fixture
def llm(tmp_path):
    return FakeLLM(tmp_path / "model")


@pytest.mark.parametrize("form", FORMS)
def test_every_row_is_answered_or_fails(form, llm, tmp_path):
    """Over several runs, of which each does some parts, and the same as in one run of the input elsewhere."""
    write, records_of, num_unreadable = FORMS[form]
    (tmp_path / "in").mkdir()
    source, output = write(tmp_path / "in"), tmp_path / "out"
    run(llm, source, output, indices=[0, 2])
    job, report = run(llm, source, output)
    assert job.finish()
    assert (report.answered, report.failed) == (NUM_ROWS - 3, 3 + num_unreadable)
    assert report.resumed

    records = records_of([path.read_bytes() for path in sorted((output / "parts").iterdir())])
    answered = [number for number in range(NUM_ROWS) if number not in (NO_IMAGE, BROKEN, NO_PROMPT)]
    assert [(record["row"], record["id"]) for record in records] == [(number, f"row{number}") for number in answered]
    assert all(record["text"] and record["finish_reason"] == "stop" for record in records)
    errors = [error for path in sorted((output / "errors").iterdir()) for error in read_answers(path)]
    failed = [(error["row"], error["custom_id"], error["code"]) for error in errors if error["row"] is not None]
    assert failed == [
        (NO_IMAGE, f"row{NO_IMAGE}", "missing_image"),
        (BROKEN, f"row{BROKEN}", "invalid_media"),
        (NO_PROMPT, f"row{NO_PROMPT}", "missing_prompt"),
    ]
    unreadable = [error["code"] for error in errors if error["row"] is None]
    assert unreadable == ["unreadable_shard"] * num_unreadable

    memory, root = fsspec.filesystem("memory"), f"/{tmp_path.name}"
    memory.put(str(source), f"{root}/in", recursive=True)
    job, report = run(llm, f"memory://{root}/in", f"memory://{root}/out")
    assert job.finish()
    parts = memory.cat(sorted(memory.ls(f"{root}/out/parts", detail=False)))
    assert [record["row"] for record in records_of(parts.values())] == answered
    memory.rm(root, recursive=True)


def test_an_input_that_changed_is_refused(llm, tmp_path):
    (tmp_path / "in").mkdir()
    source = write_parquet(tmp_path / "in")
    run(llm, source, tmp_path / "out", indices=[0])
    shutil.copy(source / "a.parquet", source / "d.parquet")
    with pytest.raises(BatchError, match="input"):
        open_parts(source, tmp_path / "out", model_config=llm.model_config, rows_per_part=5)


def test_images_that_rows_name_are_fetched_beside_the_table(llm, tmp_path):
    memory, root = fsspec.filesystem("memory"), f"/{tmp_path.name}"
    memory.pipe(f"{root}/pictures/a.png", picture(1))
    table = pa.table({"image": ["pictures/a.png", "pictures/none.png"], "question": ["what?", "what?"]})
    with memory.open(f"{root}/a.parquet", "wb") as file:
        pq.write_table(table, file)
    _, report = run(llm, f"memory://{root}/a.parquet", tmp_path / "out")
    assert (report.answered, report.failed) == (1, 1)
    (error,) = read_answers(tmp_path / "out" / "errors" / "part-000000.jsonl")
    assert (error["row"], error["code"]) == (1, "invalid_media")
    memory.rm(root, recursive=True)
