"""Attention on CPU beside `jax.nn.dot_product_attention` with the same mask, as ratios of time.

    python benchmarks/cpu_attention.py                  # all cases, about two minutes on an idle machine
    python benchmarks/cpu_attention.py tower decode     # cases whose name has one of these words
    python benchmarks/cpu_attention.py --seconds 10     # measure each case for longer

Both are compiled first, then take turns until the time is over; the least wall time and the mean processor time
of each count, so that other work on the machine changes the ratios little. Below 1 is faster than the peer. For
pages, the peer gathers each request's keys and then attends, from pages laid out as it likes them best: keys and
values apart, ``[P, page_size, K, H]``. The last line is the table as JSON.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import interval_attention, paged_attention
from kernels_pallas.pages import join


def peer(q, k, v, start, stop):
    """JAX's own attention under the mask of the intervals."""
    keys = jnp.arange(k.shape[1], dtype=jnp.int32)
    mask = (start[:, None, :, None] <= keys) & (keys < stop[:, None, :, None])
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def ours_paged(q, k_pages, v_pages, pages, block_tables, tile_request, start, stop):
    """The XLA form; one row a tile is decode."""
    del k_pages, v_pages
    decode_rows = len(q) if len(q) == len(tile_request) else 0
    return paged_attention(
        q, pages, block_tables, tile_request, start, stop, decode_rows=decode_rows, implementation="xla"
    )


def paged_peer(q, k_pages, v_pages, pages, block_tables, tile_request, start, stop):
    """Gather every request's keys, then JAX's own attention; all requests have equally many rows, in order."""
    del pages, tile_request
    R = len(block_tables)
    k, v = (x[block_tables].reshape(R, -1, *x.shape[2:]) for x in (k_pages, v_pages))
    rows = (x.reshape(R, -1, *x.shape[1:]) for x in (q, start, stop))
    q_rows, start, stop = rows
    return peer(q_rows, k, v, start, stop).reshape(q.shape)


def dense(B, T, N, K, H, *, causal):
    """Arguments of dense self-attention."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K))
    stop = np.arange(1, T + 1) if causal else np.full(T, T)
    start, stop = (jnp.asarray(np.broadcast_to(x, (B, T)), jnp.int32) for x in (np.zeros(T), stop))
    return q, k, v, start, stop


def paged(R, context, rows, tile_rows, N=8, K=4, H=64, page_size=16):
    """Arguments of the last ``rows`` rows of each of R requests of ``context`` tokens, causal."""
    rng = np.random.default_rng(0)
    M = -(-context // page_size)
    q = jnp.asarray(rng.normal(size=(R * rows, N, H)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(R * M, page_size, K, H)), jnp.float32) for _ in range(2))
    pages = join(k, v, 2 * H).transpose(0, 2, 1, 3)
    tables = rng.permutation(R * M).reshape(R, M)
    stop = np.tile(np.arange(context - rows, context) + 1, R)
    ints = (tables, np.repeat(np.arange(R), rows // tile_rows), np.zeros_like(stop), stop)
    return q, k, v, pages, *(jnp.asarray(x, jnp.int32) for x in ints)


def trained(function: Callable, *, mapped: bool):
    """Forward and backward, as in training; ``mapped`` over single sequences by `jax.vmap`."""

    def one(*row):
        return function(*(x[None] for x in row))[0]

    def loss(q, k, v, start, stop):
        out = (jax.vmap(one) if mapped else function)(q, k, v, start, stop)
        return jnp.sum(jnp.square(out))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


ours = partial(interval_attention, implementation="xla")
CASES: dict[str, tuple[Callable, Callable, Callable]] = {
    "tiny tower 32x65, N=4 H=32": (ours, peer, partial(dense, 32, 65, 4, 4, 32, causal=False)),
    "tiny tower 32x65, training": (
        trained(ours, mapped=False), trained(peer, mapped=False), partial(dense, 32, 65, 4, 4, 32, causal=False)),
    "text 32x128, N=4 K=2 H=32, training under vmap": (
        trained(ours, mapped=True), trained(peer, mapped=False), partial(dense, 32, 128, 4, 2, 32, causal=True)),
    "vision tower 16x577, N=16 H=64": (ours, peer, partial(dense, 16, 577, 16, 16, 64, causal=False)),
    "dense prefill 1x2048, N=8 K=4 H=64": (ours, peer, partial(dense, 1, 2048, 8, 4, 64, causal=True)),
    "dense 1x2048, training": (
        trained(ours, mapped=False), trained(peer, mapped=False), partial(dense, 1, 2048, 8, 4, 64, causal=True)),
    "paged prefill 1x2048, tiles of 16": (ours_paged, paged_peer, partial(paged, 1, 2048, 2048, 16)),
    "paged prefill 16x64, tiles of 16": (ours_paged, paged_peer, partial(paged, 16, 64, 64, 16)),
    "paged decode 16 x context 512": (ours_paged, paged_peer, partial(paged, 16, 512, 1, 1)),
}  # fmt: skip


def measure(functions, args, seconds: float) -> list[tuple[float, float]]:
    """Least wall and mean processor time of a call of each function, in seconds; they take turns."""
    functions = [jax.jit(function) for function in functions]
    results = [jax.block_until_ready(function(*args)) for function in functions]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="take the cases whose name has one of these words")
    parser.add_argument("--seconds", type=float, default=5, help="time for each case")
    options = parser.parse_args()
    chosen = [name for name in CASES if not options.words or any(word in name for word in options.words)]
    if not chosen:
        parser.error(f"no case has {' or '.join(options.words)} in its name: {'; '.join(CASES)}")
    print(f"{'case':48} {'ours ms':>9} {'peer ms':>9} {'wall':>6} {'cpu':>6}")
    table = {}
    for name in chosen:
        function, other, arguments = CASES[name]
        (wall, cpu), (peer_wall, peer_cpu) = measure((function, other), arguments(), options.seconds)
        table[name] = {"wall": round(wall / peer_wall, 3), "cpu": round(cpu / peer_cpu, 3)}
        times = f"{wall * 1e3:9.2f} {peer_wall * 1e3:9.2f}"
        print(f"{name:48} {times} {wall / peer_wall:6.2f} {cpu / peer_cpu:6.2f}", flush=True)
    print(json.dumps({"jax": jax.__version__, "ratios": table}))


if __name__ == "__main__":
    main()
