"""`python -m kernels_pallas.bench`: floors, lines of JSON, exit status, and the tables that it writes."""

import importlib
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import bench
from kernels_pallas.benchmark import peer_blocks, targets, this_gpu, tpu_peers
from kernels_pallas.benchmark.cases import CASES, Dense, Paged, Write
from kernels_pallas.benchmark.tables import replace_between
from kernels_pallas.compile_only import gpu, tpu

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu compiles for TPU")

SIZES = dict(num_heads=4, num_kv_heads=2, head_dim=16)
TINY = {
    "tiny dense": Dense(about="", mask="causal", batch=2, length=24, **SIZES),
    "tiny gradients": Dense(about="", mask="full", length=24, backward=True, **SIZES),
    "tiny mixed": Paged(about="", requests=((7, 1),) * 4 + ((24, 16),) * 2, page_size=8, window=12, **SIZES),
    "tiny write": Write(about="", requests=((7, 1), (24, 16)), page_size=8, num_kv_heads=2, head_dim=16),
}
PAGE = """text before
<!-- tpu table: begin -->
old rows
<!-- tpu table: end -->
between
<!-- measured table: begin -->
<!-- measured table: end -->
<!-- gpu table: begin -->
cards as they were
<!-- gpu table: end -->
text after
"""


@pytest.fixture
def tiny(monkeypatch):
    for name, case in TINY.items():
        monkeypatch.setitem(CASES, name, case)


def run(capsys, *arguments, **options):
    """Exit status and lines."""
    status = bench.main(list(arguments), **options)
    return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def fake(case, target, **_):
    """A measurement of any case, with one that fails."""
    if (case, target) == ("b", "v6e"):
        raise targets.CannotMeasure("too large")
    line = {"case": case, "target": target, "op": CASES[case].op}
    if target in gpu.CARDS:
        return line | {"kernels": [{"name": "k", "registers": 99, "spill_bytes": 0, "shared_memory_bytes": 1234}]}
    peers = {peer: {"reason": "none"} for peer in tpu_peers.PEERS}
    peers["splash"] = {"cycles": 3000.0, "ratio": 1.5}
    cycles = {"cycles": 2000.0, "estimate": 1900.0, "floors": {"mxu": 1.0, "hbm": 2000.0}, "ratio_to_floor": 1.0}
    return line | cycles | {"peers": peers}


@pytest.mark.parametrize(
    ("case", "chip", "mxu", "hbm"),
    [
        # 4096 * 4097 / 2 pairs * 4 * 128 * 32 heads / 131072; 2 * 2 bytes * 4096 * 128 * (32 + 8) / 819e9 * 1.5e9
        ("a", "v5e", 1048.8, 153.6),
        ("a", "v6e", 262.2, 89.5),
        # rows 0..1023 see 1024 keys, the others up to themselves: (1024 * 1024 + 655616) * 4 * 256 * 8 / 131072
        ("b", "v5e", 106.5, 25.9),
        # 8 * 512 * 513 / 2 pairs
        ("d", "v5e", 131.3, 153.6),
        # 8 * 577 * 577 * 4 * 64 * 16 / 131072; 2 * 2 * 8 * 577 * 64 * 32 / 819e9 * 1.5e9
        ("e577", "v5e", 83.2, 69.3),
        # five products in place of two; 2 * 4096 * 128 * (3 * 32 + 4 * 8)
        ("bw-a", "v5e", 2622.1, 245.8),
        # 64 * 2048 * 8 * 128 * 2 * 2 bytes of keys and values, 64 * 32 * 128 * 2 * 2 of rows
        ("f16", "v5e", 16.4, 985.2),
        ("f128", "v6e", 4.1, 574.0),
        ("fw", "v5e", 8.2, 493.6),
        # 64 rows * 8 * 128 * 2, keys and values, in and out
        ("w64", "v5e", 0.0, 1.0),
    ],
)
def test_floors(case, chip, mxu, hbm):
    assert targets.floors(CASES[case], chip) == {"mxu": mxu, "hbm": hbm}


