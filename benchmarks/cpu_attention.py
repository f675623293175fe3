"""Attention on CPU beside `jax.nn.dot_product_attention` with the same mask, as ratios of time.

    python benchmarks/cpu_attention.py                  # all cases, about two minutes on an idle machine
    python benchmarks/cpu_attention.py tower decode     # cases whose name has one of these words
    python benchmarks/cpu_attention.py --seconds 10     # measure each case for longer

Below 1 is faster than the peer; `kernels_pallas.benchmark.cpu` tells how both are measured. The last line is the table
as JSON.
"""

import argparse
import json
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from kernels_pallas.benchmark.cases import Case, Dense, Paged
from kernels_pallas.benchmark.cpu import contestants, measure, ours, peer, trained

CAUSAL = dict(mask="causal", num_heads=8, num_kv_heads=4, head_dim=64)
PAGES = dict(page_size=16, num_heads=8, num_kv_heads=4, head_dim=64)
TINY = dict(batch=32, num_heads=4, head_dim=32)

CASES: dict[str, Case] = {
    "tiny tower": Dense(about="32x65, N=4 H=32", length=65, mask="full", num_kv_heads=4, **TINY),
    "tiny tower, training": Dense(about="the same", length=65, mask="full", num_kv_heads=4, backward=True, **TINY),
    "text, training under vmap": Dense(
        about="32x128, N=4 K=2 H=32", length=128, mask="causal", num_kv_heads=2, backward=True, **TINY
    ),
    "vision tower": Dense(
        about="16x577, N=16 H=64", batch=16, length=577, mask="full", num_heads=16, num_kv_heads=16, head_dim=64
    ),
    "dense prefill": Dense(about="1x2048, N=8 K=4 H=64", length=2048, **CAUSAL),
    "dense, training": Dense(about="1x2048, N=8 K=4 H=64", length=2048, backward=True, **CAUSAL),
    "paged prefill 1x2048": Paged(about="tiles of 16", requests=((2048, 2048),), **PAGES),
    "paged prefill 16x64": Paged(about="tiles of 16", requests=((64, 64),) * 16, **PAGES),
    "paged decode": Paged(about="16 x context 512", requests=((512, 1),) * 16, **PAGES),
}


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
        functions, arguments = contestants(CASES[name])
        if "vmap" in name:
            functions = [trained(ours, mapped=True), trained(peer)]
        (wall, cpu), (peer_wall, peer_cpu) = measure(functions, arguments, options.seconds)
        table[name] = {"wall": round(wall / peer_wall, 3), "cpu": round(cpu / peer_cpu, 3)}
        times = f"{wall * 1e3:9.2f} {peer_wall * 1e3:9.2f}"
        print(f"{name + ': ' + CASES[name].about:48} {times} {wall / peer_wall:6.2f} {cpu / peer_cpu:6.2f}", flush=True)
    print(json.dumps({"jax": jax.__version__, "ratios": table}))


if __name__ == "__main__":
    main()
