"""Examples in one row axis: where they stand, in which order they come, and that none is changed by another."""

import dataclasses
import itertools
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuning_cases import compiled_loss, shared_case

from aphrodite_jax.tuning import BatchSizes, Example, ExamplePreparer, PreparedExample, pack
from aphrodite_jax.tuning.packing import WINDOW, pack_order
from kernels_pallas.intervals import causal, check_intervals

SHAPE = (("pixel_values", (3, 28, 28), "float32"),)


def text_example(tokens, prompt_length):
    rows = len(tokens) - 1
    return PreparedExample(
        tokens=np.array(tokens, np.int32),
        prompt_length=prompt_length,
        positions=np.arange(rows, dtype=np.int32),
        intervals={"full": causal(rows), "sliding": causal(rows, window=2)},
        media=(),
        encoded_rows=(),
    )


def test_a_batch_row_by_row():
    batch = pack([text_example([5, 6, 7, 2], 2), text_example([8, 9, 2], 1)], BatchSizes(rows=6, answers=5))
    rows = {
        "input_ids": [5, 6, 7, 8, 9, 0],
        "positions": [0, 1, 2, 0, 1, 0],
        "media_rows": [-1] * 6,
        "answer_rows": [1, 2, 3, 4, 0],
        "targets": [7, 2, 9, 2, 0],
        "counts": [True, True, True, True, False],
    }
    for name, expected in rows.items():
        np.testing.assert_array_equal(getattr(batch, name), expected, err_msg=name)
    np.testing.assert_array_equal(batch.metadata.lengths, [2, 2, 3, 1, 2, 1])
    for kind, start in (("full", [0, 0, 0, 3, 3, 0]), ("sliding", [0, 0, 1, 3, 3, 0])):
        np.testing.assert_array_equal(batch.metadata.intervals[kind].start, start)
        np.testing.assert_array_equal(batch.metadata.intervals[kind].stop, [1, 2, 3, 4, 5, 0])
        check_intervals(*batch.metadata.intervals[kind], 6)


def test_too_many_rows_are_refused():
    example = text_example([5, 6, 7, 2], 2)
    with pytest.raises(ValueError, match="6 rows and 4 tokens of answers do not fit in 5 and 4"):
        pack([example, example], BatchSizes(rows=5, answers=4))


def test_items_are_filled_up_to_the_most_of_a_run_or_halves_of_it():
    sizes = BatchSizes.for_counts([[(2, Counter({SHAPE: 3})), (1, Counter({SHAPE: 4}))], [(5, Counter())]], rows=64)
    assert (sizes.rows, sizes.answers, sizes.media) == (64, 5, {SHAPE: 7})
    assert [sizes.items(SHAPE, count) for count in range(1, 8)] == [1, 2, 4, 4, 7, 7, 7]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=2 * WINDOW),
    row_length=st.integers(16, 48),
    seed=st.integers(0, 2**31),
)
def test_packs_are_full_and_pass_nobody_over(lengths, row_length, seed):
    packs = list(itertools.islice(pack_order(lengths, row_length, seed=seed), 40))
    assert packs == list(itertools.islice(pack_order(lengths, row_length, seed=seed), 40))
    for taken in packs:
        free = row_length - sum(lengths[index] for index in taken)
        assert 0 <= free < max(lengths)
    counts = Counter(itertools.chain.from_iterable(packs))
    often = [counts[index] for index in range(len(lengths))]
    assert max(often) - min(often) <= min(WINDOW, len(lengths)) + 1


def test_equal_examples_come_once_an_epoch():
    packs = list(itertools.islice(pack_order([4] * 100, 203, seed=0), 4))
    assert [len(taken) for taken in packs] == [50] * 4
    first, second = sorted(packs[0] + packs[1]), sorted(packs[2] + packs[3])
    assert first == second == list(range(100))
    assert packs[0] != packs[2]


def test_the_order_hangs_on_the_seed():
    first = [next(pack_order([4] * 50, 16, seed=seed)) for seed in range(3)]
    assert len(set(first)) == 3


def weighted(values, examples):
    """The mean over all tokens of answers, from those of each example."""
    weights = [example.num_answers / sum(e.num_answers for e in examples) for example in examples]
    return jax.tree.map(lambda *xs: sum(np.asarray(x) * w for x, w in zip(xs, weights, strict=True)), *values)


@pytest.mark.parametrize("name", ["llava_clip_mistral", "paligemma2", "gemma3_short_window", "qwen2_vl"])
def test_examples_of_a_pack_do_not_meet(name):
    """Windows, a prefix, spans that see themselves, positions on three axes; pictures in several shapes, videos.

    The loss of one example stays, whatever stands round it; all programs are one.
    """
    case = shared_case(name)
    examples, loss = case.prepared, compiled_loss(case.model)
    sizes = BatchSizes.of([examples], case.num_rows + 5)
    for index in range(len(examples)):
        others = [e if i == index else unlike(e) for i, e in enumerate(examples)]
        turned = others[index:] + others[:index]
        expected = loss(counting(pack(examples, sizes), examples, index))
        np.testing.assert_allclose(loss(counting(pack(turned, sizes), turned, 0)), expected, rtol=1e-5)
        changed = [unlike(examples[index]), *turned[1:]]
        assert abs(loss(counting(pack(changed, sizes), changed, 0)) - expected) > 1e-2


def counting(batch, examples, index):
    """The batch in which the answer of one example alone counts."""
    ends = np.cumsum([0, *(example.num_answers for example in examples)])
    places = np.arange(len(batch.counts))
    return dataclasses.replace(batch, counts=(ends[index] <= places) & (places < ends[index + 1]))


def unlike(example):
    """An example of the same form with other tokens and pixels."""
    media = tuple(
        dataclasses.replace(item, mm_kwargs={n: -x if x.dtype.kind == "f" else x for n, x in item.mm_kwargs.items()})
        for item in example.media
    )
    return dataclasses.replace(example, tokens=(example.tokens + np.int32(50)) % np.int32(150), media=media)


@pytest.mark.once
def test_gradients_of_a_pack_are_those_of_its_examples():
    case = shared_case("llava_clip_llama")
    examples, loss = case.prepared[1:], compiled_loss(case.model, gradient=True)
    sizes = BatchSizes.of([examples], case.num_rows)
    alone = [loss(pack([example], sizes)) for example in examples]
    together = loss(pack(examples, sizes))
    chex.assert_trees_all_close(together, weighted(alone, examples), rtol=0, atol=1e-5)
    assert any(np.abs(x).max() > 1e-2 for x in jax.tree.leaves(together))


def test_rows_that_were_computed_before_stand_in_the_place_of_pictures():
    case = shared_case("llava_clip_mistral")
    with_pixels, sizes = case.prepared[2], BatchSizes.of([case.prepared], case.num_rows)
    pixels = jnp.concatenate([item.mm_kwargs["pixel_values"] for item in with_pixels.media])
    rows = np.asarray(jax.jit(lambda x: jnp.stack(case.model.embed_multimodal(pixel_values=x)["image"]))(pixels))
    example = case.examples[2]
    given = Example(prompt=example.prompt, answer=example.answer, multi_modal_data={"image": list(rows)})
    prepared = ExamplePreparer(case.model, case.model_config)(given)
    np.testing.assert_array_equal(prepared.tokens, with_pixels.tokens)
    loss, batch = compiled_loss(case.model), pack([case.prepared[1], prepared], sizes)
    assert batch.embeds.shape == (48, rows.shape[-1])
    expected = loss(pack([case.prepared[1], with_pixels], sizes))
    np.testing.assert_allclose(loss(batch), expected, rtol=1e-5)
