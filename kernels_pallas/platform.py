"""Which implementation of an op serves."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

__all__ = ["HOPPER", "capability", "default", "made_for", "refuse_interpret", "select", "tpu_reciprocal"]

FALLBACK = "xla"
"""Serves every platform."""
LEAST_CAPABILITY = 8
"""CUDA compute capability (its major number) from which the GPU kernels serve; T4 has 7.5."""
HOPPER = 9
"""The major number from which a warp group multiplies 64 rows at a time: H100, H200 and later."""

_TARGET: contextvars.ContextVar[Any] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def made_for(device: Any) -> Iterator[None]:
    """While a program is traced: it is for ``device``, which may be one that is compiled for and not there."""
    token = _TARGET.set(device)
    try:
        yield
    finally:
        _TARGET.reset(token)


def default() -> str:
    """Name of the implementation that is made for the device of `made_for`, or for JAX's default device.

    "pallas_tpu" on TPU, "pallas_gpu" on an NVIDIA GPU of compute capability 8.0 or more, otherwise "xla".
    """
    target = _TARGET.get()
    backend = jax.default_backend() if target is None else target.platform
    if backend == "tpu":
        return "pallas_tpu"
    if backend in ("gpu", "cuda") and (capability() or 0) >= LEAST_CAPABILITY:
        return "pallas_gpu"
    return FALLBACK


def capability() -> int | None:
    """Major CUDA compute capability of the same device; None where it is no NVIDIA GPU."""
    device = _TARGET.get()
    if device is None:
        device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(device, jax.Device):  # none is set, or a platform's name
            device = jax.local_devices()[0]
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]  # "gfx90a" on ROCm
    return int(major) if major.isdecimal() else None


def select(name: str | None, implementations: Mapping[str, Callable]) -> Callable:
    """The implementation called ``name``; None takes the platform's own, or "xla" where the op has none of its own.

    Raises:
      ValueError: no implementation has this name.
    """
    if name is None:
        own = default()
        name = own if own in implementations else FALLBACK
    if name not in implementations:
        raise ValueError(f"no implementation {name!r}; there are {', '.join(sorted(implementations))}")
    return implementations[name]


def refuse_interpret(name: str, interpret: bool) -> None:
    """For implementations that are no Pallas kernels.

    Raises:
      ValueError: ``interpret`` is asked of one.
    """
    if interpret:
        raise ValueError(f"interpret runs a Pallas kernel as plain JAX; implementation {name!r} is not one")


def tpu_reciprocal() -> Callable:
    """Pallas' reciprocal ``(x, *, approx)`` for TPU kernels: of its TPU module after jax 0.10, of Pallas before."""
    from jax.experimental import pallas
    from jax.experimental.pallas import tpu

    return getattr(tpu, "reciprocal", None) or pallas.reciprocal
