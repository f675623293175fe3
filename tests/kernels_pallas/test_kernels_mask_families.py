"""docs/masks.md: its examples run, and each family's composition is the mask that the family's own rule spells out."""

import doctest
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_cases import mask_of

from kernels_pallas import intervals

PAGE = Path(__file__).parents[2] / "docs" / "masks.md"


def table() -> dict[tuple[str, str], str]:
    """(family, layers) to the composition, from the page's table of families."""
    section = PAGE.read_text("utf-8").split("\n## Families\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {(a.strip(), b.strip()): re.fullmatch(r" *`(.+)` *", c)[1] for a, b, c in rows[2:]}


@st.composite
def examples(draw) -> dict:
    """The names that the page's compositions use, for one random prompt."""
    T = draw(st.integers(1, 20))
    cuts = sorted(draw(st.lists(st.integers(0, T), max_size=8)))
    sizes = draw(st.lists(st.integers(0, 7), min_size=1, max_size=5))
    segments = list(pairwise(sorted({0, T, *draw(st.lists(st.integers(0, T), max_size=3))})))
    # Places of image tokens and tiles of each image, for cross-attention; padding tiles come last among the keys.
    places = sorted(draw(st.sets(st.integers(0, T - 1), max_size=4)))
    tiles = np.cumsum([0, *(draw(st.integers(1, 3)) for _ in places)])
    return {
        "T": T,
        "w": draw(st.integers(1, T + 3)),
        "P": draw(st.integers(0, T)),
        "c": draw(st.integers(1, 8)),
        "spans": list(zip(cuts[::2], cuts[1::2], strict=False)),
        "cut": segments,
        "cu_seqlens": np.cumsum([0, *sizes]),
        "windows": np.asarray(draw(st.lists(st.integers(0, 4), min_size=T, max_size=T))),
        "V": draw(st.integers(0, T)),
        "S": int(tiles[-1]) + draw(st.integers(0, 2)),
        "places": places,
        "shown": [(a, shown_until(places, k, T)) for k, a in enumerate(places)],
        "tiles": list(pairwise(tiles)),
        "left": draw(st.integers(2, 6)),
        "right": draw(st.integers(0, 4)),
    }


def shown_until(places, k, T) -> int:
    """Where the text that sees image k ends: at the next image that does not follow it directly."""
    while k + 1 < len(places) and places[k + 1] == places[k] + 1:
        k += 1
    return places[k + 1] if k + 1 < len(places) else T


def together(ranges, i, j) -> bool:
    return any(a <= i < b and a <= j < b for a, b in ranges)


def sees_image(p, i, j) -> bool:
    """Images up to a row that stand directly behind one another, the last of them the last before the row."""
    before = [place for place in p["places"] if place <= i]
    if not before:
        return True
    images = {len(before) - 1}
    while min(images) > 0 and before[min(images) - 1] == before[min(images)] - 1:
        images.add(min(images) - 1)
    return any(a <= j < b for a, b in (p["tiles"][image] for image in images))


def sorted_windows(p, i, j) -> bool:
    """Rows and keys are patches in the order of their windows."""
    ids = np.sort(p["windows"])
    return bool(ids[i] == ids[j])


# Row i may see key j; as the model's own source says it, and not as intervals.
RULES = {
    ("LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Idefics3, SmolVLM, InternVL, Pixtral", "all"):
        lambda p, i, j: j <= i,
    ("Mistral, Qwen2 and others with a window", "sliding"): lambda p, i, j: i - p["w"] < j <= i,
    ("PaliGemma, PaliGemma 2", "full"): lambda p, i, j: j <= i or (i < p["P"] and j < p["P"]),
    ("PaliGemma 2", "sliding"): lambda p, i, j: i - p["w"] < j <= i or (i < p["P"] and j < p["P"]),
    ("Gemma 3", "full"): lambda p, i, j: j <= i or together(p["spans"], i, j),
    ("Gemma 3", "sliding"): lambda p, i, j: j > i - p["w"] and (j <= i or together(p["spans"], i, j)),
    ("Gemma 3 as a text encoder", "full"): lambda p, i, j: True,
    ("Gemma 3 as a text encoder", "sliding"): lambda p, i, j: abs(i - j) < p["w"],
    ("Gemma 4", "full"): lambda p, i, j: j <= i,
    ("Gemma 4", 'sliding, `use_bidirectional_attention="vision"`'):
        lambda p, i, j: j > i - p["w"] and (j <= i or together(p["spans"], i, j)),
    ("Gemma 4", "sliding, otherwise"): lambda p, i, j: i - p["w"] < j <= i,
    ("Gemma 4", "audio tower"):
        lambda p, i, j: 0 <= i - j < p["left"] - 1 or 0 < j - i < p["right"],
    ("Llama 4", "full"): lambda p, i, j: j <= i,
    ("Llama 4", "chunked"): lambda p, i, j: j <= i and i // p["c"] == j // p["c"],
    ("Mllama", "text"): lambda p, i, j: j <= i,
    ("Mllama", "cross-attention to image rows"): sees_image,
    ("Mllama", "tower, padding patches last"): lambda p, i, j: i < p["V"] or j < p["V"],
    ("CLIP, SigLIP and other towers", "one image a sequence"): lambda p, i, j: True,
    ("Pixtral, Qwen-VL and Gemma 4 towers", "padding patches last"): lambda p, i, j: i < p["V"] and j < p["V"],
    ("Pixtral, Qwen2-VL, Qwen2.5-VL, Qwen3-VL towers", "full"):
        lambda p, i, j: together(pairwise(p["cu_seqlens"]), i, j),
    ("Qwen2.5-VL tower", "windows, patches sorted by window"): sorted_windows,
    ("BLIP-2 Q-Former, Florence-2, Whisper", "cross-attention"): lambda p, i, j: True,
    ("training, packed", "causal"): lambda p, i, j: j <= i and together(p["cut"], i, j),
    ("training, packed", "Gemma 3, sliding"):
        lambda p, i, j: j > i - p["w"] and (j <= i or together(p["spans"], i, j)) and together(p["cut"], i, j),
}  # fmt: skip


def test_kernels_families_are_all_there():
    assert set(table()) == set(RULES)
    assert len(RULES) > 20


@pytest.mark.parametrize("family", RULES, ids=": ".join)
@given(p=examples())
@settings(max_examples=40, deadline=None)
def test_kernels_family_is_its_composition(family, p):
    names = {name: getattr(intervals, name) for name in intervals.__all__}
    rows = eval(table()[family], {**names, "pairwise": pairwise, "max": max}, p)
    T = len(rows.start)
    S = p["S"] if family[1].startswith("cross") else T
    intervals.check_intervals(*rows, S)
    expected = np.array([[RULES[family](p, i, j) for j in range(S)] for i in range(T)], bool).reshape(T, S)
    np.testing.assert_array_equal(mask_of(*rows, S), expected)


def test_kernels_masks_page_examples_run():
    result = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert result.failed == 0
    assert result.attempted >= 10
