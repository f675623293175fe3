"""Implementations by name and by platform: a name that is not there is an error, never another implementation."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import interval_attention, kv_write, paged_attention, platform

IMPLEMENTATIONS = {"xla": len, "reference": sum}
WITH_KERNELS = IMPLEMENTATIONS | {"pallas_tpu": min, "pallas_gpu": max}
MACHINES = [
    ("cpu", SimpleNamespace(), "xla"),
    ("tpu", SimpleNamespace(), "pallas_tpu"),
    ("gpu", SimpleNamespace(compute_capability="7.5"), "xla"),  # T4
    ("gpu", SimpleNamespace(compute_capability="8.0"), "pallas_gpu"),
    ("gpu", SimpleNamespace(compute_capability="8.9"), "pallas_gpu"),
    ("cuda", SimpleNamespace(compute_capability="10.0"), "pallas_gpu"),
    ("gpu", SimpleNamespace(compute_capability="gfx942"), "xla"),  # ROCm
    ("gpu", SimpleNamespace(), "xla"),
]


@pytest.fixture
def on(monkeypatch):
    """Take another machine's backend and device for JAX's own."""

    def patch(backend, device):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        monkeypatch.setattr(jax, "local_devices", lambda: [device])

    return patch


def test_kernels_platform_selects_by_name(on):
    assert platform.select("reference", IMPLEMENTATIONS) is sum
    on("tpu", SimpleNamespace())
    assert platform.select("xla", WITH_KERNELS) is len


@pytest.mark.parametrize(("backend", "device", "name"), MACHINES)
def test_kernels_platform_default(on, backend, device, name):
    on(backend, device)
    assert platform.default() == name
    assert platform.select(None, WITH_KERNELS) is WITH_KERNELS[name]
    assert platform.select(None, IMPLEMENTATIONS) is len  # an op without a kernel of its own there


def test_kernels_platform_default_of_this_machine():
    assert platform.default() == "xla"


@pytest.mark.parametrize("name", ["triton", "", "XLA"])
def test_kernels_platform_unknown_name_lists_what_there_is(name):
    with pytest.raises(ValueError, match=f"no implementation '{name}'; there are reference, xla"):
        platform.select(name, IMPLEMENTATIONS)


def paged_arguments():
    q, pages = jnp.zeros((2, 1, 4)), jnp.zeros((1, 1, 2, 8))
    tables, bound = jnp.zeros((1, 1), jnp.int32), jnp.zeros(2, jnp.int32)
    return q, pages, tables, tables[0], bound, bound


def test_kernels_platform_ops_refuse_an_unknown_implementation():
    q, bound = jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="no implementation 'mosaic'"):
        interval_attention(q, q, q, bound, bound, implementation="mosaic")
    with pytest.raises(ValueError, match="no implementation 'mosaic'"):
        paged_attention(*paged_arguments(), implementation="mosaic")
    slots = jnp.arange(2, dtype=jnp.int32)
    with pytest.raises(ValueError, match="no implementation 'mosaic'"):
        kv_write(jnp.zeros((1, 1, 2, 8)), q[0], q[0], slots, implementation="mosaic")


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_kernels_platform_interpret_is_for_kernels(name):
    message = f"implementation '{name}' is not one"
    with pytest.raises(ValueError, match=message):
        paged_attention(*paged_arguments(), implementation=name, interpret=True)
    rows, slots = jnp.zeros((2, 1, 4)), jnp.arange(2, dtype=jnp.int32)
    with pytest.raises(ValueError, match=message):
        kv_write(jnp.zeros((1, 1, 2, 8)), rows, rows, slots, implementation=name, interpret=True)
