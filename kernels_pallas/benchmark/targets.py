"""What a target says about a case: the compiler's estimate for a TPU, what the machine code of a GPU needs, and wall
time on this machine's CPU or GPU.

All give a dict for one line of JSON. Cycles are in thousands, times in milliseconds.
"""

# What a case has depends on its kind, which the names of cases tell and types do not.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from collections.abc import Sequence
from typing import Any

from kernels_pallas.benchmark import cpu, peer_blocks, this_gpu, tpu_ours, tpu_peers
from kernels_pallas.benchmark.cases import CASES, Dense, Paged, estimated
from kernels_pallas.compile_only import gpu, tpu

__all__ = ["HERE", "TARGETS", "TPUS", "CannotMeasure", "floors", "measure"]

TPUS = ("v5e", "v6e", "v4", "v5p", "tpu7x")
HERE = {"cpu": cpu.report, "gpu": this_gpu.report}
"""Targets that are this machine's own: a case runs, and what it took is told."""
TARGETS = (*TPUS, *gpu.CARDS, *HERE)


class CannotMeasure(RuntimeError):
    """The compiler refuses a case, or what is needed is not installed."""


def measure(name: str, target: str, *, peers: bool = True, seconds: float = 5) -> dict[str, Any]:
    """One line about a case of `CASES` on a target of `TARGETS`; ``seconds`` are for timing on this machine.

    Raises:
      CannotMeasure: with what the compiler said last.
    """
    case = CASES[name]
    line = {"case": name, "target": target, "op": case.op}
    if target in HERE:
        return line | HERE[target](case, peers=peers, seconds=seconds)
    return line | (_on_gpu(case, target) if target in gpu.CARDS else _on_tpu(name, target, peers))


def floors(case, chip: str) -> dict[str, float]:
    """Thousands of cycles that the matrix units and the main memory of a chip need at least."""
    about = tpu.CHIPS[chip]
    return {
        "mxu": round(case.flops() / about.flops / 1e3, 1),
        "hbm": round(case.bytes() / about.bandwidth * about.clock / 1e3, 1),
    }


def _on_tpu(name: str, chip: str, peers: bool) -> dict[str, Any]:
    case = CASES[name]
    floor = floors(case, chip)
    names, parts = zip(*tpu_ours.kernels(case), strict=True)
    _, count = estimated(case)
    ours = _estimate(chip, "tpu_ours", {"case": name}, names, count)
    cycles = sum(
        max(estimate, floors(part, chip)["hbm"]) for estimate, part in zip(ours["estimates"], parts, strict=True)
    )
    line = {
        "unit": "thousand cycles",
        "cycles": round(cycles, 1),
        "estimate": ours["estimate"],
        "floor": max(floor.values()),
        "floors": floor,
        "ratio_to_floor": round(cycles / max(floor.values()), 3),
        "measured_part": f"1/{count}",
        "temp_bytes": ours["temp_bytes"],
    }
    if peers:
        line["peers"] = {peer: _peer(name, peer, chip, floor["hbm"], cycles) for peer in tpu_peers.PEERS}
    return line


def _peer(name: str, peer: str, chip: str, floor: float, ours: float) -> dict[str, Any]:
    case = CASES[name]
    reason = tpu_peers.obstacle(peer, case)
    if reason is not None:
        return {"reason": reason}
    try:
        blocks = peer_blocks.best(chip, name, peer)
    except KeyError:
        return {"reason": "no blocks of it were searched for this case (kernels_pallas/benchmark/peer_blocks.py)"}
    _, parts = tpu_peers.measured_part(peer, case)
    kwargs = {"case": name, "peer": peer, "blocks": blocks}
    try:
        found = _estimate(chip, "tpu_peers", kwargs, tpu_peers.kernels(case), parts)
    except CannotMeasure as error:
        return {"reason": f"the compiler gives no estimate: {error}"}
    cycles = max(found["estimate"], floor)
    ratio = round(cycles / ours, 3)
    return {"cycles": cycles, "estimate": found["estimate"], "ratio": ratio, "measured_part": f"1/{parts}"} | {
        "temp_bytes": found["temp_bytes"],
        "blocks": blocks,
    }


def _estimate(chip: str, module: str, kwargs: dict, kernels: Sequence[str], parts: int) -> dict[str, Any]:
    """Thousands of cycles of the named kernels, each compiled on its own as XLA's ops beside them can end the model."""
    estimates, temp_bytes = [], 0
    for kernel in kernels:
        found = tpu.run(chip, f"kernels_pallas.benchmark.{module}:build", kwargs, only=kernel)
        if "error" in found:
            raise CannotMeasure(found["error"])
        if not found["cycles"]:
            raise CannotMeasure(f"the compiler tells of no op {kernel}")
        estimates.append(round(sum(found["cycles"].values()) * parts / 1e3, 1))
        temp_bytes = max(temp_bytes, found["temp_bytes"])
    return {"estimate": round(sum(estimates), 1), "estimates": estimates, "temp_bytes": temp_bytes}


def _on_gpu(case, card: str) -> dict[str, Any]:
    if isinstance(case, Dense):
        build = "gpu:dense_backward" if case.backward else "gpu:dense_forward"
        sizes = dict(num_rows=case.length, batch=case.batch)
    elif isinstance(case, Paged):
        build = "gpu_paged:paged_attention"
        tiles = len(case.tile_request()) - case.decode_rows
        sizes = dict(decode_rows=case.decode_rows, prefill_tiles=tiles, tile_rows=case.TILE, page_size=case.page_size)
        sizes |= dict(context=case.pages_per_request * case.page_size, cores=gpu.CARDS[card].cores)
    else:
        return {"reason": "kv_write has no kernel of its own on GPUs; XLA's scatter serves"}
    if gpu.missing() is not None:
        raise CannotMeasure(gpu.missing())
    sizes |= dict(num_heads=case.num_heads, num_kv_heads=case.num_kv_heads, head_dim=case.head_dim)
    found = gpu.run({"build": f"kernels_pallas.compile_only.{build}", "target": card, "arguments": sizes})
    if "error" in found:
        raise CannotMeasure(found["error"])
    kernels = found["kernels"]
    return {
        "registers": max(kernel["registers"] for kernel in kernels),
        "spill_bytes": sum(kernel["spill_bytes"] for kernel in kernels),
        "shared_memory_bytes": max(kernel["shared_memory_bytes"] for kernel in kernels),
        "temp_bytes": found["temp_bytes"],
        "kernels": kernels,
    }