def test_a_mixed_batch_needs_what_its_parts_need():
    both, *parts = (CASES[name] for name in ("h", "h-decode", "h-prefill"))
    assert both.flops() == sum(part.flops() for part in parts)
    assert both.bytes() == sum(part.bytes() for part in parts)


def test_a_part_is_that_share_of_a_case():
    for name in ("a", "bw-a", "e577", "g"):
        case = CASES[name]
        assert case.part.flops() * case.parts == case.flops()
        assert case.part.bytes() * case.parts == case.bytes()


def test_requests_of_one_row_come_first():
    with pytest.raises(ValueError, match=r"whole tiles of 16; got \[16, 1\]"):
        Paged(about="", requests=((16, 16), (8, 1)), page_size=8)


def test_cpu_lines(tiny, capsys):
    status, lines = run(capsys, "--target", "cpu", "--case", *TINY, "--seconds", "0")
    assert status == 0, lines
    assert [line["case"] for line in lines] == list(TINY)
    for line in lines:
        assert line["target"] == "cpu"
        assert line["unit"] == "ms"
        assert line["wall"] > 0
        peer = line["peers"]["jax.nn.dot_product_attention"]
        if line["op"] == "kv_write":
            assert peer == {"reason": "writes no pages"}
        else:
            assert peer["ratio"] == pytest.approx(peer["wall"] / line["wall"], rel=0.05)
    assert lines[2]["part"]["requests"] == ["1 of 7 keys, 1 new", "2 of 24 keys, 16 new"]


def test_without_peers(tiny, capsys):
    status, lines = run(capsys, "--target", "cpu", "--case", "tiny dense", "--seconds", "0", "--no-peers")
    assert status == 0, lines
    assert "peers" not in lines[0]


def test_results_that_differ_are_an_error(tiny, capsys, monkeypatch):
    monkeypatch.setattr("kernels_pallas.benchmark.cpu.peer", lambda q, k, v, start, stop: q)
    status, lines = run(capsys, "--target", "cpu", "--case", "tiny dense", "--seconds", "0")
    assert status == 1
    assert "AssertionError" in lines[0]["error"]


def test_one_case_that_fails(capsys):
    status, lines = run(capsys, "--target", "v6e", "--case", "a", "b", "c", measure=fake)
    assert status == 1
    assert [line.get("error") for line in lines] == [None, "too large", None]
    assert lines[1] == {"case": "b", "target": "v6e", "op": "interval_attention", "error": "too large"}
    assert run(capsys, "--target", "v6e", "--case", "a", "c", measure=fake)[0] == 0


def test_arguments_that_make_no_sense(capsys):
    for arguments in (["--target", "t4"], ["--target", "cpu", "--case", "z"], ["--write", "x", "--case", "a"], []):
        with pytest.raises(SystemExit, match="2"):
            bench.main(arguments, measure=fake)


