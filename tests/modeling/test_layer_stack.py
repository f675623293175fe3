"""A stack of equal layers is traced for one of them, and gives what its layers give one after another."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aphrodite_jax.modeling.layers.stack import call_layer, in_parts

WIDTH = 8


class Scale(nnx.Module):
    def __init__(self, power: int, traces: list, rngs: nnx.Rngs):
        self.power, self.kernel = power, nnx.Param(rngs.params.normal((WIDTH,)))
        self._count = traces.append

    def __call__(self, x, extra):
        self._count(self.power)
        return x * self.kernel[...][None] ** self.power + extra["bias"], extra


@pytest.mark.parametrize(("powers", "traced"), [((1, 1, 1), [1]), ((1, 2, 1, 2), [1, 2])], ids=["equal", "two kinds"])
def test_each_structure_is_traced_once(powers, traced):
    traces = []
    layers = [Scale(power, traces, nnx.Rngs(index)) for index, power in enumerate(powers)]
    x, bias = jnp.ones((3, WIDTH)), jnp.full((3, WIDTH), 2.0)

    def stack(x, bias):
        for layer in layers:
            x, _ = call_layer(layer, x, {"bias": bias})
        return x

    result = jax.jit(stack)(x, bias)
    assert traces == traced
    expected = np.asarray(x)
    for layer in layers:
        expected = expected * np.asarray(layer.kernel[...]) ** layer.power + 2.0
    chex.assert_trees_all_close(result, expected, rtol=1e-6)


def test_gradients_reach_every_layer():
    layers = nnx.List(Scale(1, [], nnx.Rngs(index)) for index in range(2))
    graphdef, state = nnx.split(layers)

    def loss(state):
        x = jnp.ones((1, WIDTH))
        for layer in nnx.merge(graphdef, state):
            x, _ = call_layer(layer, x, {"bias": jnp.zeros((1, WIDTH))})
        return x.sum()

    first, second = (np.asarray(layer.kernel[...]) for layer in layers)
    got = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.grad(loss)(state))]
    chex.assert_trees_all_close(got, [second, first], rtol=1e-6)


def test_items_a_few_at_a_time():
    sizes = []

    def double(x):
        sizes.append(len(x))
        return 2 * x[:, :1]

    for count in (1, 4, 5, 8, 11):
        x = jnp.arange(3 * count).reshape(count, 3)
        np.testing.assert_array_equal(in_parts(double, x, 4), 2 * x[:, :1])
    assert max(sizes) == 4
