"""A job whose output is a directory of parts, and how far it has come.

    OUTPUT/
      job.json                  whose answers these are: input, model, options that an answer depends on
      units.jsonl               the input in runs of rows, each of which makes a part; written when the job is made
      parts/part-000000.jsonl   answered rows, in the order of the input; .parquet or .tar for such inputs
      errors/part-000000.jsonl  rows that failed, if some did
      journal/part-000000.jsonl rows of a part that is not whole yet
      done/part-000000.json     the part's figures; written when all else of it is in its place
      manifest.json             figures of all parts, when they are all there
      report.json               of the latest run

Any number of runs may work on a job, on one machine or on several: on one they leave each other's parts alone by locks
on journals, and a part is put in place in one step, so that no row can stand in the output twice.
"""

import array
import dataclasses
import json
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from aphrodite_jax.batch.answers import json_line
from aphrodite_jax.batch.identity import differences, model_identity, model_names
from aphrodite_jax.batch.journal import OpenUnit
from aphrodite_jax.batch.output import OutputHeld
from aphrodite_jax.batch.requests import Defaults
from aphrodite_jax.batch.sources import RowOptions, Source, Unit, open_source
from aphrodite_jax.batch.storage import Storage, open_storage
from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import BatchError

__all__ = ["PartsJob", "PartsReport", "Standing", "open_parts"]

ROWS_PER_PART = 1024
FEW = 64
"""Parts that are looked at one by one; of more, folders are listed and files read from their start."""
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartsReport:
    """What a run did, and how the parts stand that it was given.

    Attributes:
      parts, rows: of the parts that the run was given.
      answered, failed: of these, those that stand in the output now, by how they ended.
      resumed: of these, those that earlier runs left.
      held: parts that another run of this machine works on; this run left them alone.
      prompt_tokens, completion_tokens: of the rows that this run answered.
      seconds: from the run's start to its end, without loading the model; rates are of this run's own rows.
      stopped: whether the run was told to stop before its end.
    """

    parts: int
    rows: int
    answered: int
    failed: int
    resumed: int
    held: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    rows_per_second: float
    tokens_per_second: float
    stopped: bool

    @classmethod
    def of_nothing_left(cls, standing: "Standing") -> "PartsReport":
        """Of a run that found all of its parts whole."""
        return cls(
            parts=standing.parts,
            rows=standing.rows,
            answered=standing.answered,
            failed=standing.failed,
            resumed=standing.done_rows,
            held=0,
            prompt_tokens=0,
            completion_tokens=0,
            seconds=0.0,
            rows_per_second=0.0,
            tokens_per_second=0.0,
            stopped=False,
        )


