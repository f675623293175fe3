"""Compiled programs on disk, to be read where the same ones would be compiled.

    DIR/3f2a.../made_for.json         what the programs hang on: versions, devices, model, options
    DIR/3f2a.../decode-91c0....bin    one program

JAX's own cache of compiled programs needs each program traced and lowered before it knows whether it has it, and knows
nothing of those that were compiled for devices that are not there. Here a program is known by its name, its bucket and
the shapes of its arguments, and all else that could change it by the name of its folder.

The files are pickles: reading one can run any code, so a directory must be one's own.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import pickle
import tempfile
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding

import kernels_pallas
from aphrodite_jax.config import EngineConfig, ModelConfig
from aphrodite_jax.errors import ConfigError

__all__ = ["SavedProgram", "SavedPrograms", "identity"]

MADE_FOR = "made_for.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedProgram:
    """A compiled program and its bytes on the device, as `executor.programs.CompiledProgram`."""

    call: Any
    temp_bytes: int
    code_bytes: int


class SavedPrograms:
    """The programs that a directory has for one model on certain devices.

    Args:
      directory: where programs of any models and devices are kept side by side; made if it is not there.
      made_for: all that a program hangs on beside its name, bucket and arguments, by name.
      devices: that programs are read for, in the mesh's order.

    Raises:
      ConfigError: the directory can't be written.
    """

    def __init__(self, directory: str | Path, made_for: Mapping[str, str], devices: Sequence[Any]):
        self._made_for = dict(made_for)
        self._devices = list(devices)
        self._directory = Path(directory).expanduser()
        self._folder = self._directory / _digest(sorted(self._made_for.items()))
        self._warned = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self._folder, os.W_OK):
                raise PermissionError(f"no right to write in {self._folder}")
        except OSError as error:
            raise ConfigError(f"compiled programs can't be kept in {directory}: {error}; set programs_dir") from error
        manifest = self._folder / MADE_FOR
        if not manifest.exists():
            self._warn_of_others()
            _write(manifest, json.dumps(self._made_for, indent=1).encode())

    def read(self, name: str, key: Hashable, args: tuple, donate: Sequence[int]) -> SavedProgram | None:
        """A program; None where it is not there, or, with one warning for all, where it can't be read."""
        path = self._path(name, key, args, donate)
        if not path.exists():
            return None
        try:
            stored = pickle.loads(path.read_bytes())
            in_tree = jax.tree.structure((args, {}))
            call = serialize_executable.deserialize_and_load(
                stored["program"], in_tree, stored["out_tree"], execution_devices=self._devices
            )
        except Exception as error:  # files that were cut short or changed fail in many ways
            self._warn(f"{path} can't be read ({type(error).__name__}: {error}); it is compiled again")
            return None
        return SavedProgram(call=call, temp_bytes=stored["temp_bytes"], code_bytes=stored["code_bytes"])

    def write(self, name: str, key: Hashable, args: tuple, donate: Sequence[int], program: SavedProgram) -> None:
        """Put a program there; with a warning, nothing where the devices' programs can't be saved."""
        try:
            serialized, _, out_tree = serialize_executable.serialize(program.call)
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            self._warn(f"program {name!r} can't be saved in {self._directory}: {error}")
            return
        stored = {
            "program": serialized,
            "out_tree": out_tree,
            "temp_bytes": program.temp_bytes,
            "code_bytes": program.code_bytes,
        }
        _write(self._path(name, key, args, donate), pickle.dumps(stored))

    def _path(self, name: str, key: Hashable, args: tuple, donate: Sequence[int]) -> Path:
        leaves = [
            (jax.tree_util.keystr(path), x.shape, str(x.dtype), _layout(x))
            for path, x in jax.tree_util.tree_leaves_with_path(args)
        ]
        return self._folder / f"{name}-{_digest((key, leaves, tuple(donate)))}.bin"

    def _warn_of_others(self) -> None:
        """Say in what the programs that are there differ, if there are any."""
        others = [json.loads(path.read_text()) for path in self._directory.glob(f"*/{MADE_FOR}")]
        if others:
            nearest = min(others, key=lambda other: len(_differences(self._made_for, other)))
            differences = _differences(self._made_for, nearest)
            self._warn(f"none of the programs in {self._directory} fits: {'; '.join(differences)}; they are compiled")

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def identity(
    model_cls: type, dtype: Any, model_config: ModelConfig, engine_config: EngineConfig, mesh: Mesh | None
) -> dict[str, str]:
    """All that a model's programs hang on beside their names, buckets and arguments, by name."""
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    device = devices[0]
    return {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "compiler": device.client.platform_version,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "LIBTPU_INIT_ARGS": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "device": device.device_kind,
        "devices": str([device.id for device in devices]),
        "model": f"{model_cls.__qualname__} {_digest(model_config.hf_config.to_json_string())}",
        "dtype": str(dtype),
        "options": str((engine_config.max_num_seqs, engine_config.page_size, engine_config.encoder_parallel)),
        "source": f"{_digest_of_packages()} {_digest([_source(base) for base in model_cls.__mro__])}",
    }


@functools.cache
def _digest_of_packages() -> str:
    """Of what may stand in a program."""
    package = Path(__file__).parents[1]
    folders = [package / name for name in ("executor", "modeling", "sampling")]
    folders += map(Path, kernels_pallas.__path__)
    files = [path for folder in folders for kind in ("*.py", "*.json") for path in sorted(folder.rglob(kind))]
    return _digest([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])


def _source(cls: type) -> str:
    """Of a class's module, which may be anybody's."""
    try:
        return Path(inspect.getfile(cls)).read_text()
    except (TypeError, OSError):  # built in, or written in a notebook
        return cls.__qualname__


def _differences(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    return [f"{name} {_short(there.get(name))} there, {_short(here.get(name))} here" for name in names]


def _short(value: str | None) -> str:
    return "is not" if value is None else value if len(value) <= 40 else f"{value[:37]}..."


def _layout(array: Any) -> str:
    """Where an argument lies; arrays on one device are all alike, on a mesh or not."""
    sharding = getattr(array, "sharding", None)
    return str(sharding.spec) if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else ""


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:24]


def _write(path: Path, content: bytes) -> None:
    """All of a file or nothing, whoever else writes it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
