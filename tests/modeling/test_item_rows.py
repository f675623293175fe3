"""Rows of media are counted by shapes, and rows of another width than the embeddings are refused."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from aphrodite_jax.errors import ConfigError
from aphrodite_jax.modeling.item_rows import rows_counter


class Strips(nnx.Module):
    """Makes a row of every line of pixels."""

    def __init__(self, width: int):
        self.embed = nnx.Embed(7, 4, rngs=nnx.Rngs(0))
        self.project = nnx.Linear(6, width, rngs=nnx.Rngs(0))

    def embed_input_ids(self, ids):
        return self.embed(ids)

    def embed_multimodal(self, **arrays):
        return {modality: self.project(pixels) for modality, pixels in arrays.items()}


def test_rows_of_each_item_by_modality():
    count = rows_counter(Strips(4))
    pixels = jnp.zeros((2, 5, 6))
    assert count({"image": pixels, "video": pixels[:1, :3]}) == {"image": (5, 5), "video": (3,)}
    assert count({"image": jax.ShapeDtypeStruct((1, 8, 6), jnp.float32)}) == {"image": (8,)}


def test_rows_as_wide_as_embeddings_are_asked_for():
    count = rows_counter(Strips(5))
    with pytest.raises(ConfigError, match=r"Strips.embed_multimodal gave image rows of shape \(3, 5\); expected"):
        count({"image": jnp.zeros((1, 3, 6))})


def test_a_shape_is_asked_of_the_model_once_and_its_arrays_are_let_go():
    traced = []

    class Told(Strips):
        def embed_multimodal(self, **arrays):
            traced.append(arrays)
            return super().embed_multimodal(**arrays)

    model = Told(4)
    count = rows_counter(model)
    for array in jax.tree.leaves(nnx.state(model)):
        array.delete()
    for _ in range(3):
        assert count({"image": jnp.zeros((1, 2, 6))}) == {"image": (2,)}
    assert len(traced) == 1
