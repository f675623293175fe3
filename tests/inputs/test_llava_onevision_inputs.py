"""LLaVA-OneVision's tiles and frames: their tokens, the bounds, shapes that are compiled ahead, and what is refused."""

import copy
import json
import math

import checkpoints
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from golden_files import read_golden
from hypothesis import strategies as st
from media_inputs import declared_shapes, mapped, padded_shapes, picture, processed, video

from aphrodite_jax import ModelConfig
from aphrodite_jax.errors import ConfigError, MediaError
from aphrodite_jax.inputs import INPUT_REGISTRY, LLMInputs
from aphrodite_jax.modeling.loader import load_model
from aphrodite_jax.modeling.models import llava_onevision
from aphrodite_jax.multimodal import InputContext

pytestmark = pytest.mark.once

GOLDEN = read_golden("llava_onevision")
TILE, SIDE, FRAME_ROWS = 35, 5, 9
IMAGE, VIDEO = checkpoints.IMAGE_TOKEN, GOLDEN.described["special_tokens"]["<video>"]
PUBLISHED = transformers.LlavaOnevisionConfig()
"""The grids, tiles and limits of all published checkpoints."""

PLACEHOLDERS = {"i": IMAGE, "v": VIDEO}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return GOLDEN.write_checkpoint(tmp_path_factory.mktemp("llava_onevision"))


@pytest.fixture(scope="module")
def model_config(directory):
    return ModelConfig(model=directory, limit_mm_per_prompt={"image": 2, "video": 2})


def hugging_face(config):
    """Hugging Face's processor, for its counts of tokens alone: to be made whole it needs torchvision."""
    processor = transformers.LlavaOnevisionProcessor.__new__(transformers.LlavaOnevisionProcessor)
    processor.image_processor = transformers.LlavaOnevisionImageProcessorPil(
        image_grid_pinpoints=config.image_grid_pinpoints
    )
    processor.num_image_tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    processor.vision_aspect_ratio = config.vision_aspect_ratio
    processor.image_token, processor.video_token = "<image>", "<video>"
    return processor


def reference_image_tokens(config, size):
    pixels = np.broadcast_to(0, (1, 1, 3, *[config.vision_config.image_size] * 2))
    inputs = {"image_sizes": [size], "batch_num_images": [1], "pixel_values": pixels}
    return hugging_face(config).replace_image_token(inputs, 0).count("<image>")


sides = st.one_of(st.integers(1, 300), st.sampled_from([TILE, 2 * TILE, 3 * TILE, 384, 768, 1536, 2304, 5000]))
sizes = st.tuples(sides, sides)


# Tokens.


@hypothesis.given(sizes, st.integers(1, 12))
@hypothesis.example((1, 200), 9)
@hypothesis.example((300, 1), 1)
@hypothesis.settings(deadline=None, max_examples=150)
def test_an_image_takes_as_many_tokens_as_in_hugging_face(model_config, size, most_tiles):
    for config in (copy.copy(model_config.hf_config), copy.copy(PUBLISHED)):
        config.vision_aspect_ratio = f"anyres_max_{most_tiles}"
        assert llava_onevision.num_image_tokens(config, size) == reference_image_tokens(config, size)
    index, weight = llava_onevision.image_means(config, size)
    assert index.shape == weight.shape == (llava_onevision.num_image_tokens(config, size), 4)
    np.testing.assert_allclose(weight.sum(axis=1), 1, rtol=0, atol=1e-6)
    tiles, side = 1 + math.prod(llava_onevision.grid_of(config, size)), llava_onevision.patches_a_side(config)
    np.testing.assert_array_equal(index[: side**2, 0], 1 + np.arange(side**2))
    assert index[side**2 :].max(initial=0) <= tiles * side**2
    lines, columns = llava_onevision.scaled(config, llava_onevision.picture_of(config, size))
    assert ((index == 0).all(axis=1).nonzero()[0] == side**2 + columns + (columns + 1) * np.arange(lines)).all()


@pytest.mark.parametrize("frames", [1, 3, 32])
def test_a_video_takes_as_many_tokens_as_in_hugging_face(model_config, frames):
    inputs = {"pixel_values_videos": [np.broadcast_to(0, (frames, 3, TILE, TILE))]}
    for config in (model_config.hf_config, PUBLISHED):
        count = hugging_face(config).replace_video_token(inputs, 0).count("<video>")
        assert llava_onevision.num_video_tokens(config, frames) == count
        index, weight = llava_onevision.video_means(config, frames)
        assert index.shape == weight.shape == (count, 4)
        assert (index == 0).all(axis=1).nonzero()[0].tolist() == [count - 1]


