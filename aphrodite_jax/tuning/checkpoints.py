"""What a run needs to go on where it ended: parameters that are trained, the optimizer's state, the losses so far.

A checkpoint also says whose it is. What can't be told from a directory with another run's checkpoints is refused.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from aphrodite_jax.errors import CheckpointError

__all__ = ["Checkpoints", "checksum", "digest"]

KEPT = 3
"""Checkpoints in a directory; older ones are removed."""


class Checkpoints:
    """The checkpoints of one run in a directory (orbax's `CheckpointManager`); each is there as a whole or not at all.

    Args:
      directory: made if it is not there.
      setup: what makes the run the one that it is, as values that JSON has.
    """

    def __init__(self, directory: str | os.PathLike, setup: Mapping[str, Any]):
        self._directory = Path(directory).expanduser().resolve()
        self._setup = dict(setup)
        # In the background, it would read arrays that the next step gives away.
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        self._manager.close()

    def save(self, state: Any, losses: list[float]) -> None:
        """Keep a tree of arrays as it is after ``len(losses)`` steps."""
        kept = _numbered(state) | {"losses": np.array(losses, np.float32)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(kept), setup=ocp.args.JsonSave(self._setup))
        self._manager.save(len(losses), args=args)

    def restore(self, state: Any, *, num_steps: int) -> tuple[Any, list[float]]:
        """The latest state and its losses; ``state`` as it is, and no losses, where there is no checkpoint.

        Raises:
          CheckpointError: the directory holds checkpoints of another run, or of one that went beyond ``num_steps``.
        """
        step = self._manager.latest_step()
        if step is None:
            return state, []
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(setup=ocp.args.JsonRestore()))["setup"]
        except Exception as error:  # of many types, as what lies in the directory may be anything
            raise CheckpointError(f"{self._directory} has a checkpoint that can't be read: {error}") from error
        if differences := _differences(found, self._setup):
            raise CheckpointError(
                f"{self._directory} has a checkpoint of another run: {'; '.join(differences)}. Give what that run had, "
                "or another checkpoint_dir"
            )
        if step > num_steps:
            raise CheckpointError(
                f"{self._directory} has a checkpoint after {step} steps, past num_steps {num_steps}: raise it, or give "
                "another checkpoint_dir"
            )
        wanted = _numbered(jax.tree.map(_described, state)) | {"losses": jax.ShapeDtypeStruct((step,), np.float32)}
        kept = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))["state"]
        losses = np.asarray(kept.pop("losses")).tolist()
        leaves = [kept[name] for name in sorted(kept)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), losses


def checksum(tree: Any) -> str:
    """A short text that differs where a tree of arrays has other bits, shapes or dtypes: of sums of bits."""
    leaves = jax.tree.leaves(tree)
    sums = jax.device_get(_sums(leaves))
    return digest([(x.shape, str(x.dtype), int(total)) for x, total in zip(leaves, sums, strict=True)])


def digest(value: Any) -> str:
    """A short text for the text of ``value``."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


@jax.jit
def _sums(leaves):
    def total(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)  # sums of whole numbers hang on no order

    return [total(x) for x in leaves]


def _numbered(tree: Any) -> dict[str, Any]:
    """The leaves by number: what names they have is up to the libraries that made the tree."""
    return {f"{number:06}": leaf for number, leaf in enumerate(jax.tree.leaves(tree))}


def _described(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _differences(found: Any, wanted: Mapping[str, Any]) -> list[str]:
    found = found if isinstance(found, Mapping) else {}
    return [
        f"{name} was {_short(found.get(name))}, is {_short(value)}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({digest(value)})"
