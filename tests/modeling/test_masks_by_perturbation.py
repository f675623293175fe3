"""Who sees whom, layer by layer: change one row that goes in, and see exactly which rows that come out move.

What must move is written out from the families' papers, row by key, and not taken from intervals. Layers get the
prompt's intervals as the engine makes them, dense and, in chunks, through pages.
"""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_files import read_golden

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.engine.admission import prompt_intervals
from aphrodite_jax.executor.batch import Rows, build_batch
from aphrodite_jax.inputs import PlaceholderRange
from aphrodite_jax.modeling.layers.attention import AttentionMetadata
from aphrodite_jax.modeling.layers.rotary import rotary_table
from aphrodite_jax.modeling.loader import load_model
from aphrodite_jax.modeling.models import qwen2_5_vl, qwen2_vl, qwen_vl_inputs
from kernels_pallas.intervals import RowIntervals
from kernels_pallas.pages import pages_shape

pytestmark = pytest.mark.once

LENGTH = 24
PAGE_SIZE = 8
WINDOW = 5
SPANS = {
    "text alone": [],
    "one image": [(5, 9)],
    "two images that touch": [(4, 8), (8, 12)],
    "two images apart": [(3, 6), (10, 14)],
    "a span of one token": [(7, 8)],
    "a span longer than the window": [(4, 13)],
    "a span across pages": [(6, 11)],
    "a span that ends with a page": [(4, 8)],
    "a span at the end": [(19, 24)],
}


def gemma3(row, key, *, spans, window):
    """(Causal, or in one run of image tokens) and within the window before."""
    runs = [(4, 12)] if spans == SPANS["two images that touch"] else spans
    together = any(a <= row < b and a <= key < b for a, b in runs)
    return (key <= row or together) and (window is None or key > row - window)


def paligemma(row, key, *, spans, window):
    """The prompt sees itself whole."""
    return True


@functools.cache
def model_of(name):
    """The golden's model with a window of `WINDOW`, and its config."""
    golden = read_golden(name)
    config = golden.config | {"text_config": golden.config["text_config"] | {"sliding_window": WINDOW}}
    with tempfile.TemporaryDirectory() as directory:
        model_config = ModelConfig(model=golden.write_checkpoint(Path(directory), config=config), dtype="float32")
        return load_model(model_config), model_config.hf_config


def intervals_of(name, spans):
    """Mask kind to the rows of a prompt with images at ``spans``."""
    model, config = model_of(name)
    placeholders = {"image": [PlaceholderRange(a, b - a) for a, b in spans]}
    return prompt_intervals(type(model).mask_specs(config), LENGTH, placeholders)


@functools.cache
def layer_of(name, kind):
    """One layer of a kind, as a function of its rows ``[T, D]``, their positions, a cache and the metadata."""
    model, config = model_of(name)
    text = config.text_config
    layer = next(layer for layer in model.language_model.model.layers if layer.self_attn.mask == kind)
    graphdef, state = nnx.split(layer)

    def call(x, positions, cache, metadata):
        lengths = jnp.full_like(positions, LENGTH)
        table = rotary_table(text, positions, lengths, parameters=layer.rope_parameters(text, kind))
        return nnx.merge(graphdef, state)(x, table, cache, metadata)

    return call


@functools.cache
def dense(name, kind):
    """Rows out of rows in, ``[N, T, D]``, with keys and values of this very call."""
    call = layer_of(name, kind)

    def run(xs, intervals):
        metadata = AttentionMetadata(intervals=intervals)
        return jax.lax.map(lambda x: call(x, jnp.arange(LENGTH), None, metadata)[0], xs)

    return jax.jit(run)


def paged(name, kind, intervals, cut):
    """The same in two chunks, ``[0, cut)`` and the rest, whose keys and values stand in pages."""
    call, text = layer_of(name, kind), model_of(name)[1].text_config
    cache = jnp.zeros(pages_shape(4, text.num_key_value_heads, PAGE_SIZE, text.head_dim, "cpu"))
    chunks = [(begin, end, _chunk(intervals, begin, end)) for begin, end in ((0, cut), (cut, LENGTH))]

    def one(x):
        now, outs = cache, []
        for begin, end, (batch, place) in chunks:
            rows = jnp.zeros((len(batch.positions), x.shape[1])).at[place : place + end - begin].set(x[begin:end])
            out, now = call(rows, batch.positions, now, batch.metadata)
            outs.append(out[place : place + end - begin])
        return jnp.concatenate(outs)

    return jax.jit(lambda xs, intervals: jax.lax.map(one, xs))


def moved(run, intervals, width=64):
    """Whether row i of the output moves when row j of the input does, ``[i, j]``."""
    x = np.random.default_rng(0).normal(size=(LENGTH, width)).astype(np.float32)
    changed = x[None] + 3 * np.eye(LENGTH, dtype=np.float32)[:, :, None] * np.roll(x, 1, axis=1)[None]
    before, *after = np.asarray(run(np.concatenate([x[None], changed]), intervals))
    return (np.abs(after - before).max(axis=-1) > 1e-6).T