def test_write(tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.setattr(gpu, "missing", lambda: "not installed")
    assert bench.main(["--write", str(page)], measure=fake) == 1  # of b on v6e
    captured = capsys.readouterr()
    assert "not installed" in captured.err
    text = page.read_text()
    assert "old rows" not in text
    about = CASES["a"].about
    assert f"| a: {about} | v5e | 2,000 (estimate 1,900) | 1.0 / 2,000 | 1.00 | 3,000 (1.50x) |" in text
    assert f"| b: {CASES['b'].about} | v6e | fails |" in text
    assert [x for x in text.splitlines() if x.startswith("| case")] == [
        "| case | chip | cycles | floor: MXU / HBM | to floor | splash |"
    ]
    assert "\n<!-- gpu table: begin -->\ncards as they were\n<!-- gpu table: end -->\ntext after\n" in text

    # The same table from lines that were kept, and the cards beside it.
    kept = tmp_path / "lines"
    cards = json.dumps(fake("a", "l4"))
    peers = {"cudnn": {"wall": 0.1, "ratio": 0.5}, "xla": {"reason": "can't"}}
    numbers = {"wall": 0.2, "tflops": 300.1, "gb_per_s": 99.7, "device": "NVIDIA H200", "peers": peers}
    measured = json.dumps({"case": "a", "target": "gpu"} | numbers)
    kept.write_text("\n".join([captured.out, cards, measured]).replace("\n\n", "\n"))
    assert bench.main(["--write", str(page), "--lines", str(kept)]) == 1
    assert f"| a: {about} | `k` | 99 / 0 / 1,234 |" in page.read_text()
    assert f"| a: {about} | NVIDIA H200 | 0.200 | 300.1 / 100 | 0.100 (0.50x) | - |" in page.read_text()
    assert page.read_text().split("between")[0] == text.split("between")[0]


GPU_SIZES = dict(about="", length=64, num_heads=4, num_kv_heads=2, head_dim=16)
ON_A_GPU = [
    *(Dense(mask=mask, **GPU_SIZES) for mask in ("causal", "full", "prefix", "window and spans")),
    Dense(mask="packed", **GPU_SIZES | {"length": 1024, "num_heads": 1, "num_kv_heads": 1}),
    Dense(mask="causal", backward=True, **GPU_SIZES),
    Paged(about="", requests=((256, 1),) * 2, page_size=16, **SIZES),
    Paged(about="", requests=((32, 1), (32, 16)), page_size=16, **SIZES),
]


@pytest.fixture
def kernels_of_xla(monkeypatch):
    """XLA's forms in place of the GPU's kernels, where there is no GPU."""
    if jax.default_backend() != "gpu":
        for op in ("interval_attention", "paged_attention"):
            known = importlib.import_module(f"kernels_pallas.{op}.api").IMPLEMENTATIONS
            monkeypatch.setitem(known, "pallas_gpu", known["xla"])


@pytest.mark.usefixtures("kernels_of_xla")
@pytest.mark.parametrize("case", ON_A_GPU, ids=str)
def test_times_on_a_gpu(case):
    """The peers that run agree with ours; which run depends on the machine."""
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention multiplies bfloat16 by float32
        line = this_gpu.report(case, seconds=0)
    assert line["wall"] > 0
    if isinstance(case, Dense):
        told = line["peers"]["dot_product_attention, xla"]
        assert "ratio" in told, told
        assert told["ratio"] == pytest.approx(told["wall"] / line["wall"], rel=0.05)


@pytest.mark.usefixtures("kernels_of_xla")
def test_a_peer_that_differs_is_an_error(monkeypatch):
    wrong = {"ours": (lambda x: x, (jnp.ones((4,)),)), "peer": (lambda x: x + 1, (jnp.ones((4,)),))}
    monkeypatch.setattr(this_gpu, "contestants", lambda case: wrong)
    with pytest.raises(AssertionError, match="peer"):
        this_gpu.report(ON_A_GPU[0], seconds=0)


def test_repeated_calls_are_not_made_one():
    """Each call's first argument hangs on the last result: as many products in the program as calls."""
    x = jnp.ones((64, 64))
    text = jax.jit(this_gpu.repeated(lambda a, b: a @ b, 5)).lower(x, x).compile().as_text()
    assert text.count(" dot(") == 5


@pytest.mark.parametrize("text", ["", PAGE + PAGE, "<!-- tpu table: end --><!-- tpu table: begin -->"])
def test_marks_that_are_not_there(text):
    with pytest.raises(ValueError, match="once each"):
        replace_between(text, "tpu", "new")


def like(peer, name):
    return CASES[peer_blocks.LIKE.get(name, name) if peer == "ragged" else name]


def test_a_peers_blocks_are_of_its_candidates():
    found = json.loads(peer_blocks.FOUND.read_text())
    pairs = [(chip, name, peer) for chip, names in found.items() for name, peers in names.items() for peer in peers]
    assert pairs
    for chip, name, peer in pairs:
        assert peer_blocks.best(chip, name, peer) in peer_blocks.candidates(peer, like(peer, name))


def test_a_peer_without_blocks_has_a_reason(monkeypatch):
    monkeypatch.setattr(peer_blocks, "best", lambda *_: {}["nothing"])
    assert "no blocks of it were searched" in targets._peer("a", "flash", "v5e", 1.0, 1.0)["reason"]


def test_a_peer_sees_the_tables_that_are_stored():
    def kernel(table_ref, x_ref, out_ref):
        out_ref[...] = x_ref[...] * table_ref[pl.program_id(0), 1]

    def call(table, x):
        block = pl.BlockSpec((8, 128), lambda i, *_: (i, 0))
        spec = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(2,), in_specs=[block], out_specs=block)
        return pl.pallas_call(kernel, grid_spec=spec, out_shape=x, interpret=pltpu.InterpretParams())(table, x)

    original = pl.pallas_call
    with tpu_peers.storing(forward=[np.array([[9, 3], [9, 5]])]):
        out = call(jnp.zeros((2, 2), jnp.int32), jnp.ones((16, 128), jnp.int32))
    assert pl.pallas_call is original
    np.testing.assert_array_equal(out[:, 0], [3] * 8 + [5] * 8)


