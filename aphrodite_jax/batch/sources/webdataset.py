"""WebDataset: tar files in which members of one key are a sample, ``dog.jpg`` and ``dog.txt`` say.

The headers of each tar are read once, when units are made. A tar becomes one unit, or several if it has more samples
than a unit may have; each begins at a known place of the file, so that a large tar is not read from its start. (One
that is compressed must be, but a unit goes on where the one before it ended.) One sample is in memory at a time.

The format: https://github.com/webdataset/webdataset. A member's key is its path up to the first dot of its name; what
follows is its extension. Members of a key that don't follow one another are samples of their own.
"""

import collections
import dataclasses
import functools
import gzip
import io
import json
import posixpath
import re
import tarfile
import zlib
from collections.abc import Generator, Iterable, Iterator
from typing import Any, BinaryIO

from aphrodite_jax.batch.refusal import Refusal, shorten
from aphrodite_jax.batch.sources import IMAGE_SUFFIXES
from aphrodite_jax.batch.sources.base import Row, RowOptions, Source, Unit
from aphrodite_jax.batch.sources.files import NOT_TO_BE_HAD, look_again
from aphrodite_jax.batch.sources.shards import PROMPT_NAMES, Shards, find_shards, in_order, reason_of
from aphrodite_jax.errors import BatchError

__all__ = ["MAX_MEMBER_BYTES", "WebDatasetSource"]

MAX_MEMBER_BYTES = 256 * 2**20
"""Largest member that is read; a sample that needs a larger one is refused without holding it in memory."""

_COMPRESSED = (".tar.gz", ".tgz")
_META = re.compile(r"__[^/]*__($|/)")
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError)