def expected(rule, spans, kind):
    window = WINDOW if kind == "sliding" else None
    return np.array([[rule(i, j, spans=spans, window=window) for j in range(LENGTH)] for i in range(LENGTH)])


@pytest.mark.parametrize("what", SPANS)
@pytest.mark.parametrize(("name", "rule"), [("gemma3", gemma3), ("paligemma2", paligemma)])
@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_exactly_the_rows_move_that_see_the_changed_one(name, rule, what, kind):
    intervals = intervals_of(name, SPANS[what])
    assert set(intervals) == {"full", "sliding"}
    actual = moved(dense(name, kind), intervals)
    np.testing.assert_array_equal(actual, expected(rule, SPANS[what], kind))


@pytest.mark.parametrize("what", ["a span longer than the window", "a span across pages"])
@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_the_same_rows_move_in_chunks_through_pages(kind, what):
    """The second chunk begins where the last span ends."""
    intervals, spans = intervals_of("gemma3", SPANS[what]), SPANS[what]
    actual = moved(paged("gemma3", kind, intervals, cut=spans[-1][1]), intervals)
    np.testing.assert_array_equal(actual, expected(gemma3, spans, kind))


def _chunk(rows, begin, end):
    part = Rows(
        token_ids=np.zeros(end - begin, np.int32),
        start=begin,
        prompt_length=LENGTH,
        intervals={kind: RowIntervals(x.start[begin:end], x.stop[begin:end]) for kind, x in rows.items()},
        pages=np.array([2, 0, 3], np.int32),
    )
    batch, offsets = build_batch(
        [],
        [part],
        num_decode=0,
        num_prefill=24,
        num_requests=1,
        tile_size=8,
        mask_kinds=tuple(rows),
        page_size=PAGE_SIZE,
        num_pages=4,
        max_pages=3,
    )
    return jax.tree.map(jnp.asarray, batch), int(offsets[0])


# Qwen2.5-VL's tower.

GRIDS = {"an image": (1, 3, 5), "a video": (2, 2, 3), "one window": (1, 1, 2), "a narrow image": (1, 1, 7)}
PADDED_SQUARES = 16


@functools.cache
def tower():
    golden = read_golden("qwen2_5_vl")
    with tempfile.TemporaryDirectory() as directory:
        model_config = ModelConfig(model=golden.write_checkpoint(Path(directory)), dtype="float32")
        return load_model(model_config).visual, model_config.hf_config


@functools.cache
def block_of(kind):
    """A block of the tower that sees windows, or all of a layer, as a function of hidden states ``[N, T, D]``."""
    visual, config = tower()
    full = config.vision_config.fullatt_block_indexes
    index = next(i for i in range(config.vision_config.depth) if (i in full) == (kind == "full"))
    graphdef, state = nnx.split(visual.blocks[index])

    def run(xs, positions, bounds):
        rotary = qwen2_vl.axial_rotary_table(config.vision_config, positions[None])
        intervals = RowIntervals(bounds[None, :, 0], bounds[None, :, 1])
        return jax.lax.map(lambda x: nnx.merge(graphdef, state)(x[None], rotary, intervals)[0], xs)

    return jax.jit(run)


@pytest.mark.parametrize("what", GRIDS)
@pytest.mark.parametrize("kind", ["full", "window"])
def test_patches_move_within_their_window_or_layer(kind, what):
    """A window is two squares of patches a side; squares behind the image are padding."""
    _, config = tower()
    vision, grid = config.vision_config, GRIDS[what]
    num_patches = int(np.prod(grid)) * vision.spatial_merge_size**2
    patches = np.zeros((num_patches, qwen_vl_inputs.patch_width(vision)), np.float32)
    arrays = {f"image_{name}": x[None] for name, x in qwen2_5_vl.arrange(config, patches, grid).items()}
    padded = qwen2_5_vl.Qwen2_5_VLForConditionalGeneration.pad_media(config, arrays)
    positions, bounds = padded["image_positions"][0], padded[f"image_{'frames' if kind == 'full' else 'windows'}"][0]
    total, width = len(positions), vision.hidden_size
    assert total == PADDED_SQUARES * vision.spatial_merge_size**2

    layer = np.arange(num_patches) * grid[0] // num_patches  # windows of a layer stand together
    window = positions[:num_patches] // (vision.window_size // vision.patch_size)
    same = layer[:, None] == layer[None]
    if kind == "window":
        same &= (window[:, None] == window[None]).all(-1)
    expected = np.eye(total, dtype=bool)
    expected[:num_patches, :num_patches] = same

    x = np.random.default_rng(0).normal(size=(total, width)).astype(np.float32)
    changed = x[None] + 3 * np.eye(total, dtype=np.float32)[:, :, None] * np.roll(x, 1, axis=1)[None]
    before, *after = np.asarray(block_of(kind)(np.concatenate([x[None], changed]), positions, bounds))
    moved = (np.abs(after - before).max(axis=-1) > 1e-6).T
    np.testing.assert_array_equal(moved, expected)
    assert kind == "full" or what == "one window" or same.sum() < (layer[:, None] == layer[None]).sum()
