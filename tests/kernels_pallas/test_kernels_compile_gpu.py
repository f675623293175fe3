"""The GPU kernels compile to machine code for three cards, on a machine without one."""

import pytest

from kernels_pallas.compile_only import gpu

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))

BUILD = "kernels_pallas.compile_only.gpu:"
MODELS = {
    "Llama 3": {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128},
    "Gemma 3": {"num_heads": 8, "num_kv_heads": 4, "head_dim": 256},
    "Qwen2.5-VL vision": {"num_heads": 16, "num_kv_heads": 16, "head_dim": 80, "num_rows": 1024},
    "CLIP-L": {"num_heads": 16, "num_kv_heads": 16, "head_dim": 64, "num_rows": 577, "batch": 8},
    "SigLIP": {"num_heads": 16, "num_kv_heads": 16, "head_dim": 72, "num_rows": 729, "batch": 8},
}


# The card with the least shared memory gets all; `kernels_pallas.bench` compiles all for every card.
@pytest.mark.parametrize(
    ("model", "card"), [*((model, "l4") for model in MODELS), ("Llama 3", "a100"), ("Gemma 3", "h100")]
)
def test_compiles(model, card):
    got = gpu.run({"build": BUILD + "dense_training", "target": card, "arguments": MODELS[model]})
    assert "error" not in got, got["error"]
    kernels = {kernel["name"].removeprefix("interval_attention_"): kernel for kernel in got["kernels"]}
    assert {"forward", "d_query", "d_key"} <= kernels.keys()
    assert kernels["forward"]["spill_bytes"] == 0
    for name, kernel in kernels.items():
        assert 0 < kernel["registers"] <= 255, name
        assert kernel["shared_memory_bytes"] <= gpu.CARDS[card].shared_memory_block
    assert kernels["forward"]["shared_memory_bytes"] > 0
    # No array of rows by keys: the few numbers a row or a key that the kernels hand to each other, one fused copy of
    # operands at most.
    rows, batch = MODELS[model].get("num_rows", 4096), MODELS[model].get("batch", 1)
    assert got["temp_bytes"] <= 64 * rows * batch


def test_a_block_that_is_too_large_fails():
    too_large = {"head_dim": 256, "blocks": [128, 128, 8, 3]}
    got = gpu.run({"build": BUILD + "dense_forward", "target": "l4", "arguments": too_large})
    assert "Shared memory size limit exceeded" in got["error"]


def test_a_spill_is_seen():
    spills = {"head_dim": 128, "blocks": [128, 32, 4, 2]}
    got = gpu.run({"build": BUILD + "dense_forward", "target": "a100", "arguments": spills})
    assert sum(kernel["spill_bytes"] for kernel in got["kernels"]) > 0


def test_soft_cap_does_not_spill():
    arguments = {**MODELS["Gemma 3"], "soft_cap": 50.0}
    got = gpu.run({"build": BUILD + "dense_forward", "target": "a100", "arguments": arguments})
    assert [kernel["spill_bytes"] for kernel in got["kernels"]] == [0] * len(got["kernels"])


def test_an_unknown_card_is_an_error():
    got = gpu.run({"build": BUILD + "dense_forward", "target": "t4"})
    assert "KeyError: 't4'" in got["error"]
