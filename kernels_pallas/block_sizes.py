"""How the TPU's dense forward kernel cuts a problem: a small table by chip and kind of shape, fitted to the lengths.

The table is data, ``block_sizes.json``, made by ``python -m kernels_pallas.tune``, which compiles candidates for the
chip itself and keeps the cheapest by the compiler's estimate.
"""

import functools
import json
from pathlib import Path

from kernels_pallas.tpu_tiles import LANES, Blocks

__all__ = ["CHIPS", "SOLE_KEYS", "TABLE", "blocks_for", "fit", "kind_of"]

TABLE = Path(__file__).with_name("block_sizes.json")
SOLE_KEYS = 768
"""Up to so many keys one block holds them all."""
PROGRAMS = 4
"""Where one block holds all keys, fewer programs than this own half as many heads each, as nothing hides what is copied
for the first."""
CHIPS = {128: "v5e", 256: "v6e"}
"""The chip whose entries serve, by the width of the matrix units: v4 and v5p are cut like v5e, tpu7x like v6e."""


def kind_of(head_dim: int, num_keys: int) -> str:
    """The kind of shape that the table tells apart."""
    head = "256" if head_dim >= 256 else "128" if head_dim % LANES == 0 else "narrow"
    return f"{head} {'short' if num_keys <= SOLE_KEYS else 'medium' if num_keys <= 2048 else 'long'}"


@functools.cache
def _table() -> dict[str, dict[str, dict]]:
    return json.loads(TABLE.read_text())["blocks"]


def blocks_for(
    chip: str, num_rows: int, num_keys: int, num_heads: int, groups: int, head_dim: int, itemsize: int, vmem: int
) -> Blocks:
    """Blocks for ``num_rows`` query rows of each of ``num_heads`` query heads, those of all sequences together.

    ``groups`` of these share a key head. A program takes about ``vmem`` bytes at most.
    """
    entry = Blocks(**_table()[chip][kind_of(head_dim, num_keys)])
    return fit(entry, num_rows, num_keys, num_heads, groups, head_dim, itemsize, vmem)


def fit(
    blocks: Blocks,
    num_rows: int,
    num_keys: int,
    num_heads: int,
    groups: int,
    head_dim: int,
    itemsize: int,
    vmem: int,
) -> Blocks:
    """``blocks`` no larger than the problem, whole sublanes, and within ``vmem`` bytes."""
    if num_keys <= SOLE_KEYS and blocks.across:
        keys = _up(num_keys, 32 // itemsize)
        rows = _up(num_rows, LANES) if num_rows <= SOLE_KEYS else blocks.rows
        blocks = blocks._replace(
            rows=rows,
            parts=1,
            keys=keys,
            edge_rows=rows,
            edge_keys=keys,
            heads=blocks.heads // 2 if num_heads * -(-num_rows // rows) < PROGRAMS * blocks.heads else blocks.heads,
            step=min(blocks.step, keys),
            resident=max(keys, blocks.resident),
        )
    elif num_rows < blocks.owned:
        rows = min(blocks.rows, _up(num_rows, blocks.edge_rows))
        blocks = blocks._replace(rows=rows, parts=1)
    while _bytes(blocks, num_keys, groups, head_dim, itemsize) > vmem and blocks.heads > 1:
        blocks = blocks._replace(heads=blocks.heads // 2)
    while _bytes(blocks, num_keys, groups, head_dim, itemsize) > vmem and blocks.resident > 2 * blocks.keys:
        blocks = blocks._replace(resident=blocks.resident // 2 // blocks.edge_keys * blocks.edge_keys)
    return blocks


def _bytes(blocks: Blocks, num_keys: int, groups: int, head_dim: int, itemsize: int) -> int:
    """VMEM of a program, roughly: blocks twice for the pipeline, state and tiles in float32, as much again to spill."""
    H = _up(head_dim, LANES)
    kv = 2 * 2 * min(num_keys, blocks.resident) * max(1, blocks.heads // groups) * H * itemsize
    rows = 2 * 2 * blocks.owned * blocks.heads * H * itemsize
    state = blocks.owned * blocks.heads * (H + (8 if blocks.across else 2 * LANES)) * 4
    return kv + rows + state + 6 * blocks.rows * blocks.keys * 4


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
