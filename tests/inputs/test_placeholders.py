"""Placeholders: any number of them expands, and the ranges are where the tokens are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aphrodite_jax.errors import PlaceholderError
from aphrodite_jax.inputs import LLMInputs, PlaceholderRange, expand_items, expand_placeholders

PLACEHOLDER = 9


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 8), max_size=4), st.integers(1, 6)), max_size=6),
    st.lists(st.integers(0, 8)),
)
def test_expansion(parts, tail):
    """A prompt of texts, each but the last before a placeholder."""
    tokens = [token for text, _ in parts for token in [*text, PLACEHOLDER]] + tail
    lengths = [length for _, length in parts]
    before = list(tokens), list(lengths)
    expanded, ranges = expand_placeholders(tokens, PLACEHOLDER, lengths)
    assert (tokens, lengths) == before
    assert expanded == tuple(t for text, length in parts for t in [*text, *[PLACEHOLDER] * length]) + tuple(tail)
    assert [span.length for span in ranges] == lengths
    inside = [position for span in ranges for position in range(span.offset, span.stop)]
    assert inside == [position for position, token in enumerate(expanded) if token == PLACEHOLDER]
    # A range covers its own item: the tokens before it are the texts and items before it.
    for index, span in enumerate(ranges):
        assert span.offset == sum(len(text) + length for text, length in parts[:index]) + len(parts[index][0])
    assert [token for token in expanded if token != PLACEHOLDER] == [token for token in tokens if token != PLACEHOLDER]


@pytest.mark.parametrize(("count", "lengths"), [(0, [3]), (1, []), (1, [3, 3]), (3, [2, 2])])
def test_placeholders_and_items_that_do_not_match(count, lengths):
    with pytest.raises(PlaceholderError) as info:
        expand_placeholders([1, *[PLACEHOLDER] * count, 2], PLACEHOLDER, lengths)
    assert str(info.value) == (
        f"the prompt has {count} placeholders (token 9) for {len(lengths)} items: write one for each item; it is "
        "expanded here"
    )


def test_modalities_one_after_another():
    """7 stands for an image of two rows, 8 for a video of two runs of three rows with text between; 9 is its row."""
    inputs = LLMInputs(prompt_token_ids=(1, 8, 7, 2, 7, 8), multi_modal_data={"image": ("a", "b"), "video": ("c", "d")})
    inputs = expand_items(inputs, "image", 7, [2, 2])
    inputs = expand_items(inputs, "video", 8, [(9, 9, 9, 5, 9, 9, 9), (9, 5)], row_token=9)
    assert inputs.prompt_token_ids == (1, 9, 9, 9, 5, 9, 9, 9, 7, 7, 2, 7, 7, 9, 5)
    assert [(span.offset, span.length) for span in inputs.placeholders["image"]] == [(8, 2), (11, 2)]
    first, second = inputs.placeholders["video"]
    assert (first.offset, first.length, first.num_rows) == (1, 7, 6)
    assert first.row_tokens.tolist() == [1, 2, 3, 5, 6, 7]
    assert (second.offset, second.length, second.row_tokens.tolist()) == (13, 2, [13])


@pytest.mark.parametrize("lengths", [[0, 1], [1, -1]])
def test_an_item_takes_a_token_at_least(lengths):
    with pytest.raises(PlaceholderError, match="an item takes at least one token, got lengths"):
        expand_placeholders([PLACEHOLDER, PLACEHOLDER], PLACEHOLDER, lengths)


def test_inputs_are_values_of_their_own():
    tokens, images, ranges = [1, 2], ["a"], [PlaceholderRange(0, 1)]
    data, placeholders = {"image": images}, {"image": ranges}
    inputs = LLMInputs(prompt_token_ids=tokens, multi_modal_data=data, placeholders=placeholders)
    tokens.append(3)
    ranges.append(PlaceholderRange(1, 1))
    data["video"] = []
    placeholders.clear()
    assert inputs.prompt_token_ids == (1, 2)
    assert dict(inputs.multi_modal_data) == {"image": images}
    assert dict(inputs.placeholders) == {"image": (PlaceholderRange(0, 1),)}
    with pytest.raises(TypeError):
        inputs.multi_modal_data["video"] = []
    with pytest.raises(TypeError):
        inputs.placeholders["video"] = ()
    with pytest.raises(AttributeError):
        inputs.prompt = "x"
    assert PlaceholderRange(3, 4).stop == 7
