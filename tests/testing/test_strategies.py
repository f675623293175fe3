"""What the strategies make up is what a user may give, of every kind, and the same in every run."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.multimodal import open_image
from aphrodite_jax.testing import IMAGE_MODES, Broken, arrivals, images, requests, row_intervals, spans, videos
from aphrodite_jax.testing.search import search
from kernels_pallas.intervals import to_mask

MODEL = ModelConfig()


def drawn(strategy, most=60):
    """Examples, the same in every run."""
    found = []

    def keep(example):
        found.append(example)

    search(strategy, keep, most=most)
    return found


@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_images_of_every_mode_can_be_opened(mode):
    found = drawn(images(most=5, modes=(mode,)), most=20)
    assert {image.mode for image in found} == {mode}
    assert len({open_image(image, MODEL).tobytes() for image in found}) > 5


def test_images_are_of_every_kind():
    found = drawn(images(most=3), most=300)
    assert len({image.mode for image in found}) > len(IMAGE_MODES) / 2
    assert {image.size for image in found} == {(width, height) for width in (1, 2, 3) for height in (1, 2, 3)}
    turned = [image for image in found if image.getexif().get(0x0112, 1) >= 5]
    assert any(open_image(image, MODEL).size != image.size for image in turned)
    larger = [np.asarray(open_image(image, MODEL)) for image in found if min(image.size) > 1]
    assert 0 < sum((pixels == pixels[0, 0]).all() for pixels in larger) < len(larger) / 2  # of one colour, some


def test_images_may_be_kept_plain():
    found = drawn(images(least=2, most=3, modes=("L",), turned=False))
    assert {image.mode for image in found} == {"L"}
    assert min(min(image.size) for image in found) == 2
    assert not any(image.getexif() for image in found)


def test_videos():
    found = drawn(videos(least_frames=2, most_frames=4, most=3))
    assert {len(video) for video in found} == {2, 3, 4}
    assert {video.timestamps is None for video in found} == {True, False}


def test_requests_have_a_placeholder_for_each_item():
    items = {"image": images(most=2), "video": videos(most=2)}
    found = drawn(requests(items, {"image": 90, "video": 91}, [3, 4, 5], fewest=1, most=2, most_tokens=4))
    counts = set()
    for tokens, media in found:
        counts.add((len(media["image"]), len(media["video"])))
        assert (tokens.count(90), tokens.count(91)) == (len(media["image"]), len(media["video"]))
        assert 1 <= sum(token in (3, 4, 5) for token in tokens) <= 4
    assert counts == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert "image" not in min(drawn(requests(items, {"image": 90, "video": 91}, [3])), key=lambda x: len(x[0]))[1]


def test_arrivals_come_together_or_apart():
    found = drawn(arrivals(requests({}, {}, [3]), most=2))
    assert {len(schedule) for schedule in found} == {1, 2}
    assert {0, 1} <= {wait for schedule in found for wait, _ in schedule}


@settings(database=None, derandomize=True)
@given(st.integers(1, 12).flatmap(lambda length: st.tuples(st.just(length), spans(length))))
def test_spans_stand_apart_and_in_order(example):
    length, found = example
    ends = [0, *(place for span in found for place in span)]
    assert ends == sorted(ends)
    assert len(set(ends[1:])) == 2 * len(found)
    assert ends[-1] <= length


@settings(database=None, derandomize=True)
@given(st.integers(1, 12).flatmap(row_intervals))
def test_every_row_of_a_mask_sees_itself(rows):
    assert to_mask(rows, len(rows.start)).diagonal().all()


def test_masks_are_of_every_kind():
    masks = [to_mask(rows, 4) for rows in drawn(row_intervals(4), most=200)]
    assert any(mask.all() for mask in masks)  # prefix-LM
    assert any((mask == np.tri(4)).all() for mask in masks)
    assert any((mask == np.eye(4)).all() for mask in masks)  # a window of one
    assert any(mask[1, 2] and not mask[1, 3] for mask in masks)  # a span


def test_the_smallest_example_is_told():
    def check_size(image):
        if image.width > 6:
            raise Broken("too wide")

    with pytest.raises(Broken, match=r"too wide; the smallest example: RGB image of 7 x 1$"):
        search(images(), check_size, most=50)


def test_other_errors_are_told_as_they_are():
    def check_mode(image: Image.Image):
        raise KeyError(image.mode)

    with pytest.raises(Broken, match="KeyError: 'RGB'; the smallest example: RGB image of 1 x 1"):
        search(images(), check_mode, most=5)