@dataclasses.dataclass(kw_only=True)
class Standing:
    """How parts stand: how many there are, and figures of those that are whole."""

    parts: int = 0
    rows: int = 0
    done: set[int] = dataclasses.field(default_factory=set)
    done_rows: int = 0
    answered: int = 0
    failed: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether all of them are whole."""
        return len(self.done) == self.parts


def open_parts(
    input_path: str | os.PathLike,
    output_path: str | os.PathLike,
    *,
    model_config: ModelConfig,
    form: str | None = None,
    prompt: str | None = None,
    system: str | None = None,
    columns: Mapping[str, str] | None = None,
    sampling: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    served_model_names: tuple[str, ...] = (),
    rows_per_part: int | None = None,
) -> "PartsJob":
    """Open a job whose output is a directory, or make it; no model is loaded for it.

    Args:
      input_path: a JSONL file, a folder of images, Parquet files, a `datasets` folder or tar shards; local, or any
        address that `fsspec` opens.
      output_path: a directory, likewise; made if it is not there.
      model_config: the model that will answer.
      form: the input's form; found by what it is if None.
      prompt, system, columns, sampling: for rows that are no OpenAI requests, see `RowOptions`.
      max_tokens: generated tokens for rows that don't say.
      served_model_names: names under which rows may ask for the model, beside its own.
      rows_per_part: 1024 if None, or what the job was made with.

    Raises:
      BatchError: the input can't be read; the output can't be written, or holds something that is not this job's.
        Nothing is overwritten then.
    """
    place = os.fspath(output_path)
    names = model_names(model_config, served_model_names)
    defaults = Defaults(
        model_names=names,
        context_length=model_config.context_length,
        max_tokens=max_tokens,
        seed=model_config.seed,
    )
    options = RowOptions(
        defaults=defaults, prompt=prompt, system=system, columns=columns or {}, sampling=sampling or {}
    )
    source = open_source(input_path, options, form)
    storage = open_storage(place)
    _check_apart(os.fspath(input_path), storage)
    identity = {
        "format": _FORMAT,
        "form": source.form,
        "rows_per_part": rows_per_part,
        "input": source.identity(),
        "model": model_identity(model_config),
        "options": {
            "name": names[0],
            "served_model_names": list(served_model_names),
            "max_tokens": max_tokens,
            "prompt": prompt,
            "system": system,
            "columns": dict(options.columns),
            "sampling": dict(options.sampling),
        },
    }
    identity = json.loads(json.dumps(identity))  # as it will be read
    found = _claim(storage, identity)
    if found is None:
        with storage.making():
            found = _claim(storage, identity)  # another run may have made it meanwhile
            if found is None:
                found = {**identity, "rows_per_part": rows_per_part or ROWS_PER_PART}
                _make(source, storage, found)
    return PartsJob(source, storage, found)


class PartsJob:
    """A job that is made.

    Attributes:
      source: what rows are read from, and parts written by.
      identity: what stands in ``job.json``.
      num_units, num_rows: of the whole job.
    """

    def __init__(self, source: Source, storage: Storage, identity: Mapping[str, Any]):
        self.source, self.identity = source, identity
        self._storage = storage
        self.num_units = self.num_rows = 0
        self._lines = array.array("Q", [0])  # where lines of units.jsonl begin, and their end
        for data in self._storage.lines("units.jsonl"):
            unit = self._unit(self.num_units, data)
            self.num_units, self.num_rows = self.num_units + 1, unit.first_row + unit.num_rows
            self._lines.append(self._lines[-1] + len(data))

    @property
    def place(self) -> str:
        """The output, as messages name it."""
        return self._storage.place

    def units(self, indices: Container[int] | None = None) -> Iterator[Unit]:
        """The units of these indices, or all, in their order."""
        chosen = range(self.num_units) if indices is None else [i for i in range(self.num_units) if i in indices]
        if len(chosen) <= FEW:
            for index in chosen:
                begin, end = self._lines[index : index + 2]
                yield self._unit(index, self._storage.read_between("units.jsonl", begin, end))
            return
        for index, data in enumerate(self._storage.lines("units.jsonl")):
            if indices is None or index in indices:
                yield self._unit(index, data)

    def _unit(self, index: int, data: bytes) -> Unit:
        try:
            fields: dict[str, Any] = json.loads(data)
            return Unit(**fields)
        except (ValueError, TypeError) as error:
            raise BatchError(f"line {index + 1} of {self.place}/units.jsonl is damaged: {error}") from error

    def standing(self, indices: Container[int] | None = None) -> Standing:
        """How the parts of these indices stand, or all.

        Raises:
          BatchError: a part that is marked as done is not what a run wrote there.
        """
        standing, num_rows = Standing(), {}
        for unit in self.units(indices):
            standing.parts += 1
            standing.rows += unit.num_rows
            num_rows[unit.index] = unit.num_rows
        if len(num_rows) > FEW:
            marked = self._storage.sizes("done").keys()
            num_rows = {index: rows for index, rows in num_rows.items() if f"{_name(index)}.json" in marked}
        marks = self._storage.read_many([f"done/{_name(index)}.json" for index in num_rows])
        sizes = self._storage.sizes("parts").get if len(num_rows) > FEW else self._size_of_part
        for (index, rows), data in zip(num_rows.items(), marks, strict=True):
            if data is None:
                continue
            mark = self._mark(index, data, sizes)
            standing.done.add(index)
            standing.done_rows += rows
            standing.answered += mark["answered"]
            standing.failed += mark["failed"]
        return standing

    def _size_of_part(self, part: str) -> int | None:
        return self._storage.size(f"parts/{part}")

    def _mark(self, index: int, data: bytes, size_of: Callable[[str], int | None]) -> dict[str, Any]:
        name = f"done/{_name(index)}.json"
        try:
            mark = json.loads(data)
            part, size = mark["part"], mark["bytes"]
        except (ValueError, KeyError, TypeError) as error:
            raise BatchError(
                f"{self.place}/{name} is damaged; remove it to have this part's rows answered again"
            ) from error
        if part is not None and size_of(part) != size:
            raise BatchError(
                f"{self.place}/parts/{part} is not what a run wrote there ({size} bytes); put it back, or remove it "
                f"and {name} to have its rows answered again"
            )
        return mark

    def take(self, unit: Unit) -> OpenUnit | None:
        """Open a unit to work on it; None if it is done.

        Raises:
          OutputHeld: another run of this machine works on it.
        """
        journal, mark = f"journal/{_name(unit)}.jsonl", f"done/{_name(unit)}.json"
        if self._storage.read(mark) is not None:
            return None
        try:
            file, close = self._storage.open_journal(journal)
        except OutputHeld:
            if self._storage.read(mark) is not None:
                return None
            raise
        if self._storage.read(mark) is not None:  # meanwhile
            self._storage.remove(journal)
            close()
            return None
        return OpenUnit(unit, file, close)

    def _drop_journals(self) -> None:
        """Remove those of parts that are done: a run that is killed between the two leaves one."""
        done = self._storage.sizes("done")
        for name in self._storage.sizes("journal"):
            if f"{name.removesuffix('.jsonl')}.json" in done:
                self._storage.remove(f"journal/{name}")

    def keep(self, work: OpenUnit) -> None:
        """Close a unit that is not whole, so that a later run goes on from there."""
        journal = f"journal/{_name(work.unit)}.jsonl"
        try:
            if work.num_left < work.unit.num_rows:
                self._storage.keep_journal(journal)
            elif not self._storage.size(journal):  # without locks, another run's may stand there
                self._storage.remove(journal)
        finally:
            work.close()

    def put_in_place(self, work: OpenUnit) -> None:
        """Write the part of a unit whose rows have all come to their end, its errors and its mark, and close it.

        Raises:
          BatchError: the output can't be written; the journal stays.
        """
        unit, name = work.unit, _name(work.unit)
        part, size, digest = None, 0, None
        try:
            if self._storage.read(f"done/{name}.json") is not None:  # by a run of another machine
                self._storage.remove(f"journal/{name}.jsonl")
                return
            # What an earlier run left, whose mark somebody has removed, goes away where nothing takes its place.
            if not work.num_answered:
                self._storage.remove(f"parts/{name}{self.source.part_suffix}")
            if not work.num_failed:
                self._storage.remove(f"errors/{name}.jsonl")
            if work.num_answered:
                part = f"{name}{self.source.part_suffix}"
                size, digest = self._storage.write_with(
                    f"parts/{part}", lambda file: self.source.write_part(unit, work.records(), file)
                )
            if work.num_failed:
                self._storage.write_with(f"errors/{name}.jsonl", lambda file: file.writelines(work.failures()))
            mark = {
                "part": part,
                "first_row": unit.first_row,
                "rows": unit.num_rows,
                "answered": work.num_answered,
                "failed": work.num_failed,
                "prompt_tokens": work.prompt_tokens,
                "completion_tokens": work.completion_tokens,
                "bytes": size,
                "sha256": digest,
            }
            self._storage.write(f"done/{name}.json", json_line(mark))
            self._storage.remove(f"journal/{name}.jsonl")
        finally:
            work.close()

    def reopen(self) -> None:
        """Remove ``manifest.json``, where somebody has removed marks behind it."""
        self._drop_journals()
        self._storage.remove("manifest.json")

    def finish(self) -> bool:
        """Write ``manifest.json`` if all parts of the job are there; whether they are."""
        if not self.standing().is_complete:
            return False
        self._drop_journals()
        with self._storage.making():
            self._storage.write_with("manifest.json", self._write_manifest)
        return True

    def _write_manifest(self, file: Any) -> None:
        names = [f"done/{_name(index)}.json" for index in range(self.num_units)]
        totals: dict[str, Any] = dict.fromkeys(
            ("rows", "answered", "failed", "prompt_tokens", "completion_tokens", "bytes"), 0
        )
        file.write(b'{"parts": [')
        for index, data in enumerate(self._storage.read_many(names)):
            mark = json.loads(data or b"")
            totals = {key: total + mark[key] for key, total in totals.items()}
            file.write((b",\n" if index else b"\n") + json.dumps(mark).encode())
        facts = {"form": self.source.form, **totals, "num_parts": self.num_units}
        file.write(b"\n],\n" + json.dumps(facts, indent=1)[1:].encode() + b"\n")

    def write_report(self, report: PartsReport | None, name: str = "report") -> None:
        """Write what a run did, and whether the job is complete; None removes what an earlier run wrote."""
        if report is None:
            self._storage.remove(f"{name}.json")
            return
        complete = self._storage.sizes("").get("manifest.json") is not None
        value = {**dataclasses.asdict(report), "complete": complete}
        with self._storage.making():
            self._storage.write(f"{name}.json", json.dumps(value, indent=1).encode() + b"\n")


def _name(unit: Unit | int) -> str:
    return f"part-{unit if isinstance(unit, int) else unit.index:06d}"


def _check_apart(input_path: str, storage: Storage) -> None:
    """An output among the input's files would become input."""
    if _address(storage.place).is_relative_to(_address(input_path)):
        raise BatchError(f"the output {storage.place!r} lies in the input; give another output")