class WebDatasetSource(Source):
    """Samples of tar shards.

    ``columns`` name extensions: under "image" one, or several that stand for each other as in ``jpg;png``; under
    "prompt" and "id" a member with a text, or a key of the object in the ``.json`` member. Without them the image is
    the one member with an image's extension, and the prompt, unless the job has one for all rows, is the ``.txt``
    member, or the one key of the ``.json`` member with the name of a prompt.

    Raises:
      BatchError: there is no such file.
    """

    form = "webdataset"
    part_suffix = ".tar"

    def __init__(self, path: str, options: RowOptions):
        super().__init__(path, options)
        self.shards = find_shards(path, (".tar", *_COMPRESSED))
        self._image = tuple(options.columns.get("image", "").lower().split(";")) if "image" in options.columns else None
        self._texts = {"txt", "json", *(options.columns[role].lower() for role in options.columns if role != "image")}
        self._kept: collections.deque[_Reader] = collections.deque(maxlen=1)

    def identity(self) -> dict[str, Any]:
        """Names and sizes of the tars."""
        return self.shards.identity()

    def units(self, rows_per_unit: int) -> Iterator[Unit]:
        """Whole tars, or runs of a tar's samples. What can't be read of a tar is a unit of no rows, behind the others.

        Raises:
          BatchError: no tar can be read, one can't be read now, or no sample of the first one has an image and a
            prompt.
        """
        index = first_row = 0
        first_error = None
        scan = functools.partial(self._scan, rows_per_unit=rows_per_unit)
        for name, found in zip(self.shards.sizes, in_order(scan, self.shards.sizes), strict=True):
            if found.misfit is not None and not first_row:
                raise BatchError(found.misfit)
            for number, offset in zip(range(0, found.num_samples, rows_per_unit), found.offsets, strict=True):
                size = min(rows_per_unit, found.num_samples - number)
                where = {"shard": name, "sample": number, "offset": offset}
                yield Unit(index=index, first_row=first_row, num_rows=size, where=where)
                index, first_row = index + 1, first_row + size
            if found.error is not None:
                first_error = first_error or found.error
                yield Unit(index=index, first_row=first_row, num_rows=0, where={"shard": name}, error=found.error)
                index += 1
        if not first_row and first_error is not None:
            raise BatchError(f"no shard of {self.path!r} can be read; the first one: {first_error}")

    def rows(self, unit: Unit) -> Iterator[Row]:
        """Samples of a unit, one at a time; see `Source.rows`.

        Raises:
          BatchError: a tar has fewer samples than when the units were made.
        """
        if not unit.num_rows:
            return
        name, sample = unit.where["shard"], unit.where["sample"]
        reader = self._reader(name, sample, unit.where["offset"])
        try:
            for _ in range(reader.position, sample):
                reader.next()
            for number in range(unit.first_row, unit.first_row + unit.num_rows):
                yield self._row(number, reader.next())
        except BaseException:
            reader.close()
            raise
        self._keep(reader)

    def write_part(self, unit: Unit, records: Iterable[bytes], file: BinaryIO) -> None:
        """Write a tar with a member ``<key>.json`` for each record.

        The key is the row's name. Where that can't be a key, or is that of the record before, it is the row's number.
        """
        before = None
        with tarfile.open(fileobj=file, mode="w") as tar:
            for data in records:
                record = json.loads(data)
                key = record["id"]
                if not _is_key(key) or key == before:
                    key = f"{record['row']:09d}"
                before = key
                member = tarfile.TarInfo(f"{key}.json")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    def _scan(self, name: str, rows_per_unit: int) -> "_Index":
        """Where runs of samples begin, from the headers of a tar."""
        try:
            return look_again(functools.partial(self._look, name, rows_per_unit))
        except OSError as problem:
            raise BatchError(f"can't read {name!r} of the input {self.path!r}: {reason_of(problem)}") from problem

    def _look(self, name: str, rows_per_unit: int) -> "_Index":
        offsets: list[int] = []
        num_samples, key, fits, first = 0, None, False, None
        error = None
        try:
            reader = _Reader(self.shards, name)
            try:
                for num_samples, sample in enumerate(reader.samples, start=1):
                    if num_samples % rows_per_unit == 1 or rows_per_unit == 1:
                        offsets.append(sample.offset)
                    key, first = sample.key, first or sample
                    fits = fits or self._fits(sample)
            finally:
                reader.close()
        except (*_DAMAGE, *NOT_TO_BE_HAD) as damage:
            after = f"after its sample {key!r}, number {num_samples}" if num_samples else "from its start"
            error = f"the tar {name!r} can't be read {after}: {reason_of(damage)}"
        misfit = None
        if first is not None and not fits:
            misfit = (
                f"no sample of {name!r} has what is asked for, an image and a prompt: name the members that hold them "
                "(--image-column, --prompt-column), or give one prompt for all rows (--prompt); the first sample has "
                f"{', '.join(first.sizes)}"
            )
        return _Index(num_samples, offsets, error, misfit)

    def _fits(self, sample: "_Sample") -> bool:
        """Whether a sample's members, by their extensions, may hold an image and a prompt."""
        prompt = self.options.columns.get("prompt", "").lower()
        has_prompt = self.options.prompt is not None or any(name in sample.sizes for name in ("txt", "json", prompt))
        return bool(self._images(sample)) and has_prompt

    def _images(self, sample: "_Sample") -> list[str]:
        """Extensions of the members that may be the image."""
        if self._image is not None:
            return [name for name in self._image if name in sample.sizes][:1]
        return [name for name in sample.sizes if _is_image(name)]

    def _reader(self, name: str, sample: int, offset: int) -> "_Reader":
        """One that stands at a sample, or before it in a compressed tar: the one that was kept, if it serves."""
        try:
            reader = self._kept.pop()
        except IndexError:
            reader = None
        if reader is not None:
            if reader.name == name and (
                reader.position == sample or (reader.is_compressed and reader.position < sample)
            ):
                return reader
            reader.close()
        wanted = set(self._image) | self._texts if self._image is not None else self._texts
        return _Reader(self.shards, name, sample, offset, wanted, any_image=self._image is None)

    def _keep(self, reader: "_Reader") -> None:
        self._kept.append(reader)

    def _row(self, number: int, sample: "_Sample") -> Row:
        custom_id = sample.key
        try:
            if sample.twice is not None:
                raise Refusal(f"the sample has two members .{sample.twice}", code="duplicate_member")
            if "id" in self.options.columns:
                own = _value(sample, self.options.columns["id"])
                if not isinstance(own, str | int) or isinstance(own, bool):
                    raise Refusal(f"the sample's id must be a text or a number, got {shorten(own)}", code="invalid_id")
                if not _is_text(str(own)):
                    raise Refusal(
                        f"the sample's id has half of a surrogate pair in it, got {shorten(own)}", code="invalid_id"
                    )
                custom_id = str(own)
            images = self._images(sample)
            if len(images) != 1:
                has = ", ".join(sample.sizes)
                problem = (
                    f"several images, {', '.join(images)}: name one (--image-column)"
                    if images
                    else f"no image; it has {has}"
                )
                raise Refusal(f"the sample has {problem}", code="ambiguous_image" if images else "missing_image")
            messages = self.options.messages([sample.read(images[0])], self._prompt(sample))
            request = self.options.request(custom_id, messages)
        except Refusal as refusal:
            return Row(number=number, custom_id=custom_id, request=refusal)
        return Row(number=number, custom_id=custom_id, request=request)

    def _prompt(self, sample: "_Sample") -> str | None:
        """The sample's own prompt, if it has one and it is to be asked."""
        name = self.options.columns.get("prompt")
        if name is not None:
            prompt = _value(sample, name)
        elif self.options.prompt is not None:
            return None
        elif "txt" in sample.sizes:
            prompt = _value(sample, "txt")
        else:
            content = _object(sample)
            names = [name for name in PROMPT_NAMES if content.get(name) is not None]
            if len(names) > 1:
                raise Refusal(
                    f"the .json member has {', '.join(names)}: name one (--prompt-column)", code="ambiguous_prompt"
                )
            prompt = content[names[0]] if names else None
        if prompt is not None and not isinstance(prompt, str):
            raise Refusal(f"the sample's prompt must be a text, got {shorten(prompt)}", code="invalid_prompt")
        return prompt


