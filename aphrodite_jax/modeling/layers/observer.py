"""A look into a decoder while it runs: hidden states between its layers, and what its rows attend to.

    observer = Observer(attention_layers=[0], attention_rows=rows)
    with observing(observer):
        model(...)
    observer.hidden_states, observer.attention

A decoder layer is one that calls `attend`; `call_layer` and `attend` report here. What is seen belongs to the trace in
which it was seen, so it is returned from the function that is compiled. Without an observer nothing of this exists in a
program.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxtyping import Array, Float, Int

from aphrodite_jax.errors import RegistrationError
from kernels_pallas.interval_attention.reference import attention_weights
from kernels_pallas.intervals import RowIntervals

__all__ = ["Observer", "current_observer", "observing"]


class Observer:
    """What it saw, layer by layer.

    Args:
      attention_layers: decoder layers, from 0, whose attention is kept.
      attention_rows: ``[rows]`` query rows of which it is kept.

    Attributes:
      hidden_states: before each decoder layer and behind the last one, ``[T, D]``; wider where rows of media carry
        what is for deeper layers, the hidden states first.
      attention: layer to weights ``[N, rows, S]``, float32.
    """

    def __init__(self, *, attention_layers: Sequence[int] = (), attention_rows: Int[Array, " rows"] | None = None):
        self.hidden_states: list[Float[Array, "T D"]] = []
        self.attention: dict[int, Float[Array, "N rows S"]] = {}
        self._layers, self._rows = frozenset(attention_layers), attention_rows
        self._num_attended = 0

    def check(self) -> None:
        """Refuse a model of which not every decoder layer was seen from outside.

        Raises:
          RegistrationError: a layer attends without `attend`, or was not called by `call_layer`.
        """
        if not self._num_attended or len(self.hidden_states) != self._num_attended + 1:
            raise RegistrationError(
                "only decoder layers that attend by `attend` and are called by `call_layer` can be looked into; "
                f"{self._num_attended} attended, {max(len(self.hidden_states) - 1, 0)} were called so"
            )

    def call(self, layer: Callable, args: tuple) -> Any:
        """``layer(*args)``; if it attends, its input and what it makes of it are kept."""
        before = self._num_attended
        result = layer(*args)
        if self._num_attended > before:
            self.hidden_states[-1:] = [args[0], result[0]]  # what comes between two layers is the second one's input
        return result

    def see_attention(
        self,
        q: Float[Array, "T N H"],
        k: Float[Array, "S K H"],
        intervals: RowIntervals,
        *,
        scale: float | None,
        soft_cap: float | None,
    ) -> None:
        """The attention of the next decoder layer."""
        if self._num_attended in self._layers:
            rows = self._rows
            assert rows is not None, "kept for some rows"
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            start, stop = (x[rows][None] for x in intervals)
            weights, _ = attention_weights(q[rows][None], k[None], start, stop, scale=scale, soft_cap=soft_cap)
            self.attention[self._num_attended] = weights[0]
        self._num_attended += 1


_CURRENT: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("observer", default=None)


def current_observer() -> Observer | None:
    """The one that looks on, if any does."""
    return _CURRENT.get()


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Let it look on as models are called in this thread."""
    token = _CURRENT.set(observer)
    try:
        yield
    finally:
        _CURRENT.reset(token)
