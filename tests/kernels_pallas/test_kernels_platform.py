"""Implementations by name: a name that is not there is an error, never another implementation."""

import jax.numpy as jnp
import pytest

from kernels_pallas import interval_attention, paged_attention, platform

IMPLEMENTATIONS = {"xla": len, "reference": sum}


def test_kernels_platform_selects_by_name():
    assert platform.select("reference", IMPLEMENTATIONS) is sum
    assert platform.select("xla", IMPLEMENTATIONS) is len


def test_kernels_platform_default_is_xla():
    assert platform.select(None, IMPLEMENTATIONS) is len


@pytest.mark.parametrize("name", ["triton", "", "XLA"])
def test_kernels_platform_unknown_name_lists_what_there_is(name):
    with pytest.raises(ValueError, match=f"no implementation '{name}'; there are reference, xla"):
        platform.select(name, IMPLEMENTATIONS)


def test_kernels_platform_ops_refuse_an_unknown_implementation():
    q, bound = jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="no implementation 'mosaic'"):
        interval_attention(q, q, q, bound, bound, implementation="mosaic")
    pages, tables = jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="no implementation 'mosaic'"):
        paged_attention(q[0], pages, pages, tables, tables[0], bound[0], bound[0], implementation="mosaic")
