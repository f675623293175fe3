"""Tables in Markdown of the lines that `kernels_pallas.bench` measures."""

from collections.abc import Iterable
from typing import Any

from kernels_pallas.benchmark.cases import CASES
from kernels_pallas.benchmark.tpu_peers import PEERS

__all__ = ["gpu_table", "measured_table", "replace_between", "tpu_table"]


def replace_between(text: str, name: str, new: str) -> str:
    """``text`` with ``new`` in place of what stands between ``<!-- name table: begin -->`` and the same with ``end``.

    Raises:
      ValueError: the marks are not there, once each and in order.
    """
    begin, end = (f"<!-- {name} table: {x} -->" for x in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin!r} and then {end!r}, once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}{end}{rest.split(end)[1]}"


def tpu_table(lines: Iterable[dict[str, Any]]) -> str:
    """Case by chip: cycles, floors, and peers with the ratio of their cycles to ours."""
    lines = _in_order(lines)
    peers = [peer for peer in PEERS if any("cycles" in x.get("peers", {}).get(peer, {}) for x in lines)]
    head = ["case", "chip", "cycles", "floor: MXU / HBM", "to floor", *peers]
    rows = []
    for line in lines:
        about = f"{line['case']}: {CASES[line['case']].about}"
        if "error" in line:
            rows.append([about, line["target"], "fails", *[""] * (len(head) - 3)])
            continue
        floor = line["floors"]
        row = [about, line["target"], _number(line["cycles"]), f"{_number(floor['mxu'])} / {_number(floor['hbm'])}"]
        if line["cycles"] > line["estimate"]:
            row[2] = f"{row[2]} (estimate {_number(line['estimate'])})"
        row.append(f"{line['ratio_to_floor']:.2f}")
        for peer in peers:
            told = line["peers"][peer]
            row.append(f"{_number(told['cycles'])} ({told['ratio']:.2f}x)" if "cycles" in told else "-")
        rows.append(row)
    return _markdown(head, rows)


def gpu_table(lines: Iterable[dict[str, Any]]) -> str:
    """Pallas kernel by card: registers a thread, bytes spilled, shared memory of a block; XLA's own are left out."""
    lines = _in_order(lines)
    cards = list(dict.fromkeys(line["target"] for line in lines))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        about = f"{line['case']}: {CASES[line['case']].about}"
        if "error" in line:
            rows.setdefault((about, ""), {})[line["target"]] = "fails"
        for kernel in line.get("kernels", ()):
            if "fusion" not in kernel["name"]:
                sizes = kernel["registers"], kernel["spill_bytes"], kernel["shared_memory_bytes"]
                cells = rows.setdefault((about, f"`{kernel['name']}`"), {})
                cells[line["target"]] = " / ".join(f"{x:,}" for x in sizes)
    head = ["case", "kernel", *(f"{card}: registers / spilled / shared" for card in cards)]
    return _markdown(head, [[*names, *(cells.get(card, "-") for card in cards)] for names, cells in rows.items()])


def measured_table(lines: Iterable[dict[str, Any]]) -> str:
    """Case by peer on a GPU that ran it: milliseconds, and how many times longer each peer took."""
    lines = [line for line in _in_order(lines) if "wall" in line]
    peers = list(dict.fromkeys(peer for line in lines for peer in line.get("peers", {})))
    rows = []
    for line in lines:
        about = f"{line['case']}: {CASES[line['case']].about}"
        told = [line.get("peers", {}).get(peer, {}) for peer in peers]
        ratios = [f"{x['wall']:.3f} ({x['ratio']:.2f}x)" if "wall" in x else "-" for x in told]
        rows.append(
            [about, line["device"], f"{line['wall']:.3f}", f"{line['tflops']} / {line['gb_per_s']:.0f}", *ratios]
        )
    return _markdown(["case", "card", "ms", "TFLOP/s / GB/s", *peers], rows)


def _in_order(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By case, as `CASES` has them; the last where a case was measured twice on a target."""
    latest = {(line["case"], line["target"]): line for line in lines}
    return sorted(latest.values(), key=lambda line: list(CASES).index(line["case"]))


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.1f}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