def test_a_row_is_the_mean_of_the_patches_round_its_place():
    """Made of the patches' own places, rows have theirs, for no centre here lies beyond those of the picture."""
    index, weight = llava_onevision._resized(np.arange(7 * 12).reshape(7, 12), (3, 5))
    line, column = ((places[index] * weight).sum(axis=-1) for places in np.divmod(np.arange(7 * 12), 12))
    expected = np.meshgrid((np.arange(3) + 0.5) * 7 / 3 - 0.5, (np.arange(5) + 0.5) * 12 / 5 - 0.5, indexing="ij")
    np.testing.assert_allclose([line, column], expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(llava_onevision._between(4, 3)[1][:2], [[5 / 6, 1 / 6], [1 / 2, 1 / 2]])


@pytest.mark.parametrize("order", ["iv", "vi", "vtivi", "vviti"])
def test_images_and_videos_in_any_order(model_config, order):
    images = [picture((20, 20 * (1 + index))) for index in range(order.count("i"))]
    videos = [video(1 + index) for index in range(order.count("v"))]
    inputs = processed(model_config, PLACEHOLDERS, f"t{order}t", images, videos)
    alone = {"i": iter(images), "v": iter(videos)}
    expected, places = [5], {"i": [], "v": []}
    for letter in order:
        if letter in alone:
            item = [next(alone[letter])]
            one = processed(model_config, PLACEHOLDERS, letter, **{"images" if letter == "i" else "videos": item})
            places[letter].append((len(expected), len(one.prompt_token_ids)))
            expected += one.prompt_token_ids
        else:
            expected.append(5)
    assert list(inputs.prompt_token_ids) == [*expected, 5]
    found = [
        [(place.offset, place.length) for place in inputs.placeholders[modality]] for modality in ("image", "video")
    ]
    assert found == [places["i"], places["v"]]


def test_rows_computed_beforehand(model_config):
    rows = np.zeros((7, 64), np.float32)
    inputs = processed(model_config, PLACEHOLDERS, "iv", [rows], [rows])
    assert inputs.prompt_token_ids == (IMAGE,) * 7 + (VIDEO,) * 7


def test_frames_are_scaled_as_the_video_processor_s_file_says(model_config):
    options = GOLDEN.described["files"]["video_preprocessor_config.json"]
    frame = np.asarray(checkpoints.images_of([(TILE, TILE)], 0)[0])
    pixels = mapped(model_config, "video", frame[None])["pixel_values_videos"]
    expected = (frame / 255 - options["image_mean"]) / options["image_std"]
    np.testing.assert_allclose(pixels[0, 0], expected.transpose(2, 0, 1), rtol=0, atol=1e-5)


# Bounds and shapes.


def test_the_bounds_are_reached_by_the_dummy_data(model_config):
    context = InputContext(model_config)
    dummy = llava_onevision.dummy_data(context, 512, {"image": 2, "video": 2})
    inputs = INPUT_REGISTRY.process_input(
        model_config, LLMInputs(prompt_token_ids=dummy.prompt_token_ids, multi_modal_data=dummy.multi_modal_data)
    )
    assert len(inputs.prompt_token_ids) == 512
    most, frames = llava_onevision.max_image_tokens(context), llava_onevision.max_frames(context)
    lengths = {modality: {place.length for place in places} for modality, places in inputs.placeholders.items()}
    assert lengths == {"image": {most}, "video": {llava_onevision.max_video_tokens(context)}}
    assert {len(video) for video in dummy.multi_modal_data["video"]} == {frames}
    more = llava_onevision.num_video_tokens(model_config.hf_config, frames + 1)
    assert 2 * most + 2 * more > 512, "another frame would not fit"


@hypothesis.given(sizes)
@hypothesis.settings(deadline=None, max_examples=150)
def test_no_image_takes_more_than_the_bound(model_config, size):
    for config in (model_config.hf_config, PUBLISHED):
        tiles = llava_onevision.encoded_tiles(config, 1 + math.prod(llava_onevision.grid_of(config, size)))
        most = llava_onevision.num_image_tokens(config, llava_onevision.largest_images(config)[tiles])
        assert llava_onevision.num_image_tokens(config, size) <= most
        assert most <= llava_onevision.num_image_tokens(config, llava_onevision.size_of_most_rows(config))


def test_little_of_the_work_is_for_padding():
    counts = llava_onevision.tile_counts(PUBLISHED)
    assert counts == [37, 26, 19, 13, 10, 7, 5, 3, 2]
    photos = [(300, 400), (480, 640), (600, 400), (1080, 1920), (1024, 1024), (2000, 1500), (3000, 4000), (297, 210)]
    tiles = [1 + math.prod(llava_onevision.grid_of(PUBLISHED, size)) for size in photos]
    encoded = [llava_onevision.encoded_tiles(PUBLISHED, count) for count in tiles]
    assert all(more <= 1.25 * fewer for more, fewer in zip(encoded, tiles, strict=True))
    assert sum(encoded) <= 1.2 * sum(tiles)


@hypothesis.given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=4, max_size=4))
@hypothesis.settings(deadline=None, max_examples=8)
def test_every_image_has_one_of_the_shapes_of_the_examples(model_config, sizes):
    config, shapes = model_config.hf_config, declared_shapes(model_config)
    assert padded_shapes(model_config, "image", map(picture, sizes)) <= shapes
    assert padded_shapes(model_config, "image", map(picture, llava_onevision.largest_images(config).values())) <= shapes


