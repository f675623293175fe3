"""Strictness for every test: ranks and dtypes never promote in silence, warnings are errors (pyproject)."""

import os
import pickle
import tempfile

import haste

# Compiled programs are kept for this run alone, and not among the user's.
_PROGRAMS = tempfile.TemporaryDirectory(prefix="aphrodite-jax-programs-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_GIVEN_FLAGS = os.environ.get("XLA_FLAGS")
if _GIVEN_FLAGS is None:
    os.environ["XLA_FLAGS"] = haste.FLAGS

# ruff: noqa: E402 - what follows reads the environment when it is imported
import filelock
import jax
import llava_files
import pytest

from aphrodite_jax import architectures

jax.devices()  # reads the flags, once
if _GIVEN_FLAGS is None:
    os.environ.pop("XLA_FLAGS")  # not for what tests start

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_modifyitems(items):
    """Kernels are marked as such; most of what is compiled for TPUs and GPUs is compiled under one version of jax."""
    for item in items:
        if item.path.parent.name == "kernels_pallas":
            item.add_marker(pytest.mark.kernels)
            if "compiles" in item.name and not any(word in item.name for word in ("v6e", "sizes", "mesh")):
                item.add_marker(pytest.mark.once)


@pytest.fixture(autouse=True)
def own_architectures(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(architectures, "_TABLE", dict(architectures._TABLE))


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """A LLaVA's files without its weights."""
    return llava_files.write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def computed_once(tmp_path_factory):
    """``computed_once(name, compute)``: a value that takes long, computed by one process for all that test; pickled."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent

    def value(name, compute):
        path = directory / f"{name}.pickle"
        with filelock.FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_bytes(pickle.dumps(compute()))
        return pickle.loads(path.read_bytes())

    return value
