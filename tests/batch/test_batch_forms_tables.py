"""Parquet files and folders of ``datasets``: every row is read once, wherever units, files and row groups end."""

import functools
import io
import json
import random
import sys

import fsspec
import pytest
from batch_forms_files import asked, check_units, options, picture, read, record
from hypothesis import given, settings
from hypothesis import strategies as st

from aphrodite_jax.batch.answers import json_line
from aphrodite_jax.batch.refusal import Refusal
from aphrodite_jax.batch.sources import RemoteFile, Unit, files, open_source
from aphrodite_jax.errors import BatchError

pa = pytest.importorskip("pyarrow", reason="tables are read by pyarrow, which is not installed")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.once
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(path, columns, *, group=2**20, schema=None):
    with fsspec.open(str(path), "wb", auto_mkdir=True) as file:
        pq.write_table(pa.table(columns, schema=schema), file, row_group_size=group)
    return str(path)


def numbered(start, count):
    """Rows whose image and question tell their number."""
    numbers = range(start, start + count)
    questions = pa.array([f"what is {n}?" for n in numbers], pa.string())
    return {"image": pa.array([b"%d" % n for n in numbers], pa.binary()), "question": questions}


def check_numbered(rows, count):
    assert [row.number for row in rows] == list(range(count))
    assert [asked(row) for row in rows] == [([b"%d" % n], f"what is {n}?") for n in range(count)]


def where(unit):
    """A unit as it is after it was written down."""
    return Unit(
        index=unit.index,
        first_row=unit.first_row,
        num_rows=unit.num_rows,
        where=json.loads(json.dumps(unit.where)),
        error=unit.error,
    )


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    group=st.integers(3, 30),
    rows_per_unit=st.integers(2, 50),
    seed=st.integers(0, 2**32),
)
def test_rows_of_any_units_files_and_row_groups(tmp_path_factory, sizes, group, rows_per_unit, seed):
    """In order, in any order, and by several sources that share the units out."""
    folder = tmp_path_factory.mktemp("parquet")
    for index, size in enumerate(sizes):
        write_parquet(folder / f"{index}.parquet", numbered(sum(sizes[:index]), size), group=group)
    source = open_source(folder, options())
    units = [where(unit) for unit in source.units(rows_per_unit)]
    check_units(units, rows_per_unit, sum(sizes))
    assert all(unit.num_rows == rows_per_unit for unit in units[:-1])
    check_numbered(read(source, units), sum(sizes))
    shuffled = random.Random(seed).sample(units, len(units))
    check_numbered(sorted(read(source, shuffled), key=lambda row: row.number), sum(sizes))
    shared = [row for worker in range(2) for row in read(open_source(folder, options()), units[worker::2])]
    check_numbered(sorted(shared, key=lambda row: row.number), sum(sizes))


