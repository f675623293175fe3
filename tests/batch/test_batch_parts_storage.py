"""Outputs at addresses, and runs that meet at one output: nothing half-written, nothing done twice by mistake."""

import io
import json
import signal
import subprocess
import sys

import fsspec
import jax
import pytest
from batch_fakes import FakeLLM, completion_line, write_requests
from fsspec.spec import AbstractBufferedFile

from aphrodite_jax.batch import open_parts, run_parts
from aphrodite_jax.batch.output import OutputHeld
from aphrodite_jax.batch.storage import LocalStorage, RemoteStorage
from aphrodite_jax.errors import BatchError
from aphrodite_jax.executor.processes import initialize

pytestmark = pytest.mark.once


@pytest.fixture
def opened(tmp_path):
    """Opens a job of 20 rows in two parts, at a directory or an address of its own."""
    llm = FakeLLM(tmp_path / "model")
    requests = write_requests(tmp_path / "requests.jsonl", [completion_line(f"r{i}", f"p{i}") for i in range(20)])

    def open_job(output, source=requests):
        return llm, open_parts(source, output, model_config=llm.model_config, rows_per_part=10)

    return open_job


def marks_and_parts(job):
    return {name: job._storage.read(name) for name in ("parts/part-000000.jsonl", "done/part-000000.json")}


def test_runs_of_one_machine_leave_each_other_s_parts_alone_at_an_address_too(opened):
    _, job = opened("memory://meet/out")
    _, other = opened("memory://meet/out")
    unit = next(job.units())
    work = job.take(unit)
    with pytest.raises(OutputHeld):
        other.take(unit)
    job.keep(work)
    other.keep(other.take(unit))


def test_a_part_that_another_machine_has_put_in_place_is_left_as_it_is(opened, monkeypatch):
    llm, job = opened("memory://mistake/out")
    _, other = opened("memory://mistake/out")
    unit = next(job.units())
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(llm.model_config.model))
    late = job.take(unit)  # with locks that the other run does not see
    monkeypatch.undo()
    run_parts(llm, other, show_progress=False)
    done = marks_and_parts(other)
    job.put_in_place(late)
    assert marks_and_parts(other) == done
    assert other.finish()


def test_a_run_that_begins_while_another_makes_the_job_joins_it(opened, tmp_path, monkeypatch):
    """The other's files come between its two looks at the output."""
    others = []

    def then_the_other(look):
        def looked(self, name):
            found = look(self, name)
            if not others:
                others.append(None)
                others.append(opened(tmp_path / "out")[1])
            return found

        return looked

    for name in ("read", "sizes"):
        monkeypatch.setattr(LocalStorage, name, then_the_other(getattr(LocalStorage, name)))
    _, job = opened(tmp_path / "out")
    assert job.identity == others[1].identity
    assert job.num_rows == 20


def test_an_output_in_the_input_is_refused_at_an_address_too(opened):
    memory = fsspec.filesystem("memory")
    memory.pipe("/inside/in/requests.jsonl", (json.dumps(completion_line("a", "b")) + "\n").encode())
    with pytest.raises(BatchError, match="lies in the input"):
        opened("memory://inside/in/out", "memory://inside/in/")
    opened("memory://inside/in-2", "memory://inside/in/")


class Bucket(fsspec.AbstractFileSystem):
    """As an object store: a file is there once it was closed."""

    objects: dict = {}  # noqa: RUF012

    def _open(self, path, mode="rb", **options):
        return Object(self, path, mode, block_size=5 * 2**20)

    def makedirs(self, path, exist_ok=False):
        pass


class Object(AbstractBufferedFile):
    def _initiate_upload(self):
        self.sent = b""

    def _upload_chunk(self, final=False):
        self.sent += self.buffer.getvalue()
        if final:
            Bucket.objects[self.path] = self.sent


class CutOff(io.BytesIO):
    """A file during whose reading a signal comes."""

    def read(self, size=-1):
        if self.tell() > 2**23:
            raise SystemExit(143)
        return super().read(size)


def test_a_file_whose_sending_is_cut_off_is_not_put_in_place():
    storage = RemoteStorage(Bucket(), "bucket/out", "bucket://bucket/out")
    storage._send(io.BytesIO(b"whole"), "a")
    with pytest.raises(SystemExit):
        storage._send(CutOff(bytes(2**24)), "units.jsonl")
    assert Bucket.objects == {"bucket/out/a": b"whole"}


def test_a_journal_of_a_part_that_is_done_goes_away(opened, tmp_path):
    """A run that was killed between the two leaves one; rows of a part whose mark is removed are answered again."""
    llm, job = opened(tmp_path / "out")
    run_parts(llm, job, show_progress=False)
    left = tmp_path / "out" / "journal" / "part-000001.jsonl"
    left.write_bytes(b'{"row": 10, "failure": {"row": 10}}\n')
    assert job.finish()
    assert not left.exists()


def test_a_process_that_was_told_to_end_does_so_whatever_is_left_to_wait_for():
    program = """
import os, signal, threading, time
from aphrodite_jax.batch.preemption import Preemption
with Preemption(leaves_within=0.5) as stop, stop.rows_run():
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=time.sleep, args=(60,)).start()
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=30, check=False)
    assert done.returncode == 128 + signal.SIGTERM


def test_processes_wait_for_the_last_of_them(monkeypatch):
    """JAX's five minutes would end a process that has more to do than the others."""
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: given.update(options))
    initialize("localhost:9911,2,1")
    assert given["shutdown_timeout_seconds"] >= 7 * 24 * 3600
    assert (given["num_processes"], given["process_id"]) == (2, 1)
