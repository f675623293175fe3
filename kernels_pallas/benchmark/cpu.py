"""A case on this machine's CPU: the XLA implementations beside `jax.nn.dot_product_attention` with the same mask.

Both are compiled first, then take turns until the time is over, so that other work on the machine changes the ratios
little. For pages, the peer gathers each request's keys and then attends, from pages laid out as it likes them best:
keys and values apart, ``[P, page_size, K, H]``. All arrays are float32.
"""

# What a case has depends on its kind, which the names of cases tell and types do not.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.benchmark.cases import Case, Dense, Paged, Write
from kernels_pallas.interval_attention import interval_attention
from kernels_pallas.kv_write import kv_write
from kernels_pallas.paged_attention import paged_attention
from kernels_pallas.pages import join

__all__ = ["contestants", "measure", "report", "trained"]

PEER = "jax.nn.dot_product_attention"
SHARE = 4
"""Of many equal requests, one in so many is measured."""

ours = partial(interval_attention, implementation="xla")


def report(case: Case, *, peers: bool = True, seconds: float = 5) -> dict[str, Any]:
    """Least wall and mean processor time in milliseconds, and the peer's as ratios to them (above 1: ours is faster).

    Raises:
      AssertionError: the two don't agree.
    """
    part = _part(case)
    if isinstance(part, Write):
        wall, cpu = _measure_in_place(part, seconds)
    else:
        functions, arguments = contestants(part)
        (wall, cpu), *other = measure(functions if peers else functions[:1], arguments, seconds)
    line = {"unit": "ms", "wall": round(wall * 1e3, 3), "processor": round(cpu * 1e3, 3), "part": _sizes(part)}
    if not peers:
        return line
    if isinstance(part, Write):
        return line | {"peers": {PEER: {"reason": "writes no pages"}}}
    peer_wall, peer_cpu = other[0]
    found = {"wall": round(peer_wall * 1e3, 3), "processor": round(peer_cpu * 1e3, 3)}
    ratios = {"ratio": round(peer_wall / wall, 3), "processor_ratio": round(peer_cpu / cpu, 3)}
    return line | {"peers": {PEER: found | ratios}}


def contestants(case: Dense | Paged) -> tuple[list[Callable], tuple]:
    """Our function and the peer's, and arguments for both."""
    if isinstance(case, Paged):
        return [partial(_ours_paged, case), partial(_peer_paged, case)], _paged(case)
    both = [ours, peer]
    return [trained(x) for x in both] if case.backward else both, _dense(case)


