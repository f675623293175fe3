"""Paged attention's GPU kernels go through to machine code for the cards they serve, with no GPU here."""

import pytest

from kernels_pallas.compile_only import gpu

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))

LLAMA = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16}
GEMMA3 = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "page_size": 64}
NARROW = {"num_heads": 16, "num_kv_heads": 16, "head_dim": 64, "page_size": 16}


def compiled(target, **arguments):
    build = "kernels_pallas.compile_only.gpu_paged:paged_attention"
    return gpu.run({"build": build, "arguments": arguments, "target": target})


@pytest.mark.parametrize(
    ("sizes", "target"),
    [(LLAMA, "l4"), (GEMMA3, "l4"), (NARROW, "l4"), (LLAMA, "a100"), (GEMMA3, "h100")],
    ids=["llama-l4", "gemma3-l4", "narrow-l4", "llama-a100", "gemma3-h100"],
)
def test_mixed_batch_fits(sizes, target):
    """No register spills, shared memory fits, and nothing as large as the pages is copied."""
    found = compiled(target, **sizes)
    assert "error" not in found
    kernels = {x["name"]: x for x in found["kernels"] if "paged_attention" in x["name"]}
    assert {"decode" in x for x in kernels} == {True, False}
    for kernel in kernels.values():
        assert kernel["spill_bytes"] == 0
        assert 0 < kernel["shared_memory_bytes"] <= gpu.CARDS[target].shared_memory_block
    page_bytes = 64 * 4096 * sizes["num_kv_heads"] * 2 * sizes["head_dim"] * 2
    assert found["temp_bytes"] < page_bytes / 10


def test_too_large_blocks_are_found():
    """Blocks over a card's registers spill, and over its shared memory don't compile: both checks can fail."""
    spilled = compiled("a100", decode_rows=0, for_prefill=[128, 64, 4, 3], **LLAMA)
    assert sum(x["spill_bytes"] for x in spilled["kernels"]) > 0
    refused = compiled("h100", prefill_tiles=0, for_decode=[16, 128, 4, 5], **GEMMA3)
    assert "shared memory" in refused["error"].lower()
