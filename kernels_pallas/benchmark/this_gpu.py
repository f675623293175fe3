"""A case on this machine's GPU: the Pallas kernels beside what JAX offers there, in wall time.

All arrays are bfloat16. Every contestant is compiled with `CALLS` calls in one program, one after the other, so
that what starting a program costs hardly counts; programs take turns until the time is over, and the least time is
told. A peer gets a case as it likes it best: causal attention by its flag, segments as a batch, other masks as an
array; pages with keys and values apart.
"""

# What a case has depends on its kind, which the names of cases tell and types do not.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.benchmark.cases import Case, Dense, Paged, Write
from kernels_pallas.interval_attention import interval_attention
from kernels_pallas.intervals import RowIntervals, to_mask
from kernels_pallas.paged_attention import paged_attention
from kernels_pallas.pages import join

__all__ = ["CALLS", "contestants", "repeated", "report", "time_in_turns"]

CALLS = 8
TOLERANCE = 3e-2
"""Between two results, of the largest number in them."""
OURS = "ours"

Contestants = dict[str, tuple[Callable, tuple]]


def report(case: Case, *, peers: bool = True, seconds: float = 5) -> dict[str, Any]:
    """Milliseconds a call, what that is in TFLOP/s and GB/s, and the peers' times as ratios to it.

    Raises:
      AssertionError: a peer's result is another.
    """
    if isinstance(case, Write):
        return {"reason": "kv_write is XLA's scatter on GPUs"}
    found = contestants(case)
    if not peers:
        found = {OURS: found[OURS]}
    programs, results, failed = {}, {}, {}
    for name, (function, arguments) in found.items():
        try:
            # Compiled now; a peer says here what it can't do.
            program = jax.jit(repeated(function)).lower(*arguments).compile()
            results[name] = jax.block_until_ready(program(*arguments))
        except Exception as error:
            if name == OURS:
                raise
            failed[name] = {"reason": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            continue
        programs[name] = partial(program, *arguments)
    for name in results.keys() - {OURS}:
        jax.tree.map(partial(_assert_close, name), results[OURS], results[name])
    times = time_in_turns(programs, seconds)
    ms = times.pop(OURS) / CALLS * 1e3
    line = {
        "unit": "ms",
        "device": jax.devices()[0].device_kind,
        "wall": round(ms, 4),
        "tflops": round(case.flops() / ms / 1e9, 1),
        "gb_per_s": round(case.bytes() / ms / 1e6, 1),
    }
    if not peers:
        return line
    measured = {
        name: {"wall": round(wall / CALLS * 1e3, 4), "ratio": round(wall / CALLS * 1e3 / ms, 3)}
        for name, wall in times.items()
    }
    return line | {"peers": {name: measured.get(name) or failed[name] for name in found if name != OURS}}


def repeated(function: Callable, calls: int = CALLS) -> Callable:
    """``function``, so many times, one call after the other.

    Each call's first argument hangs on the last result by one number, or else the compiler would make one call of all.
    """

    def many(first, *others):
        out = None
        for _ in range(calls):
            out = function(first, *others)
            infinite = jnp.isposinf(jax.tree.leaves(out)[0].ravel()[0])  # never, which only we know
            corner = (0,) * first.ndim
            first = first.at[corner].set(first[corner] + infinite.astype(first.dtype))
        return out

    return many


def time_in_turns(programs: dict[str, Callable], seconds: float) -> dict[str, float]:
    """Least wall time of each in seconds; they take turns, five at least."""
    least = dict.fromkeys(programs, float("inf"))
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 5 or time.perf_counter() < end:
        rounds += 1
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program())
            least[name] = min(least[name], time.perf_counter() - begin)
    return least


def contestants(case: Dense | Paged) -> Contestants:
    """Functions by name, each with its arguments; "ours" among them."""
    return _dense(case) if isinstance(case, Dense) else _paged(case)


def _assert_close(name: str, a, b) -> None:
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    bound = TOLERANCE * max(1.0, float(np.abs(a).max()))
    np.testing.assert_allclose(b, a, rtol=0, atol=bound, err_msg=name)


def _normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)


def _dense(case: Dense) -> Contestants:
    rng = np.random.default_rng(0)
    B, T, N, K, H = case.batch, case.length, case.num_heads, case.num_kv_heads, case.head_dim
    q, k, v, d_out = (_normal(rng, B, T, n, H) for n in (N, K, K, N))
    rows = case.intervals()

    def finished(function):
        if not case.backward:
            return lambda *x: function(*x[:-1])
        return lambda q, k, v, *rest: jax.vjp(lambda *x: function(*x, *rest[:-1]), q, k, v)[1](rest[-1])

    ours = finished(partial(interval_attention, implementation="pallas_gpu"))
    found = {OURS: (ours, (q, k, v, *map(jnp.asarray, rows), d_out))}
    segment = rows.stop[0, -1] - rows.start[0, -1]
    mask = None
    if case.mask not in ("causal", "full", "packed"):
        mask = jnp.asarray(to_mask(RowIntervals(*(x[:1] for x in rows)), T))[:, None]

    def peer(implementation, q, k, v, *mask):
        options = dict(implementation=implementation, is_causal=case.mask in ("causal", "packed"))
        if case.mask == "packed":
            q, k, v = (x.reshape(-1, segment, *x.shape[2:]) for x in (q, k, v))
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[0] if mask else None, **options)
        return out.reshape(B, T, N, H)

    for name in ("cudnn", "xla"):
        arguments = (q, k, v, d_out) if mask is None else (q, k, v, mask, d_out)
        found[f"dot_product_attention, {name}"] = (finished(partial(peer, name)), arguments)
    return found


def _paged(case: Paged) -> Contestants:
    rng = np.random.default_rng(0)
    R, M, K, H = len(case.requests), case.pages_per_request, case.num_kv_heads, case.head_dim
    start, stop = case.intervals()
    q = _normal(rng, len(start), case.num_heads, H)
    k, v = (_normal(rng, R * M, case.page_size, K, H) for _ in range(2))
    pages = join(k, v, 2 * H).transpose(0, 2, 1, 3)
    tables = jnp.asarray(rng.permutation(R * M).reshape(R, M), jnp.int32)
    ints = (tables, *(jnp.asarray(x, jnp.int32) for x in (case.tile_request(), start, stop)))
    ours = partial(paged_attention, decode_rows=case.decode_rows, implementation="pallas_gpu")
    found = {OURS: (ours, (q, pages, *ints))}
    if case.decode_rows == len(start):
        k, v = (x.transpose(2, 0, 1, 3) for x in (k, v))
        if case.window is None:
            found["pallas.ops.gpu.paged_attention"] = (_decode_peer, (q, k, v, tables, jnp.asarray(stop)))
    return found


def _decode_peer(q, k, v, tables, lengths):
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as peer

    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    return peer(scaled, k, v, tables, lengths)