def measure(functions: Sequence[Callable], args, seconds: float) -> list[tuple[float, float]]:
    """Least wall and mean processor time of a call of each function, in seconds; they take turns.

    Raises:
      AssertionError: their results differ by more than one in a thousand.
    """
    functions = [jax.jit(function) for function in functions]
    results = [jax.block_until_ready(function(*args)) for function in functions]
    for other in results[1:]:
        for a, b in zip(*map(jax.tree.leaves, (results[0], other)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    least, total = ([start] * len(functions) for start in (np.inf, 0.0))
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        rounds += 1
        for i, function in enumerate(functions):
            wall, processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(function(*args))
            least[i] = min(least[i], time.perf_counter() - wall)
            total[i] += time.process_time() - processor
    return [(wall, processor / rounds) for wall, processor in zip(least, total, strict=True)]


def trained(function: Callable, *, mapped: bool = False) -> Callable:
    """Forward and backward, as in training; ``mapped`` over single sequences by `jax.vmap`."""

    def one(*row):
        return function(*(x[None] for x in row))[0]

    def loss(q, k, v, start, stop):
        out = (jax.vmap(one) if mapped else function)(q, k, v, start, stop)
        return jnp.sum(jnp.square(out))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def peer(q, k, v, start, stop):
    """JAX's own attention under the mask of the intervals."""
    keys = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, None]
    mask = (start[:, None, :, None] <= keys) & (keys < stop[:, None, :, None])
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def _ours_paged(case: Paged, q, k_pages, v_pages, pages, block_tables, tile_request, start, stop):
    del k_pages, v_pages
    operands = q, pages, block_tables, tile_request, start, stop
    return paged_attention(*operands, decode_rows=case.decode_rows, implementation="xla")


def _peer_paged(case: Paged, q, k_pages, v_pages, pages, block_tables, tile_request, start, stop):
    """Gather every request's keys, then JAX's own attention, once for all requests of equally many rows."""
    del pages, tile_request
    outs, row, request = [], 0, 0
    counts = [rows for _, rows in case.requests]
    for rows in sorted(set(counts)):
        R = counts.count(rows)
        tables = block_tables[request : request + R]
        k, v = (x[tables].reshape(R, -1, *x.shape[2:]) for x in (k_pages, v_pages))
        part = [x[row : row + R * rows].reshape(R, rows, *x.shape[1:]) for x in (q, start, stop)]
        outs.append(peer(part[0], k, v, *part[1:]).reshape(-1, *q.shape[1:]))
        row, request = row + R * rows, request + R
    return jnp.concatenate(outs)


def _part(case: Case) -> Case:
    """What takes a second or less here."""
    if not isinstance(case, Paged):
        return case.part
    if case.parts > 1:
        return case.part
    shared = [request for kind in sorted(set(case.requests), key=lambda x: x[1]) for request in _share(case, kind)]
    return dataclasses.replace(case, requests=tuple(shared))


def _share(case: Paged, kind) -> list:
    same = [request for request in case.requests if request == kind]
    return same[:: SHARE if len(same) >= SHARE else 1]


def _sizes(part: Case) -> dict[str, Any]:
    sizes = {name: value for name, value in dataclasses.asdict(part).items() if name not in ("about", "parts", "whole")}
    if "requests" in sizes:
        kinds = sorted(set(part.requests), key=lambda x: x[1])
        sizes["requests"] = [f"{part.requests.count(kind)} of {kind[0]} keys, {kind[1]} new" for kind in kinds]
    return sizes


def _dense(case: Dense):
    rng = np.random.default_rng(0)
    B, T, H = case.batch, case.length, case.head_dim
    heads = case.num_heads, case.num_kv_heads, case.num_kv_heads
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in heads)
    return q, k, v, *(jnp.asarray(x) for x in case.intervals())


def _paged(case: Paged):
    rng = np.random.default_rng(0)
    R, M, K, H = len(case.requests), case.pages_per_request, case.num_kv_heads, case.head_dim
    start, stop = case.intervals()
    q = jnp.asarray(rng.normal(size=(len(start), case.num_heads, H)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(R * M, case.page_size, K, H)), jnp.float32) for _ in range(2))
    pages = join(k, v, 2 * H).transpose(0, 2, 1, 3)
    tables = rng.permutation(R * M).reshape(R, M)
    return q, k, v, pages, *(jnp.asarray(x, jnp.int32) for x in (tables, case.tile_request(), start, stop))


def _measure_in_place(case: Write, seconds: float) -> tuple[float, float]:
    """As `measure`, with pages that each call takes over from the one before."""
    rng = np.random.default_rng(0)
    K, H, slots = case.num_kv_heads, case.head_dim, jnp.asarray(case.slots())
    k, v = (jnp.asarray(rng.normal(size=(len(slots), K, H)), jnp.float32) for _ in range(2))
    pages = jnp.zeros((len(case.requests) * case.pages_per_request, K, case.page_size, 2 * H), jnp.float32)
    write = jax.jit(partial(kv_write, implementation="xla"), donate_argnums=0)
    pages = jax.block_until_ready(write(pages, k, v, slots))
    walls, begin, end = [], time.process_time(), time.perf_counter() + seconds
    while len(walls) < 5 or time.perf_counter() < end:
        wall = time.perf_counter()
        pages = jax.block_until_ready(write(pages, k, v, slots))
        walls.append(time.perf_counter() - wall)
    return min(walls), (time.process_time() - begin) / len(walls)
