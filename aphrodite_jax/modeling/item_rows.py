"""How many rows a model makes of media, asked of it by shapes alone: nothing runs."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from aphrodite_jax.errors import ConfigError

__all__ = ["RowsPerItem", "rows_counter"]

RowsPerItem = Callable[[Mapping[str, Any]], Mapping[str, tuple[int, ...]]]
"""Arrays of media by keyword, to the rows of each item by modality."""


def rows_counter(model: nnx.Module) -> RowsPerItem:
    """What tells the rows that ``model`` makes of each item; it keeps no hold on the model's arrays.

    Args:
      model: a multimodal one, with weights or with their shapes.

    Returns:
      A function of mapped arrays, or of their shapes. It raises `ConfigError` where ``embed_multimodal`` gives anything
      but rows as wide as the model's token embeddings.
    """
    graphdef, state = nnx.split(model)
    state = jax.eval_shape(lambda x: x, state)
    model_name = type(model).__name__

    def embed(state, arrays):
        model: Any = nnx.merge(graphdef, state)
        token = model.embed_input_ids(jnp.zeros(1, jnp.int32))
        return token, {modality: list(items) for modality, items in model.embed_multimodal(**arrays).items()}

    @functools.lru_cache(maxsize=256)
    def of_shapes(shapes: tuple[tuple[str, tuple[int, ...], str], ...]) -> Mapping[str, tuple[int, ...]]:
        arrays = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in shapes}
        token, embeds = jax.eval_shape(embed, state, arrays)
        width = token.shape[-1]
        for modality, items in embeds.items():
            for item in items:
                if item.ndim != 2 or item.shape[1] != width:
                    raise ConfigError(
                        f"{model_name}.embed_multimodal gave {modality} rows of shape {item.shape}; "
                        f"expected [rows, {width}]"
                    )
        return {modality: tuple(item.shape[0] for item in items) for modality, items in embeds.items()}

    return lambda mm_kwargs: of_shapes(tuple((name, x.shape, str(x.dtype)) for name, x in sorted(mm_kwargs.items())))
