"""Arrays that a TPU kernel copies from by itself, kept where they are."""

import jax
from jax.core import Tracer
from jax.experimental.pallas import tpu as pltpu

__all__ = ["stay_in_main_memory"]


def stay_in_main_memory(array: jax.Array, *, unless: bool) -> jax.Array:
    """``array`` as an operand that XLA may not place in VMEM.

    Where a layer's pages are few enough to fit there, it would copy them all in before a kernel that reads a few of
    them, and all out behind one that writes a few.

    Args:
      unless: nothing is asked of XLA, as where the kernel is interpreted, or measured with such placements forbidden.
    """
    if unless or not isinstance(array, Tracer):  # each kernel that is called by itself is a program of its own
        return array
    return pltpu.with_memory_space_constraint(array, pltpu.HBM)