@dataclasses.dataclass(frozen=True)
class _Index:
    """What the headers of a tar tell: whole samples, where every ``rows_per_unit``-th begins, why there are no more.

    ``misfit`` says that none of its samples can be asked.
    """

    num_samples: int
    offsets: list[int]
    error: str | None
    misfit: str | None


@dataclasses.dataclass
class _Sample:
    """Members of one key, by their extensions in small letters.

    Attributes:
      offset: of its first header in the tar, in bytes.
      sizes: bytes of each member.
      data: content of the members that were wanted.
      twice: an extension that two members have.
    """

    key: str
    offset: int
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    data: dict[str, bytes] = dataclasses.field(default_factory=dict)
    twice: str | None = None

    def read(self, name: str) -> bytes:
        """A member's content."""
        if name not in self.data:
            raise Refusal(
                f"the member .{name} has {self.sizes[name]} bytes, more than {MAX_MEMBER_BYTES}", code="too_large"
            )
        return self.data[name]


class _Reader:
    """Goes through a tar's samples from one of them on.

    Args:
      sample, offset: where it begins: the sample's number in the tar, and the place of its first header.
      wanted: extensions of members that are read; ``any_image`` adds those of images.

    Attributes:
      position: the number of the sample that comes next.
      samples: the whole samples. A tar that is damaged raises behind them; the sample in which it is, or which ends
        there, may lack a member and is not among them.
    """

    def __init__(
        self,
        shards: Shards,
        name: str,
        sample: int = 0,
        offset: int = 0,
        wanted: Iterable[str] = (),
        *,
        any_image: bool = False,
    ):
        self.name, self.position = name, sample
        self.is_compressed = name.lower().endswith(_COMPRESSED)
        self._wanted, self._any_image = frozenset(wanted), any_image
        self._raw: Any = shards.filesystem.open(shards.path(name), "rb")
        self._file: Any = gzip.GzipFile(fileobj=self._raw) if self.is_compressed else self._raw
        self.samples: Generator[_Sample] = self._read(offset)

    def next(self) -> _Sample:
        """The next sample."""
        sample = next(self.samples, None)
        if sample is None:
            raise BatchError(f"the tar {self.name!r} changed: it has {self.position} samples, and had more")
        self.position += 1
        return sample

    def close(self) -> None:
        """Let go of the file."""
        self.samples.close()
        self._file.close()
        self._raw.close()

    def __del__(self):
        if hasattr(self, "samples"):
            self.close()

    def _read(self, offset: int) -> Generator[_Sample]:
        self._file.seek(offset)
        sample = None
        tar: Any
        with tarfile.TarFile(fileobj=self._file) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # which otherwise grow with the tar
                named = _key_and_extension(member.name) if member.isreg() else None
                if named is None:
                    continue
                key, extension = named
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = _Sample(key, member.offset)
                if extension in sample.sizes:
                    sample.twice = extension
                sample.sizes[extension] = member.size
                is_wanted = extension in self._wanted or (self._any_image and _is_image(extension))
                if is_wanted and member.size <= MAX_MEMBER_BYTES:
                    sample.data[extension] = tar.extractfile(member).read()
            # tarfile takes a damaged header, and the end of a file that was cut off between members, for the tar's end.
            self._file.seek(tar.offset)
            block = self._file.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("the file ends before the mark of a tar's end: it was cut off")
            if any(block):
                raise tarfile.ReadError(f"there is no header at byte {tar.offset}, where one should be")
        if sample is not None:
            yield sample


