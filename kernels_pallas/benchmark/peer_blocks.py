"""Block sizes of the peers: the best of a small search for each case and chip, as data.

``python -m kernels_pallas.benchmark.peer_blocks --target v5e`` searches and rewrites ``peer_blocks.json``.
"""

# What a case has depends on its kind, which the names of cases tell and types do not.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import argparse
import json
import sys
from pathlib import Path

from kernels_pallas.benchmark import tpu_peers
from kernels_pallas.benchmark.cases import CASES, Case, Paged
from kernels_pallas.compile_only import tpu

__all__ = ["best", "candidates", "search"]

FOUND = Path(__file__).with_suffix(".json")


CHIP_LIKE = {"v4": "v5e", "v5p": "v5e", "tpu7x": "v6e"}
"""Chips that were not searched on, by the width of their matrix units."""
LIKE = {"f16": "f64", "f128": "f64", "fw": "f64", "h-decode": "f64", "d": "a", "g": "a", "h-prefill": "a"}
"""For the ragged kernel: cases that take what was found for another."""


def best(chip: str, case: str, peer: str) -> list[int]:
    """What the search kept for a case; chips without a search of their own take that of one like them.

    Raises:
      KeyError: there was no search for this peer and case.
    """
    case = LIKE.get(case, case) if peer == "ragged" else case
    return json.loads(FOUND.read_text())[CHIP_LIKE.get(chip, chip)][case][peer]


def candidates(peer: str, case: Case) -> list[list[int]]:
    """Splash: rows, keys, keys at a time; flash: rows, keys copied, keys at a time; ragged: keys, rows."""
    if peer == "ragged":
        if case is CASES["h"]:
            return [[1024, 16], [1024, 32], [1024, 64]]
        if isinstance(case, Paged) and case.decode_rows:
            return [[512, 8], [1024, 8], [2048, 8], [1024, 16], [1024, 32]]
        return [[512, 64], [1024, 64], [1024, 128]]
    if case.mask == "full":
        T = -(-case.length // 128) * 128
        if peer == "flash":  # of one step, which v5e's compiler (libtpu 0.0.52) fails on, or of more
            return [[case.length] * 3, [T, T, T], [T, T, 128], [768, 768, 384], [384, 768, 384]]
        return [[T, T, T], [384, 768, 768]]
    if case.backward:
        return [[512, 512, 512], [1024, 1024, 512]]
    if case.length == 1536:
        return [[512, 512, 512], [768, 768, 768], [768, 1536, 768]]
    if case.mask == "causal" or peer in ("flash", "splash segments"):
        return [[1024, 1024, 512], [512, 1024, 512], [1024, 1024, 1024]]
    if peer == "splash at run time":
        return [[512, 512, 512], [1024, 1024, 512]]
    return [[512, 512, 512], [256, 512, 512], [1024, 512, 512]]


def search(chip: str, name: str, peer: str) -> tuple[list[int], int] | None:
    """The candidate of the fewest estimated cycles, and these; None where none compiles."""
    case = CASES[name]
    found = []
    for blocks in candidates(peer, case):
        kwargs = {"case": name, "peer": peer, "blocks": blocks, "roughly": True}
        each = [
            tpu.run(chip, "kernels_pallas.benchmark.tpu_peers:build", kwargs, only=kernel)
            for kernel in tpu_peers.kernels(case)
        ]
        if all(x.get("cycles") for x in each):
            found.append((sum(sum(x["cycles"].values()) for x in each), blocks))
            print(chip, name, peer, *found[-1], file=sys.stderr)
    return min(found)[::-1] if found else None


def main() -> None:
    """Search, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=["v5e", "v6e"], required=True)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peer", nargs="+", choices=tpu_peers.PEERS, default=list(tpu_peers.PEERS))
    options = parser.parse_args()
    for name in options.case:
        for peer in options.peer:
            if tpu_peers.obstacle(peer, CASES[name]) is not None or (peer == "ragged" and name in LIKE):
                continue
            found = search(options.target, name, peer)
            if found is None:
                print(f"{options.target} {name} {peer}: nothing compiles", file=sys.stderr)
                continue
            table = json.loads(FOUND.read_text())
            table.setdefault(options.target, {}).setdefault(name, {})[peer] = found[0]
            FOUND.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