def test_every_video_has_one_of_the_shapes_of_the_examples(model_config):
    most = llava_onevision.max_frames(InputContext(model_config))
    assert most > 16
    shapes = padded_shapes(model_config, "video", [video(count) for count in (1, 8, 9, 16, 17, most)])
    assert len(shapes) == 3
    assert shapes <= declared_shapes(model_config)


def test_padding_does_not_change_an_item_s_rows(model_config):
    model = load_model(model_config)
    encode = jax.jit(lambda arrays: model.embed_multimodal(**arrays))
    items = {"image": checkpoints.images_of([(60, 100)], 0)[0], "video": checkpoints.video_of((3, 30, 40), 0)}
    for modality, item in items.items():
        arrays = mapped(model_config, modality, item)
        padded = llava_onevision.pad_media(model_config.hf_config, arrays)
        [rows], [more] = encode(arrays)[modality], encode(padded)[modality]
        assert len(more) > len(rows)
        np.testing.assert_allclose(more[: len(rows)], rows, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(rows[-1], model.image_newline[...])


# What is refused.


def test_a_processor_with_other_tiles_is_refused(directory):
    model_config = ModelConfig(model=directory, mm_processor_kwargs={"image_grid_pinpoints": [[TILE, 3 * TILE]]})
    with pytest.raises(ConfigError, match=r"\[4, 3, 35, 35\] of an image of 70 x 70 .* says \[5, 3, 35, 35\]"):
        mapped(model_config, "image", picture((70, 70)))


def test_frames_of_another_size_are_refused(tmp_path):
    directory = GOLDEN.write_checkpoint(tmp_path)
    options = {"size": {"height": 28, "width": 28}}
    (directory / "video_preprocessor_config.json").write_text(json.dumps(options))
    with pytest.raises(ConfigError, match="makes frames of 28 x 28 pixels, the tower takes 35 x 35"):
        mapped(ModelConfig(model=directory), "video", video(2))


def test_too_many_frames(model_config):
    with pytest.raises(MediaError, match=r'33 frames, at most 32 are taken: .* video_sampling=\{"num_frames": 32\}'):
        mapped(model_config, "video", video(33))


def build(config):
    config = transformers.LlavaOnevisionConfig.from_dict(config)
    return llava_onevision.LlavaOnevisionForConditionalGeneration(config, dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio 'anyres' is not supported: it is 'anyres_max_' and"),
        ({"vision_aspect_ratio": "anyres_max_0"}, "vision_aspect_ratio 'anyres_max_0' is not supported"),
        ({"vision_feature_select_strategy": "default"}, "strategy 'default' of LLaVA-OneVision is not supported"),
        (
            {"vision_config": read_golden("llava_clip_llama").config["vision_config"]},
            "LLaVA-OneVision over a clip_vision_model is not supported",
        ),
    ],
)
def test_configs_that_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        nnx.eval_shape(lambda: build(GOLDEN.config | fields))