@needs_libtpu
def test_a_case_on_a_chip(capsys):
    status, (line,) = run(capsys, "--target", "v5e", "--case", "w64")
    assert status == 0, line
    assert line["unit"] == "thousand cycles"
    assert line["cycles"] == line["estimate"] > line["floor"] == line["floors"]["hbm"]
    assert line["ratio_to_floor"] == pytest.approx(line["cycles"] / line["floor"], rel=1e-3)
    assert 0 < line["temp_bytes"] < 2**21  # the rows, and no copy of the pages
    assert line["peers"] == {peer: {"reason": "writes no pages"} for peer in tpu_peers.PEERS}


@pytest.mark.parametrize(
    ("found", "error"),
    [
        ({"error": "out of VMEM"}, "out of VMEM"),
        ({"temp_bytes": 0, "cycles": {}}, "the compiler tells of no op kv_write.1"),
    ],
)
def test_no_estimate_is_an_error(monkeypatch, capsys, found, error):
    monkeypatch.setattr(tpu, "run", lambda *_, **__: found)
    status, (line,) = run(capsys, "--target", "v6e", "--case", "w64")
    assert status == 1
    assert line["error"] == error


def test_memory_bounds_each_kernel_by_itself(monkeypatch, capsys):
    """Decoding is bound by memory and prefill isn't: what one needs doesn't hide in what the other leaves."""
    estimates = {"paged_attention_decode.1": 100_000, "paged_attention_prefill.1": 400_000, "peer_forward.1": 2_000_000}

    def fake_run(chip, build, kwargs, *, only):
        return {"temp_bytes": 7, "cycles": {only: estimates[only]}}

    monkeypatch.setattr(tpu, "run", fake_run)
    _, (line,) = run(capsys, "--target", "v5e", "--case", "h")
    assert line["estimate"] == 500
    assert line["cycles"] == 923.6 + 400
    assert line["ratio_to_floor"] == pytest.approx(1323.6 / 1046.5, abs=1e-3)
    _, parts = tpu_peers.measured_part("ragged", CASES["h"])
    assert line["peers"]["ragged"]["ratio"] == pytest.approx(parts * 2000 / 1323.6, abs=1e-3)
    assert line["peers"]["flash"] == {"reason": "reads no pages"}


def test_a_part_is_multiplied(monkeypatch, capsys):
    monkeypatch.setattr(tpu, "run", lambda *_, **__: {"temp_bytes": 7, "cycles": {"x": 300_000}})
    _, (line,) = run(capsys, "--target", "v5e", "--case", "a", "--no-peers")
    assert (line["measured_part"], line["cycles"], line["floor"]) == ("1/4", 1200, 1048.8)


def test_a_card_without_its_compiler(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "missing", lambda: "needs a plugin")
    status, lines = run(capsys, "--target", "l4", "--case", "a", "w64")
    assert status == 1
    assert lines[0]["error"] == "needs a plugin"
    assert "XLA's scatter" in lines[1]["reason"]
    assert jax.default_backend() == "cpu"