def test_units_may_be_read_at_the_same_time(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", numbered(0, 60))
    source = open_source(path, options())
    first, second, third = source.units(20)
    pairs = list(zip(source.rows(first), source.rows(second), strict=True))
    check_numbered([a for a, _ in pairs] + [b for _, b in pairs] + list(source.rows(third)), 60)
    rows = source.rows(first)
    next(rows)
    rows.close()
    check_numbered(read(source, [first, second, third]), 60)


def test_row_groups_are_decoded_once(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", numbered(0, 200), group=100)
    source = open_source(path, options())
    units, begun = list(source.units(30)), []
    iter_batches = pq.ParquetFile.iter_batches

    def counted(*args, **kwargs):
        begun.append(args)
        return iter_batches(*args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    check_numbered(read(source, units), 200)
    assert len(begun) == 2  # row groups


def test_every_kind_of_image_cell(tmp_path):
    cases = {
        "bytes": (pa.array([b"x"], pa.large_binary()), [b"x"]),
        "string": (pa.array(["sub/a.png"]), [f"{tmp_path}/sub/a.png"]),
        "data": (pa.array(["data:image/png;base64,AA=="]), ["data:image/png;base64,AA=="]),
        "dictionary": (pa.array(["/x/a.png"]).dictionary_encode(), ["/x/a.png"]),
        "struct": (pa.array([{"bytes": b"x", "path": "a.png"}], IMAGE), [b"x"]),
        "path": (pa.array([{"bytes": None, "path": "a.png"}], IMAGE), [f"{tmp_path}/a.png"]),
        "list": (pa.array([[b"x", b"y"]]), [b"x", b"y"]),
        "structs": (pa.array([[{"bytes": b"x"}, {"path": "/a.png"}]], pa.list_(IMAGE)), [b"x", "/a.png"]),
    }
    for name, (column, images) in cases.items():
        path = write_parquet(tmp_path / f"{name}.parquet", {"image": column, "prompt": ["what?"]})
        source = open_source(path, options())
        (row,) = read(source, source.units(10))
        assert asked(row) == (images, "what?"), name


def test_a_bad_row_is_its_own_refusal(tmp_path):
    broken = picture(1)[:20]
    images = [b"a", None, {"bytes": None, "path": None}, b"b", broken]
    cells = [image if isinstance(image, dict) or image is None else {"bytes": image} for image in images]
    columns = {"image": pa.array(cells, IMAGE), "question": ["x", "x", "x", None, "x"]}
    source = open_source(write_parquet(tmp_path / "a.parquet", columns), options())
    rows = read(source, source.units(10))
    assert [asked(row) for row in rows] == [
        ([b"a"], "x"),
        "missing_image",
        "missing_image",
        "missing_prompt",
        ([broken], "x"),  # which is found when it is opened
    ]
    lists = {"images": pa.array([[], [b"a", None], [b"a"]]), "question": ["x", "x", "x"]}
    source = open_source(write_parquet(tmp_path / "b.parquet", lists), options())
    assert [asked(row) for row in read(source, source.units(10))] == ["missing_image", "missing_image", ([b"a"], "x")]


def test_prompts_ids_and_sampling(tmp_path):
    columns = {"id": [7, 8, None], "image": [b"a", b"b", b"c"], "caption": ["x", None, "z"], "text": ["p", "q", "r"]}
    path = write_parquet(tmp_path / "a.parquet", columns)

    def rows(**fields):
        source = open_source(path, options(**fields))
        return [(row.custom_id, asked(row)[1]) for row in read(source, source.units(10))]

    assert rows() == [("7", "p"), ("8", "q"), ("2", "r")]
    # A prompt that was given for all rows is asked of all, unless a column is named.
    assert rows(prompt="all") == [("7", "all"), ("8", "all"), ("2", "all")]
    named = {"prompt": "caption", "id": "text"}
    assert rows(prompt="all", columns=named) == [("p", "x"), ("q", "all"), ("r", "z")]
    source = open_source(path, options(system="be brief", sampling={"max_tokens": 5}))
    first, second, _ = read(source, source.units(10))
    assert first.request.source[0] == {"role": "system", "content": "be brief"}
    params = first.request.sampling_params
    assert (params.max_tokens, params.temperature) == (5, 0.0)
    assert params.seed != second.request.sampling_params.seed


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        (
            {"a": [b"x"], "b": [b"y"], "prompt": ["p"]},
            {},
            r"which column of .* is the image: name it .*; it has a \(binary",
        ),
        ({"a": [1], "prompt": ["p"]}, {}, "which column of .* is the image"),
        ({"image": [b"x"], "caption": ["p"]}, {}, "which column of .* is the prompt"),
        ({"image": [b"x"], "prompt": ["p"], "text": ["q"]}, {}, "which column of .* is the prompt"),
        ({"image": [b"x"], "prompt": ["p"]}, {"image": "picture"}, "has no column 'picture' for image; it has image"),
        ({"image": [b"x"], "prompt": ["p"], "n": [1]}, {"image": "n"}, "column 'n' can't be image, which is bytes"),
        ({"image": [b"x"], "prompt": ["p"], "n": [1]}, {"prompt": "n"}, "column 'n' can't be prompt, which is text"),
        ({"image": [b"x"], "prompt": ["p"], "n": [0.5]}, {"id": "n"}, "column 'n' can't be id"),
    ],
)
def test_columns_that_are_not_clear(tmp_path, columns, given, message):
    source = open_source(write_parquet(tmp_path / "a.parquet", columns), options(columns=given))
    with pytest.raises(BatchError, match=message):
        list(source.units(10))


def test_named_columns_settle_it(tmp_path):
    columns = {"a": [b"x"], "b": [b"y"], "prompt": ["p"], "text": ["q"]}
    source = open_source(
        write_parquet(tmp_path / "a.parquet", columns), options(columns={"image": "b", "prompt": "text"})
    )
    assert [asked(row) for row in read(source, source.units(10))] == [([b"y"], "q")]


def test_shards_that_cannot_be_read(tmp_path):
    """Each is one failure, where it stands; rows keep their order round it."""
    write_parquet(tmp_path / "a.parquet", numbered(0, 5))
    (tmp_path / "b.parquet").write_bytes(b"no table")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    (tmp_path / "d.parquet").write_bytes(b"")
    write_parquet(tmp_path / "e.parquet", {"image": [b"5"], "answer": ["x"]})
    write_parquet(tmp_path / "f.parquet", numbered(5, 5))
    source = open_source(tmp_path, options())
    units = [where(unit) for unit in source.units(4)]
    check_units(units, 4, 10)
    assert [unit.num_rows for unit in units] == [4, 1, 0, 0, 0, 0, 4, 1]
    assert [unit.error.split()[0:3] for unit in units if unit.error] == [
        ["the", "file", "'b.parquet'"],
        ["the", "file", "'c.parquet'"],
        ["the", "file", "'d.parquet'"],
        ["it", "is", "not"],
    ]
    check_numbered(read(source, units), 10)


def test_a_column_that_holds_nothing_in_one_file(tmp_path):
    """Writers give it no type; its rows have no prompt there, and a file without rows needs none."""
    write_parquet(tmp_path / "a.parquet", {"image": pa.array([]), "question": pa.array([])})
    write_parquet(tmp_path / "b.parquet", {"image": [b"x"], "question": ["y"]})
    write_parquet(tmp_path / "c.parquet", {"image": [b"x"], "question": [None]})
    source = open_source(tmp_path, options())
    assert [asked(row) for row in read(source, source.units(9))] == [([b"x"], "y"), "missing_prompt"]


def test_no_shard_can_be_read(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no table")
    with pytest.raises(BatchError, match=r"no shard of .* can be read; the first one: the file 'a.parquet'"):
        list(open_source(tmp_path / "a.parquet", options()).units(4))


def test_a_file_with_fewer_rows_than_before(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", numbered(0, 20))
    source = open_source(path, options())
    units = list(source.units(15))
    write_parquet(path, numbered(0, 17))
    rows = source.rows(units[1])
    assert [next(rows).number, next(rows).number] == [15, 16]
    with pytest.raises(BatchError, match="changed: it has 17 rows"):
        next(rows)


def test_a_damaged_row_group_ends_a_unit_with_an_error(tmp_path):
    """The footer can be read, so the rows are known; who runs the unit makes them failures."""
    path = tmp_path / "a.parquet"
    write_parquet(path, numbered(0, 40), group=10)
    data, group = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata.row_group(2)
    start = group.column(0).dictionary_page_offset or group.column(0).data_page_offset
    data[start : start + group.column(0).total_compressed_size] = bytes(group.column(0).total_compressed_size)
    path.write_bytes(data)
    source = open_source(path, options())
    units = list(source.units(20))
    check_numbered(read(source, units[:1]), 20)
    with pytest.raises(OSError, match=r"."):
        list(source.rows(units[1]))


def test_memory_is_flat(tmp_path):
    """A row group of 16 MB is decoded by its pages, which have 16 rows."""
    path, image = tmp_path / "a.parquet", random.Random(0).randbytes(2**16)
    table = pa.table({"image": [image] * 256, "prompt": ["x"] * 256})
    pq.write_table(table, path, use_dictionary=False, compression="none", write_batch_size=16)
    del table
    source, pool = open_source(path, options()), pa.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    for unit in source.units(50):
        for _ in source.rows(unit):
            most = max(most, pool.bytes_allocated() - before)
    assert 2**20 < most < 2**23


def not_utf8(texts, bad):
    """A column of strings of which some are in Latin-1, which Parquet files may hold."""
    data = pa.array([f"café {text}".encode("latin-1") if n in bad else text.encode() for n, text in enumerate(texts)])
    return pa.Array.from_buffers(pa.string(), len(data), data.buffers())


def test_a_cell_that_is_not_utf8_fails_its_row_alone(tmp_path):
    columns = {
        "image": [b"%d" % n for n in range(100)],
        "question": not_utf8([f"what is {n}?" for n in range(100)], {10, 40, 41}),
        "id": not_utf8([f"row{n}" for n in range(100)], {10, 70}),
    }
    source = open_source(write_parquet(tmp_path / "a.parquet", columns), options())
    rows = read(source, source.units(30))
    refused = {row.number: row for row in rows if isinstance(row.request, Refusal)}
    assert {n: (row.custom_id, row.request.code) for n, row in refused.items()} == {
        10: (None, "invalid_text"), 40: ("row40", "invalid_text"), 41: ("row41", "invalid_text"),
        70: (None, "invalid_text"),
    }  # fmt: skip
    assert str(refused[40].request).startswith("column 'question' is not UTF-8: 'utf-8' codec can't decode byte 0xe9")
    answered = [n for n in range(100) if n not in refused]
    assert [asked(rows[n]) for n in answered] == [([b"%d" % n], f"what is {n}?") for n in answered]


def test_a_table_that_fails_for_a_moment_is_looked_into_again(tmp_path, monkeypatch):
    source = open_source(write_parquet(tmp_path / "a.parquet", numbered(0, 5)), options())
    units = list(source.units(4))
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))
    open_table, fails = source.open_table, iter([True] * 2 + [False] + [True] * 3)

    def failing(name):
        if next(fails):
            raise TimeoutError("timed out")
        return open_table(name)

    monkeypatch.setattr(source, "open_table", failing)
    assert list(source.units(4)) == units
    with pytest.raises(BatchError, match=r"can't read 'a\.parquet' of the input .*TimeoutError"):
        list(source.units(4))


@pytest.mark.parametrize("form", ["local", "memory"])
def test_a_folder_of_images_beside_the_table(form, tmp_path):
    """Paths in rows start at the file, on its own filesystem."""
    root = str(tmp_path) if form == "local" else f"memory:///{tmp_path.name}"
    columns = {"image": ["pictures/a.png", "../b.png"], "prompt": ["p", "q"]}
    path = write_parquet(f"{root}/deep/a.parquet", columns)
    source = open_source(path, options())
    images = [asked(row)[0][0] for row in read(source, source.units(1))]
    if form == "local":
        assert images == [f"{root}/deep/pictures/a.png", f"{root}/deep/../b.png"]
    else:
        assert images == [RemoteFile(f"{root}/deep/pictures/a.png"), RemoteFile(f"{root}/b.png")]
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_parquet_elsewhere(tmp_path):
    root = f"memory://{tmp_path.name}"
    write_parquet(f"{root}/0.parquet", numbered(0, 50), group=20)
    write_parquet(f"{root}/1.parquet", numbered(50, 7))
    for path in (root, f"{root}/*.parquet", f"{root}/{{0,1}}.parquet"):
        source = open_source(path, options())
        units = [where(unit) for unit in source.units(13)]
        check_numbered(read(source, units), 57)
        assert units[3].where == {"rows": [["0.parquet", 39, 50], ["1.parquet", 0, 2]]}
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_what_pandas_writes(tmp_path):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame({"image": [picture(0), picture(1)], "question": ["a", "b"]}, index=[5, 9])
    frame["question"] = frame["question"].astype("category")
    frame.to_parquet(tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet", options())
    assert [asked(row) for row in read(source, source.units(10))] == [([picture(0)], "a"), ([picture(1)], "b")]


def written(records):
    """The bytes of a part."""
    file = io.BytesIO()
    source = object.__new__(_class())
    source.write_part(Unit(index=0, first_row=0, num_rows=len(records), where={}), map(json_line, records), file)
    return file.getvalue()


def _class():
    from aphrodite_jax.batch.sources.parquet import ParquetSource

    return ParquetSource


def test_parts_are_read_by_pyarrow_and_pandas():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    records = [record(number, text=f"é {number}") for number in range(2500)]
    records[3]["finish_reason"] = None
    data = written(records)
    assert pq.read_table(io.BytesIO(data)).to_pylist() == records
    frame = pandas.read_parquet(io.BytesIO(data))
    assert list(frame.columns) == list(records[0])
    assert frame["row"].dtype == "int64"
    assert frame["text"][2] == "é 2"
    assert written(records) == data


def test_an_empty_part_has_its_columns():
    table = pq.read_table(io.BytesIO(written([])))
    assert (table.num_rows, table.column_names) == (0, list(record(0)))


def test_a_part_of_other_records_is_refused():
    with pytest.raises(ValueError, match="a record has id, row, text"):
        written([{"id": "a", "row": 0}])


# Folders of Hugging Face datasets.


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.disable_progress_bars()
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield datasets
    patch.undo()


@functools.cache
def _pictures(count):
    return [picture(number) for number in range(count)]


def hf_dataset(hf, count):
    features = hf.Features({"image": hf.Image(), "question": hf.Value("string")})
    cells = [{"bytes": data, "path": None} for data in _pictures(count)]
    return hf.Dataset.from_dict({"image": cells, "question": [f"what is {n}?" for n in range(count)]}, features)


def check_pictures(rows, count):
    assert [row.number for row in rows] == list(range(count))
    assert [asked(row) for row in rows] == [([data], f"what is {n}?") for n, data in enumerate(_pictures(count))]


@pytest.mark.parametrize("rows_per_unit", [1, 7, 16, 100])
def test_a_saved_dataset(hf, tmp_path, rows_per_unit):
    hf_dataset(hf, 50).save_to_disk(tmp_path / "saved", num_shards=3)
    source = open_source(tmp_path / "saved", options())
    assert source.form == "datasets"
    units = [where(unit) for unit in source.units(rows_per_unit)]
    check_units(units, rows_per_unit, 50)
    check_pictures(read(source, units), 50)
    check_pictures(sorted(read(source, units[::-1]), key=lambda row: row.number), 50)


def test_a_saved_dataset_elsewhere(hf, tmp_path):
    url = f"memory://{tmp_path.name}/saved"
    hf.DatasetDict({"train": hf_dataset(hf, 20)}).save_to_disk(url)
    source = open_source(url, options())
    check_pictures(read(source, source.units(6)), 20)
    assert source.identity() == open_source(f"{url}/train", options()).identity()
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_shuffled_rows_come_in_the_order_of_the_dataset(hf, tmp_path):
    dataset = hf_dataset(hf, 20).shuffle(seed=1)
    dataset.save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved", options())
    assert [asked(row)[1] for row in read(source, source.units(6))] == dataset["question"][:]


def test_several_splits_are_to_be_chosen_from(hf, tmp_path):
    hf.DatasetDict({"train": hf_dataset(hf, 3), "test": hf_dataset(hf, 2)}).save_to_disk(tmp_path)
    with pytest.raises(BatchError, match="has the splits train, test; give the folder of one"):
        open_source(tmp_path, options())
    source = open_source(tmp_path / "test", options())
    check_pictures(read(source, source.units(6)), 2)


def test_a_damaged_saved_dataset(hf, tmp_path):
    """What can be read of it is rows; the rest is one failure for each file."""
    hf_dataset(hf, 40).save_to_disk(tmp_path, num_shards=4)
    files = sorted(tmp_path.glob("*.arrow"))
    files[1].write_bytes(files[1].read_bytes()[:-200])
    files[2].unlink()
    source = open_source(tmp_path, options())
    units = list(source.units(100))
    assert [unit.num_rows for unit in units] == [10, 0, 0, 10]
    assert "is damaged after 0 rows" in units[1].error
    assert "FileNotFoundError" in units[2].error
    assert [asked(row)[1] for row in read(source, units)] == [f"what is {n}?" for n in (*range(10), *range(30, 40))]
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(BatchError, match="can't read the dataset"):
        open_source(tmp_path, options())


def test_a_folder_that_load_dataset_makes_sense_of(hf, tmp_path):
    """Images beside a table of their questions, as its imagefolder has them."""
    lines = []
    for number, data in enumerate(_pictures(5)):
        (tmp_path / f"{number}.png").write_bytes(data)
        lines.append(json.dumps({"file_name": f"{number}.png", "question": f"what is {number}?"}) + "\n")
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    source = open_source(tmp_path, options(), "datasets")
    rows = read(source, source.units(2))
    assert [asked(row) for row in rows] == [([f"{tmp_path}/{n}.png"], f"what is {n}?") for n in range(5)]
    assert source.identity()["files"] == 6


def test_without_the_library_only_saved_datasets_are_read(hf, tmp_path, monkeypatch):
    hf_dataset(hf, 5).save_to_disk(tmp_path / "saved")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.csv").write_text("image,prompt\na.png,what?\n")
    monkeypatch.setitem(sys.modules, "datasets", None)
    source = open_source(tmp_path / "saved", options())
    check_pictures(read(source, source.units(6)), 5)
    with pytest.raises(BatchError, match="a folder that save_to_disk did not write needs datasets, which"):
        open_source(tmp_path / "plain", options(), "datasets")


def test_several_splits_of_a_folder(hf, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.csv").write_text("image,prompt\na.png,what?\n")
    with pytest.raises(BatchError, match="has the splits train, test; give the files of one alone"):
        open_source(tmp_path, options(), "datasets")
    source = open_source(tmp_path / "test", options(), "datasets")
    assert [asked(row) for row in read(source, source.units(2))] == [([f"{tmp_path}/test/a.png"], "what?")]


def test_a_folder_that_is_no_dataset(hf, tmp_path):
    with pytest.raises(BatchError, match="not a folder"):
        open_source(tmp_path / "none", options(), "datasets")
    (tmp_path / "a.xyz").write_text("?")
    with pytest.raises(BatchError, match=r"datasets\.load_dataset can't read"):
        open_source(tmp_path, options(), "datasets")


def test_parts_are_read_by_datasets(hf, tmp_path):
    (tmp_path / "part-000000.parquet").write_bytes(written([record(0), record(1)]))
    (tmp_path / "part-000001.parquet").write_bytes(written([]))
    (tmp_path / "part-000002.parquet").write_bytes(written([record(2)]))
    found = hf.load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), split="train")
    assert list(found) == [record(0), record(1), record(2)]
