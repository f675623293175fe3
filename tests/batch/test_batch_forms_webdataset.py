"""Tar shards: every sample is read once, in runs that begin anywhere; damage costs what comes after it alone."""

import functools
import gzip
import io
import json
import random
import tarfile

import fsspec
import pytest
from batch_forms_files import asked, check_units, options, picture, read, record
from hypothesis import given, settings
from hypothesis import strategies as st

from aphrodite_jax.batch.answers import json_line
from aphrodite_jax.batch.sources import Unit, files, open_source, webdataset
from aphrodite_jax.errors import BatchError

pytestmark = pytest.mark.once


@functools.cache
def library():
    return pytest.importorskip("webdataset", reason="webdataset is not installed")


def tar_of(members, *, form=tarfile.PAX_FORMAT):
    """The bytes of a tar with members (name, content); a content of None is a folder."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def numbered(start, count, form=tarfile.PAX_FORMAT):
    members = []
    for n in range(start, start + count):
        # Some names are too long for a header of their own.
        key = f"{'deep/' * 40 if n % 3 == 1 else ''}{n:04d}"
        members += [(f"{key}.jpg", b"%d" % n * (n % 700)), (f"{key}.txt", f"what is {n}?\n".encode())]
    return tar_of(members, form=form)


def check_numbered(rows, numbers, first=0):
    assert [row.number for row in rows] == list(range(first, first + len(numbers)))
    assert [asked(row) for row in rows] == [([b"%d" % n * (n % 700)], f"what is {n}?") for n in numbers]
    assert [row.custom_id[-4:] for row in rows] == [f"{n:04d}" for n in numbers]


def where(unit):
    """A unit's place as it is after it was written down."""
    fields = {name: getattr(unit, name) for name in ("index", "first_row", "num_rows", "error")}
    return Unit(where=json.loads(json.dumps(unit.where)), **fields)