def _key_and_extension(name: str) -> tuple[str, str] | None:
    """A member's key and extension; None of a member that is of no sample."""
    folder, last = posixpath.split(name)
    stem, _, extension = last.partition(".")
    if not stem or not extension or _META.match(name):
        return None
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _is_key(key: str) -> bool:
    """Whether ``<key>.json`` is read back as a member of this key, and names no place outside of the tar."""
    if "\0" in key or not _is_text(key, "surrogateescape"):  # as names are that are not UTF-8
        return False
    return _key_and_extension(f"{key}.json") == (key, "json") and not (key.startswith("/") or ".." in key.split("/"))


def _is_text(text: str, errors: str = "strict") -> bool:
    """Whether a text has a form in UTF-8, which half of a surrogate pair, as JSON may have it, has not."""
    try:
        text.encode("utf-8", errors)
    except UnicodeEncodeError:
        return False
    return True


def _is_image(extension: str) -> bool:
    return f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES


def _value(sample: _Sample, name: str) -> Any:
    """The text of a member, or what the ``.json`` member has under a key; None if there is neither."""
    if name.lower() not in sample.sizes:
        return _object(sample).get(name)
    if name.lower().rpartition(".")[2] == "json":
        return _json(sample, name.lower())
    return _text(sample, name.lower()).strip()


def _object(sample: _Sample) -> dict[str, Any]:
    """The object in the ``.json`` member, empty if there is no such member."""
    if "json" not in sample.sizes:
        return {}
    value = _json(sample, "json")
    if not isinstance(value, dict):
        raise Refusal(f"the .json member must hold an object, got {shorten(value)}", code="invalid_json")
    return value


def _json(sample: _Sample, name: str) -> Any:
    try:
        return json.loads(_text(sample, name))
    except (ValueError, RecursionError) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal(f"the member .{name} is not JSON: {error}", code="invalid_json") from error


def _text(sample: _Sample, name: str) -> str:
    try:
        return sample.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal(f"the member .{name} is not UTF-8: {error}", code="invalid_text") from error