def _address(place: str) -> PurePosixPath:
    """Kind of file system and path."""
    filesystem, path = url_to_fs(place)
    is_local = isinstance(filesystem, LocalFileSystem)
    return PurePosixPath(type(filesystem).__name__, (os.path.realpath(path) if is_local else path).strip("/"))


def _claim(storage: Storage, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``job.json`` says if it is this job and made; None if there is nothing yet.

    Raises:
      BatchError: the output is another job's, or of something else.
    """
    names = storage.sizes("")  # first: a run that begins meanwhile writes job.json before all else
    data = storage.read("job.json")
    if data is None:
        if names:
            some = ", ".join(sorted(names)[:3])
            raise BatchError(
                f"the output {storage.place!r} holds something that is not of this job (there is no job.json in it, "
                f"but {some}); give another output"
            )
        return None
    try:
        found = json.loads(data)
        kept = found["rows_per_part"]
    except (ValueError, KeyError, TypeError) as error:
        raise BatchError(f"can't read {storage.place}/job.json, which says whose answers these are: {error}") from error
    if "units.jsonl" not in names:  # it was not made to its end
        return None
    if found != {**identity, "rows_per_part": identity["rows_per_part"] or kept}:
        wanted = {**identity, "rows_per_part": identity["rows_per_part"] or kept}
        raise BatchError(
            f"the output {storage.place!r} is of another job (it differs in {', '.join(differences(found, wanted))}); "
            "give another output, or the same input, model and options as before"
        )
    return found


def _make(source: Source, storage: Storage, identity: Mapping[str, Any]) -> None:
    storage.write("job.json", json.dumps(identity, indent=2, sort_keys=True).encode() + b"\n")
    storage.write_with(
        "units.jsonl",
        lambda file: file.writelines(
            json_line(dataclasses.asdict(unit)) for unit in _checked(source.units(identity["rows_per_part"]))
        ),
    )


def _checked(units: Iterable[Unit]) -> Iterator[Unit]:
    next_row = 0
    for number, unit in enumerate(units):
        if (unit.index, unit.first_row) != (number, next_row):
            raise RuntimeError(f"unit {number} must begin at row {next_row}, got {unit}")
        next_row += unit.num_rows
        yield unit
