"""Which files an input means, and where the images that its rows name are."""

import sys

import fsspec
import pytest
from batch_forms_files import options

from aphrodite_jax.batch.sources import open_source
from aphrodite_jax.batch.sources.base import RemoteFile
from aphrodite_jax.batch.sources.shards import find_shards, in_order
from aphrodite_jax.errors import BatchError

pytestmark = pytest.mark.once
NAMES = ["b.parquet", "a.parquet", "deep/c.PARQUET", "notes.txt", "_unfinished/d.parquet", ".e.parquet"]


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    """An address of a folder with `NAMES`, local and in memory."""
    if request.param == "local":
        yield str(tmp_path)
        return
    filesystem = fsspec.filesystem("memory")
    yield f"memory://{tmp_path.name}/in"
    filesystem.rm(f"/{tmp_path.name}", recursive=True)


def write(folder, names=NAMES):
    for name in names:
        with fsspec.open(f"{folder}/{name}", "wb", auto_mkdir=True) as file:
            file.write(name.encode())


def names(path):
    return list(find_shards(path, (".parquet",)).sizes)


def test_a_file_a_folder_and_patterns(folder):
    write(folder)
    assert names(f"{folder}/b.parquet") == ["b.parquet"]
    assert names(folder) == names(f"{folder}/") == ["a.parquet", "b.parquet", "deep/c.PARQUET"]
    assert names(f"{folder}/?.parquet") == ["a.parquet", "b.parquet"]
    assert names(f"{folder}/**/*.PARQUET") == ["deep/c.PARQUET"]
    pytest.importorskip("braceexpand", reason="braces are expanded by braceexpand, which is not installed")
    assert names(f"{folder}/{{b,a}}.parquet") == ["b.parquet", "a.parquet"]
    assert names(f"{folder}/{{deep/c,a}}.*") == ["deep/c.PARQUET", "a.parquet"]


def test_a_name_with_signs_of_a_pattern_is_that_file(folder):
    write(folder, ["[1]/a{0,1}.parquet", "1/a0.parquet"])
    assert names(f"{folder}/[1]/a{{0,1}}.parquet") == ["a{0,1}.parquet"]
    assert names(f"{folder}/[1]") == ["a{0,1}.parquet"]


def test_what_is_not_there_is_said(folder):
    write(folder)
    with pytest.raises(BatchError, match="there is no input"):
        find_shards(f"{folder}/none.parquet", (".parquet",))
    with pytest.raises(BatchError, match=r"no file that ends in \.tar"):
        find_shards(folder, (".tar",))
    with pytest.raises(BatchError, match="no file that ends"):
        find_shards(f"{folder}/*.tar", (".tar",))
    with pytest.raises(BatchError, match="does not begin with '_'"):
        find_shards(folder, ("d.parquet",))
    with pytest.raises(BatchError, match="can't read the input 'nowhere://x'"):
        find_shards("nowhere://x", (".tar",))
    pytest.importorskip("braceexpand", reason="braces are expanded by braceexpand, which is not installed")
    with pytest.raises(BatchError, match=r"there is no input '.*/c\.parquet'"):
        find_shards(f"{folder}/{{a..c}}.parquet", (".parquet",))


def test_identity_is_of_names_and_sizes(folder, tmp_path):
    write(folder)
    before = find_shards(folder, (".parquet",)).identity()
    write(f"{folder}/elsewhere")
    assert find_shards(f"{folder}/elsewhere", (".parquet",)).identity() == before
    assert before["files"] == 3
    with fsspec.open(f"{folder}/elsewhere/a.parquet", "ab") as file:
        file.write(b"more")
    assert find_shards(f"{folder}/elsewhere", (".parquet",)).identity() != before


def test_places_of_images_on_this_machine(tmp_path):
    write(str(tmp_path), ["deep/a.parquet"])
    shards = find_shards(str(tmp_path), (".parquet",))
    assert shards.image("deep/a.parquet", "cat: 1.png") == f"{tmp_path}/deep/cat: 1.png"
    assert shards.image("deep/a.parquet", "../cat.png") == f"{tmp_path}/deep/../cat.png"
    for whole in ("/pictures/cat.png", "file:///cat.png", "data:image/png;base64,AA==", "http://host/cat.png"):
        assert shards.image("deep/a.parquet", whole) == whole


def test_places_of_images_elsewhere(tmp_path):
    """Relative ones start at the shard; a URL is fetched from where the input lies, and from nowhere else."""
    root = f"memory://{tmp_path.name}"
    write(root, ["deep/a.parquet"])
    shards = find_shards(root, (".parquet",))
    assert shards.image("deep/a.parquet", "cat.png") == RemoteFile(f"memory:///{tmp_path.name}/deep/cat.png")
    assert shards.image("deep/a.parquet", "../cat.png") == RemoteFile(f"memory:///{tmp_path.name}/cat.png")
    assert shards.image("deep/a.parquet", "memory://x/cat.png") == RemoteFile("memory:///x/cat.png")
    for left in ("/pictures/cat.png", "file:///cat.png", "data:,AA", "http://host/cat.png", "s3://bucket/cat.png"):
        assert shards.image("deep/a.parquet", left) == left
    for chain in ("simplecache::http://host/cat.png", "memory://x::file:///cat.png"):
        assert shards.image("deep/a.parquet", chain) == chain
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_places_of_images_keep_to_the_bucket():
    class Store(fsspec.AbstractFileSystem):
        protocol = "store"

    from aphrodite_jax.batch.sources.shards import Shards

    shards = Shards(Store(), "bucket/in", {"a.tar": 1})
    assert shards.image("a.tar", "../../../cat.png") == RemoteFile("store://bucket/cat.png")
    assert shards.image("a.tar", "store://bucket/cat.png") == RemoteFile("store://bucket/cat.png")
    assert shards.image("a.tar", "store://other/cat.png") == "store://other/cat.png"


def test_a_library_that_is_not_installed_is_named(folder, monkeypatch):
    write(folder)
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(BatchError, match=r"needs braceexpand, .* pip install 'aphrodite-jax\[batch\]'"):
        find_shards(f"{folder}/{{a,b}}.parquet", (".parquet",))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("parquet", "tables", "columns"):
        monkeypatch.delitem(sys.modules, f"aphrodite_jax.batch.sources.{name}", raising=False)
    with pytest.raises(BatchError, match=r"needs pyarrow, .* pip install 'aphrodite-jax\[batch\]'"):
        open_source(f"{folder}/a.parquet", options())


def test_in_order_keeps_the_order_and_the_errors():
    assert list(in_order(lambda x: 2 * x, range(100))) == list(range(0, 200, 2))
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda x: 1 // x, [1, 0]))