def rows_of(path, members, **fields):
    path.write_bytes(tar_of(members))
    source = open_source(path, options(**fields))
    return read(source, source.units(100))


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    rows_per_unit=st.integers(1, 13),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    compressed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_samples_of_any_units(tmp_path_factory, sizes, rows_per_unit, form, compressed, seed):
    """In order, in any order, and by two sources that share the units out."""
    folder, total = tmp_path_factory.mktemp("tars"), sum(sizes)
    for index, size in enumerate(sizes):
        data = numbered(sum(sizes[:index]), size, form)
        suffix, data = (".tar.gz", gzip.compress(data)) if compressed else (".tar", data)
        (folder / f"{index}{suffix}").write_bytes(data)
    source = open_source(folder, options())
    units = [where(unit) for unit in source.units(rows_per_unit)]
    check_units(units, rows_per_unit, total)
    assert len(units) == sum(-(-size // rows_per_unit) for size in sizes)
    check_numbered(read(source, units), range(total))
    shuffled = read(source, random.Random(seed).sample(units, len(units)))
    check_numbered(sorted(shuffled, key=lambda row: row.number), range(total))
    shared = [row for worker in range(2) for row in read(open_source(folder, options()), units[worker::2])]
    check_numbered(sorted(shared, key=lambda row: row.number), range(total))


def samples_of_library(path):
    wds = library()
    with open(path, "rb") as stream:
        files = wds.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        return list(wds.tariterators.group_by_keys(files))


def test_samples_are_those_of_the_library(tmp_path):
    """Folders, odd names, notes and keys that come again are taken as WebDataset takes them."""
    names = [
        "a.jpg", "a.txt", "b.txt", "b.JPG", "a.jpg", "sub", "sub/a.jpg", "sub/a.extra.txt", "sub.x/c.png", "plain",
        "__note__", "__notes__/x.jpg", "d.cls", "./e.jpg", "./e.json", ".hidden.jpg", "f.1.jpg", "f.2.txt",
    ]  # fmt: skip
    members = [(name, None if name == "sub" else name.encode()) for name in names]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(members))
    expected = samples_of_library(path)
    reader = webdataset._Reader(webdataset.find_shards(str(path), (".tar",)), "a.tar", wanted=["txt"], any_image=True)
    found = list(reader.samples)
    reader.close()
    assert [sample.key for sample in found] == [sample["__key__"] for sample in expected]
    for ours, theirs in zip(found, expected, strict=True):
        content = {name: data for name, data in theirs.items() if not name.startswith("__")}
        assert ours.sizes == {name: len(data) for name, data in content.items()}
        assert ours.data.items() <= content.items()
        assert set(ours.data) == {name for name in content if name.endswith(("jpg", "png")) or name == "txt"}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar_that_was_cut_off_anywhere(tmp_path, form):
    """Samples before the cut are rows, and the cut is one failure."""
    data, path = numbered(0, 6, form), tmp_path / "a.tar"
    end = len(data.rstrip(b"\0"))
    for size in [1, 511, *range(600, end, 700), *range(1024, end, 2048), end, end + 300]:
        path.write_bytes(data[:size])
        source = open_source(path, options())
        try:
            units = list(source.units(4))
        except BatchError as error:
            assert "no shard of" in str(error)  # noqa: PT017 - either may be right, by the place of the cut
            assert size < end / 2
            continue
        assert [bool(unit.error) for unit in units] == [False] * (len(units) - 1) + [True]
        rows = read(source, units)
        check_numbered(rows, range(len(rows)))
        assert f"number {len(rows)}:" in units[-1].error
        # Whole are those behind which another one is begun.
        assert len(rows) < 6
        assert len(rows) >= 3 or size < end * 0.8


def test_damage_in_one_shard_leaves_the_others(tmp_path):
    damaged = bytearray(numbered(10, 6))
    place = damaged.index(b"0012.jpg")
    damaged[place : place + 200] = b"?" * 200
    for index, data in enumerate([numbered(0, 3), bytes(damaged), b"", b"no tar" * 500, numbered(20, 2)]):
        (tmp_path / f"{index}.tar").write_bytes(data)
    (tmp_path / "5.tar.gz").write_bytes(gzip.compress(numbered(30, 5))[:-60])
    source = open_source(tmp_path, options(), "webdataset")
    units = [where(unit) for unit in source.units(2)]
    check_units(units, 2, sum(unit.num_rows for unit in units))
    rows = read(source, units)
    check_numbered(rows[:6], [0, 1, 2, 10, 20, 21])
    errors = [unit.error for unit in units if unit.error]
    assert [error.split("'")[1] for error in errors] == ["1.tar", "2.tar", "3.tar", "5.tar.gz"]
    assert "number 1: ReadError: there is no header at byte" in errors[0]
    assert "can't be read from its start" in errors[1]
    assert "EOFError" in errors[3]


def test_no_shard_can_be_read(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 500)
    with pytest.raises(BatchError, match=r"no shard of .* can be read; the first one: the tar 'a\.tar' can't be read"):
        list(open_source(tmp_path / "a.tar", options()).units(10))


def test_a_tar_with_fewer_samples_than_before(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(numbered(0, 5))
    source = open_source(path, options())
    units = list(source.units(5))
    path.write_bytes(numbered(0, 3))
    with pytest.raises(BatchError, match="changed: it has 3 samples"):
        read(source, units)


def test_a_large_tar_is_not_read_from_its_start(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    path.write_bytes(numbered(0, 40))
    source = open_source(path, options())
    units = list(source.units(10))
    begun = []
    monkeypatch.setattr(webdataset._Reader, "_read", _spy(webdataset._Reader._read, begun))
    check_numbered(list(source.rows(units[2])), range(20, 30), first=20)
    assert begun == [units[2].where["offset"]]
    assert begun[0] > 0
    check_numbered(list(source.rows(units[3])), range(30, 40), first=30)
    assert len(begun) == 1  # it went on


def test_a_compressed_tar_is_decompressed_once(tmp_path, monkeypatch):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(numbered(0, 40)))
    source = open_source(path, options())
    units, begun = list(source.units(5)), []
    monkeypatch.setattr(webdataset._Reader, "_read", _spy(webdataset._Reader._read, begun))
    for unit in units[1::3]:  # as one of several workers takes them
        check_numbered(list(source.rows(unit)), range(unit.first_row, unit.first_row + 5), first=unit.first_row)
    assert len(begun) == 1


def _spy(method, begun):
    def spied(self, offset):
        begun.append(offset)
        return method(self, offset)

    return spied


def test_units_may_be_read_at_the_same_time_and_left(tmp_path):
    (tmp_path / "a.tar").write_bytes(numbered(0, 9))
    source = open_source(tmp_path / "a.tar", options())
    first, second, third = source.units(3)
    pairs = list(zip(source.rows(first), source.rows(second), strict=True))
    check_numbered([a for a, _ in pairs] + [b for _, b in pairs] + list(source.rows(third)), range(9))
    rows = source.rows(first)
    next(rows)
    rows.close()
    check_numbered(read(source, [first, second, third]), range(9))


def test_what_a_sample_asks(tmp_path):
    image = picture(0)
    members = [
        ("a.png", image),
        ("a.txt", "\ufeff what? \n".encode()),
        ("b.png", image),
        ("b.json", b'{"question": "why?", "n": 3}'),
        ("c.png", image),  # no prompt
        ("d.txt", b"what?"),  # no image
        ("e.png", image),
        ("e.mask.png", image),  # which one?
        ("e.txt", b"what?"),
        ("f.png", image),
        ("f.txt", b"\xff"),
        ("g.png", image),
        ("g.json", b'{"question": '),
        ("h.png", image),
        ("h.json", b'["what?"]'),
        ("i.png", image),
        ("i.json", b'{"prompt": 5}'),
        ("j.png", image),
        ("j.json", b'{"prompt": "what?", "text": "why?"}'),
        ("k.png", image),
        ("k.txt", b"what?"),
        ("k.png", b"another"),
        ("l.png", image[:20]),  # which is found when it is opened
        ("l.txt", b"what?"),
    ]
    rows = rows_of(tmp_path / "a.tar", members)
    assert [(row.custom_id, asked(row)) for row in rows] == [
        ("a", ([image], "what?")),
        ("b", ([image], "why?")),
        ("c", "missing_prompt"),
        ("d", "missing_image"),
        ("e", "ambiguous_image"),
        ("f", "invalid_text"),
        ("g", "invalid_json"),
        ("h", "invalid_json"),
        ("i", "invalid_prompt"),
        ("j", "ambiguous_prompt"),
        ("k", "duplicate_member"),
        ("l", ([image[:20]], "what?")),
    ]


def test_named_members(tmp_path):
    members = [
        ("a.left.png", b"1"),
        ("a.right.png", b"2"),
        ("a.txt", b"caption"),
        ("a.json", b'{"ask": "why?", "uid": 12, "prompt": "no"}'),
        ("b.jpg", b"3"),
        ("b.ask", b"how?"),
        ("b.json", b'{"uid": null}'),
    ]
    columns = {"image": "right.png;jpg", "prompt": "ask", "id": "uid"}
    first, second = rows_of(tmp_path / "a.tar", members, columns=columns)
    assert (first.custom_id, asked(first)) == ("12", ([b"2"], "why?"))
    assert asked(second) == "invalid_id"
    _, second = rows_of(tmp_path / "a.tar", members, columns={"image": "left.png;JPG", "prompt": "ASK"})
    assert (second.custom_id, asked(second)) == ("b", ([b"3"], "how?"))


def test_a_prompt_for_all_rows(tmp_path):
    members = [("a.jpg", b"1"), ("a.txt", b"a caption"), ("b.jpg", b"2"), ("c.jpg", b"3"), ("c.q", b"own")]
    rows = rows_of(tmp_path / "a.tar", members, prompt="what?")
    assert [asked(row)[1] for row in rows] == ["what?"] * 3
    rows = rows_of(tmp_path / "a.tar", members, prompt="what?", columns={"prompt": "q"})
    assert [asked(row)[1] for row in rows] == ["what?", "what?", "own"]


def test_members_that_no_sample_has(tmp_path):
    members = [("a.bin", b"1"), ("a.txt", b"x")]
    with pytest.raises(BatchError, match=r"no sample of 'a\.tar' has .*: name the members .* sample has bin, txt"):
        rows_of(tmp_path / "a.tar", members)
    with pytest.raises(BatchError, match=r"no sample of 'a\.tar' has"):
        rows_of(tmp_path / "a.tar", [*members, ("a.png", b"2")], columns={"image": "jpg"})
    with pytest.raises(BatchError, match=r"or give one prompt for all rows .*; the first sample has jpg"):
        rows_of(tmp_path / "a.tar", [("a.jpg", b"")])


def test_a_member_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_MEMBER_BYTES", 100)
    members = [("a.jpg", b"1" * 101), ("a.txt", b"x"), ("b.jpg", b"1" * 100), ("b.txt", b"x")]
    assert [asked(row) for row in rows_of(tmp_path / "a.tar", members)] == ["too_large", ([b"1" * 100], "x")]


def test_memory_is_flat(tmp_path):
    """What a reader keeps of members that it has read does not grow."""
    path = tmp_path / "a.tar"
    path.write_bytes(numbered(0, 30))
    reader = webdataset._Reader(webdataset.find_shards(str(path), (".tar",)), "a.tar")
    for _ in range(29):
        reader.next()
        tar = reader.samples.gi_frame.f_locals["tar"]
        assert len(tar.members) <= 1
    reader.close()


def test_tars_elsewhere(tmp_path):
    root = f"memory://{tmp_path.name}"
    for index in range(3):
        with fsspec.open(f"{root}/x-{index:03d}.tar", "wb") as file:
            file.write(numbered(10 * index, 10))
    pytest.importorskip("braceexpand", reason="braces are expanded by braceexpand, which is not installed")
    source = open_source(f"{root}/x-{{002..001}}.tar", options())
    units = [where(unit) for unit in source.units(7)]
    assert [unit.num_rows for unit in units] == [7, 3, 7, 3]
    check_numbered(read(source, units), [*range(20, 30), *range(10, 20)])
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def written(records):
    file = io.BytesIO()
    source = object.__new__(webdataset.WebDatasetSource)
    source.write_part(Unit(index=0, first_row=0, num_rows=len(records), where={}), map(json_line, records), file)
    return file.getvalue()


def test_parts_are_read_by_the_library(tmp_path):
    """By the key of the sample, where it can be one."""
    names = ["a", "deep/b", "b", "b", "x.y", "/etc/c", "../d", "__e__/f", "", "é" * 120]
    records = [record(number, name) for number, name in enumerate(names)]
    (tmp_path / "part-000000.tar").write_bytes(written(records))
    found = samples_of_library(tmp_path / "part-000000.tar")
    assert [json.loads(sample["json"]) for sample in found] == records
    fallen_back = [f"{number:09d}" for number in range(3, 9)]
    assert [sample["__key__"] for sample in found] == ["a", "deep/b", "b", *fallen_back, "é" * 120]
    assert written(records) == written(records)


def test_an_empty_part(tmp_path):
    with tarfile.open(fileobj=io.BytesIO(written([]))) as tar:
        assert tar.getnames() == []


def test_what_the_library_writes(tmp_path):
    wds = library()
    with wds.TarWriter(str(tmp_path / "a.tar"), encoder=True) as writer:
        for number in range(5):
            writer.write({"__key__": f"k{number}", "png": picture(number), "json": {"prompt": f"what is {number}?"}})
    source = open_source(tmp_path / "a.tar", options())
    rows = read(source, source.units(2))
    assert [(row.custom_id, asked(row)) for row in rows] == [
        (f"k{number}", ([picture(number)], f"what is {number}?")) for number in range(5)
    ]


def test_an_id_that_is_no_text_is_a_refusal_of_its_row(tmp_path):
    """JSON may have half of a surrogate pair in it; the name of a part's member can't."""
    members = [
        member
        for number, name in enumerate(["n0", "\ud83d", "n2", 7])
        for member in [(f"s{number}.png", picture(number)), (f"s{number}.json", json.dumps({"id": name}).encode())]
    ]
    rows = rows_of(tmp_path / "a.tar", members, prompt="p", columns={"id": "id"})
    assert [row.custom_id for row in rows] == ["n0", "s1", "n2", "7"]
    assert [getattr(row.request, "code", None) for row in rows] == [None, "invalid_id", None, None]


def test_no_name_in_a_part_stops_it(tmp_path):
    """Names that can't be a member's are replaced; those that a tar has that is not UTF-8 are kept."""
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of([("caf\udce9.png", picture(0)), ("caf\udce9.txt", b"p")]))
    source = open_source(path, options())
    ((unit,), (row,)) = (units := list(source.units(9)), read(source, units))
    assert row.custom_id == "caf\udce9"
    file = io.BytesIO()
    source.write_part(
        unit, (json_line(record(n, name)) for n, name in enumerate([row.custom_id, "\ud83d", "a\0b"])), file
    )
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as tar:
        assert tar.getnames() == ["caf\udce9.json", "000000001.json", "000000002.json"]


def test_a_tar_that_fails_for_a_moment_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    path.write_bytes(numbered(0, 3))
    source = open_source(path, options())
    units = list(source.units(2))
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))
    begin, fails = webdataset._Reader.__init__, iter([True] * 2 + [False] + [True] * 3)

    def failing(*args, **options):
        if next(fails):
            raise TimeoutError("timed out")
        begin(*args, **options)

    monkeypatch.setattr(webdataset._Reader, "__init__", failing)
    assert list(source.units(2)) == units
    with pytest.raises(BatchError, match=r"can't read 'a\.tar' of the input .*TimeoutError"):
        list(source.units(2))
