"""Make the table of block sizes: compile candidates for each chip, and keep the cheapest by the compiler's estimate.

    python -m kernels_pallas.tune                    # all, some ten minutes on two cores
    python -m kernels_pallas.tune --chip v6e --kind "128 long"

Needs `libtpu`; no TPU. An estimate is no timing: see `kernels_pallas.compile_only.tpu`.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import block_sizes, intervals
from kernels_pallas.compile_only import tpu
from kernels_pallas.interval_attention import pallas_tpu
from kernels_pallas.tpu_tiles import Blocks

LONG = 4096
PROBLEMS = {
    "narrow short": [("full", 577, 128, 128, 64), ("full", 729, 128, 128, 72)],
    "narrow medium": [("full", 1024, 8, 8, 72), ("full", 1600, 8, 8, 80)],
    "narrow long": [("full", LONG, 8, 8, 80), ("packed", LONG, 8, 8, 80)],
    "128 short": [("causal", 512, 32, 8, 128)],
    "128 medium": [("causal", 1536, 8, 2, 128)],
    "128 long": [("causal", LONG, 8, 2, 128), ("packed", LONG, 8, 2, 128)],
    "256 short": [("prefix", 512, 8, 1, 256)],
    "256 medium": [("prefix", 1536, 8, 1, 256)],
    "256 long": [("spans", LONG, 8, 4, 256)],
}
"""Kind of shape to what stands for it: mask, tokens, query heads, key heads, head dimension.

A batch is as good as more heads.
"""

RESIDENT = 6144
CANDIDATES = {
    "short": [
        Blocks(True, 512, 1, 512, 512, 512, heads, step, RESIDENT) for heads in (4, 8) for step in (128, 256, 512)
    ],
    "rest": [
        Blocks(True, 512, 1, 512, 512, 512, 8, 256, RESIDENT),
        Blocks(True, 512, 1, 512, 512, 512, 4, 512, RESIDENT),
        Blocks(True, 256, 1, 512, 256, 256, 8, 256, RESIDENT),
        Blocks(False, 512, 1, 512, 256, 256, 8, 128, RESIDENT),
        Blocks(False, 512, 1, 512, 256, 256, 4, 128, RESIDENT),
    ],
}


def mask(name: str, length: int) -> intervals.RowIntervals:
    """The mask that a problem names."""
    causal = intervals.causal(length)
    if name == "full":
        return intervals.full(length)
    if name == "prefix":
        return intervals.prefix(causal, 2 * length // 3)
    if name == "packed":
        return intervals.packed(causal, [(a, a + 512) for a in range(0, length, 512)])
    if name == "spans":  # a window, and four images that see all of themselves
        spans = [(a, a + 256) for a in range(256, length, 1024)]
        return intervals.bidirectional_spans(intervals.causal(length, window=1024), spans)
    return causal


def build(name: str, length: int, heads: int, kv_heads: int, head_dim: int, blocks: list):
    """What `tpu.run` compiles."""
    start, stop = (np.asarray(x)[None] for x in mask(name, length))

    def call(q, k, v, start_, stop_):
        q, k, v = (x.reshape(1, length, -1, head_dim) for x in (q, k, v))
        options = {"scale": head_dim**-0.5, "soft_cap": None, "interpret": False, "with_lse": False}
        fitted = block_sizes.fit(Blocks(*blocks), length, length, heads, heads // kv_heads, head_dim, 2, 96 << 20)
        out, _ = pallas_tpu.forward(q, k, v, start_, stop_, blocks=fitted, measured=(start, stop), **options)
        return out.reshape(1, length, -1)

    widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    arrays = [jax.ShapeDtypeStruct((1, length, width), jnp.bfloat16) for width in widths]
    return call, [*arrays, *[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 2]


def estimate(chip: str, kind: str, blocks: Blocks) -> int:
    """Cycles of a kind's problems together.

    Raises:
      RuntimeError: one does not compile.
    """
    total = 0
    for name, length, heads, kv_heads, head_dim in PROBLEMS[kind]:
        names = ("name", "length", "heads", "kv_heads", "head_dim", "blocks")
        arguments = dict(zip(names, (name, length, heads, kv_heads, head_dim, list(blocks)), strict=True))
        found = tpu.run(chip, "kernels_pallas.tune:build", arguments, only="interval_attention.1")
        if "error" in found:
            raise RuntimeError(f"{kind} on {chip} with {blocks}: {found['error']}")
        total += sum(found["cycles"].values())
    return total


def _may_go_down(chip: str, head: str, blocks: Blocks) -> bool:
    """Rows in sublanes lost by a third on v6e; eight heads of 256 take the compiler minutes and gigabytes."""
    return chip == "v5e" and (head == "128" or (head == "256" and blocks.heads <= 4))


def choose(chip: str, kind: str) -> Blocks:
    """The cheapest candidate; what was found goes to stderr."""
    head, length = kind.split()
    candidates = [
        blocks
        for blocks in CANDIDATES["short" if length == "short" else "rest"]
        if blocks.across or _may_go_down(chip, head, blocks)
    ]
    costs = [estimate(chip, kind, blocks) for blocks in candidates]
    for blocks, cost in zip(candidates, costs, strict=True):
        print(f"{chip} {kind}: {cost:,} cycles with {blocks}", file=sys.stderr, flush=True)
    return candidates[int(np.argmin(costs))]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", nargs="+", choices=sorted(block_sizes.CHIPS.values()))
    parser.add_argument("--kind", nargs="+", choices=PROBLEMS)
    arguments = parser.parse_args()
    table: dict = (
        json.loads(block_sizes.TABLE.read_text()) if block_sizes.TABLE.exists() else {"made": "", "blocks": {}}
    )
    wanted = [
        (chip, kind) for chip in arguments.chip or block_sizes.CHIPS.values() for kind in arguments.kind or PROBLEMS
    ]
    with ThreadPoolExecutor(2) as pool:
        chosen = list(pool.map(lambda pair: choose(*pair), wanted))
    for (chip, kind), blocks in zip(wanted, chosen, strict=True):
        table["blocks"].setdefault(chip, {})[kind] = blocks._asdict()
    table["made"] = f"python -m kernels_pallas.tune; jax {jax.__version__}, libtpu {metadata.version('libtpu')}"
    block_sizes.TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
