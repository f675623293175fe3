"""Idefics3's tiles: tokens of an image of any size, the bound, shapes that are compiled ahead, and what is refused."""

import json
import types

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
from media_inputs import declared_shapes, padded_shapes
from PIL import Image

from aphrodite_jax import LLM, ModelConfig, SamplingParams
from aphrodite_jax.errors import ConfigError, MediaError, RegistrationError
from aphrodite_jax.inputs import INPUT_REGISTRY, LLMInputs
from aphrodite_jax.modeling.loader import load_model
from aphrodite_jax.modeling.models import idefics3
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, InputContext

pytestmark = pytest.mark.once

GOLDEN = read_golden("idefics3")
TILE, ROWS = 28, 4
TOKENS_OF_LARGEST = 4 * (2 + ROWS) + 2 + (2 + ROWS + 1)
"""Two by two tiles, each behind two tokens, a token at the end of each of two lines; the whole between three tokens."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return GOLDEN.write_checkpoint(tmp_path_factory.mktemp("idefics3"))


@pytest.fixture(scope="module")
def model_config(directory):
    return ModelConfig(model=directory)


@pytest.fixture(scope="module")
def processor(directory):
    return transformers.Idefics3Processor(
        transformers.AutoImageProcessor.from_pretrained(directory, backend="pil"),
        transformers.AutoTokenizer.from_pretrained(directory),
        image_seq_len=ROWS,
    )


def picture(size):
    height, width = size
    return Image.new("RGB", (width, height))


def processed(model_config, *images):
    text = LLMInputs(
        prompt_token_ids=(5, *[checkpoints.IMAGE_TOKEN] * len(images), 6), multi_modal_data={"image": list(images)}
    )
    return INPUT_REGISTRY.process_input(model_config, text)


sides = st.one_of(st.integers(1, 300), st.sampled_from([TILE, 2 * TILE, 3 * TILE, 2000]))
sizes = st.tuples(sides, sides)


@hypothesis.given(sizes, st.integers(20, 130), st.integers(20, 60))
@hypothesis.example((4500, 10), 5000, 256)
@hypothesis.example((2000, 10), 98, 49)
@hypothesis.settings(deadline=None, max_examples=60)
def test_an_image_is_cut_as_in_hugging_face(size, longest_edge, tile_size):
    tiles = idefics3.Tiling(longest_edge=longest_edge, tile_size=tile_size, rows=ROWS, splits=True)
    processor = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": longest_edge}, max_image_size={"longest_edge": tile_size}
    )
    try:
        grid = idefics3.grid_of(tiles, size)
    except MediaError:
        with pytest.raises(ValueError, match="size must be a dictionary with key"):  # it says so of a width of 0
            processor(picture(size))
        return
    features = processor(picture(size), return_row_col_info=True)
    assert grid == (features["rows"][0][0], features["cols"][0][0])
    assert features["pixel_values"].shape == (1, 1 + grid[0] * grid[1], 3, tile_size, tile_size)
    assert features["pixel_attention_mask"].all(), "no tile is padded"
    assert np.prod(grid) <= np.prod(idefics3.grid_of(tiles, (1, 1))), "a square image has the most tiles"


@hypothesis.given(st.lists(sizes, min_size=1, max_size=2))
@hypothesis.settings(deadline=None, max_examples=25)
def test_images_become_the_tokens_of_hugging_face_s_processor(directory, processor, image_sizes):
    model_config = ModelConfig(model=directory, limit_mm_per_prompt={"image": 2})
    images = list(map(picture, image_sizes))
    text = " ".join(["w5", *["<image>"] * len(images), "w6"])
    inputs = processed(model_config, *images)
    assert list(inputs.prompt_token_ids) == processor(text=[text], images=[images])["input_ids"][0]
    for place, image in zip(inputs.placeholders["image"], images, strict=True):
        tiles = MULTIMODAL_REGISTRY.map_items(model_config, "image", [image])["pixel_values"].shape[1]
        assert place.num_rows == tiles * ROWS
        assert place.length <= TOKENS_OF_LARGEST
        around = model_config.hf_config.image_token_id - 3  # <fake_token_around_image>
        assert inputs.prompt_token_ids[place.offset] == inputs.prompt_token_ids[place.stop - 1] == around


def test_the_bound_is_reached_by_the_dummy_data(model_config):
    context = InputContext(model_config)
    assert idefics3.max_image_tokens(context) == TOKENS_OF_LARGEST
    dummy = idefics3.dummy_data(context, 300, {"image": 2})
    assert {image.size for image in dummy.multi_modal_data["image"]} == {(2 * TILE, 2 * TILE)}
    assert len(dummy.prompt_token_ids) == 2 + 300 - 2 * TOKENS_OF_LARGEST


@pytest.mark.parametrize("most", range(1, idefics3.MAX_TILES_A_SIDE + 1))
def test_every_image_has_one_of_the_shapes_of_the_examples(directory, most):
    model_config = ModelConfig(model=directory, mm_processor_kwargs={"size": {"longest_edge": most * TILE}})

    sizes = [(1, 300), (300, 1), (40, 50), (50, 99), (99, 50), (31, 100), (64, 64)]
    lines = [(2 * rows - 1, 2 * most) for rows in range(1, most + 1)]  # of which each has so many rows of tiles
    shapes = padded_shapes(model_config, "image", map(picture, sizes + lines))
    assert shapes <= declared_shapes(model_config)
    assert len(shapes) == most


def test_a_tile_s_rows_depend_on_it_alone(model_config):
    """A tile of an image cut into five, one of three, and alone."""
    model = load_model(model_config)
    tiles = np.stack([checkpoints.pixel_values([image])[0] for image in checkpoints.images(5, seed=0)])
    encode = jax.jit(lambda pixel_values: model.embed_multimodal(pixel_values)["image"])
    five, three = encode([tiles, tiles[:3]])
    assert five.shape == (5 * ROWS, GOLDEN.config["text_config"]["hidden_size"])
    np.testing.assert_allclose(five[: 3 * ROWS], three, rtol=0, atol=2e-5)
    np.testing.assert_allclose(five, np.concatenate(encode(tiles[:, None])), rtol=0, atol=2e-5)


def test_rows_computed_beforehand_stand_as_those_of_one_tile(model_config):
    inputs = processed(model_config, np.zeros((7, 64), np.float32))
    [place] = inputs.placeholders["image"]
    assert (place.length, place.num_rows) == (2 + 7 + 1, 7)
    assert inputs.prompt_token_ids[place.offset :][:2] == (156, 155)  # as an uncut image begins


def test_positions_are_spread_over_tiles_of_another_size():
    config = types.SimpleNamespace(image_size=65, patch_size=7)
    lines = idefics3.patch_positions(config, 6, 9).reshape(6, 9)
    assert lines[:, 0].tolist() == [0, 9, 27, 36, 54, 63]
    np.testing.assert_array_equal(idefics3.patch_positions(config, 9, 9), np.arange(81))


@pytest.mark.parametrize("side", [26, 27, 30, 32])
def test_positions_are_the_reference_s_at_the_sizes_of_published_models(side):
    torch = pytest.importorskip("torch", reason="the reference computes with torch")
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

    config = transformers.Idefics3VisionConfig(hidden_size=1, image_size=2 * side, patch_size=2)
    reference = Idefics3VisionEmbeddings(config)
    with torch.no_grad():
        reference.patch_embedding.bias.zero_()
        reference.position_embedding.weight[:, 0] = torch.arange(side**2)
        for patches in (side, side // 2, 2 * side, 12):
            pixels, mask = torch.zeros(1, 3, 2 * patches, 2 * patches), torch.ones(1, patches, patches, dtype=bool)
            expected = reference(pixels, mask)[0, :, 0].numpy()
            np.testing.assert_array_equal(idefics3.patch_positions(config, patches, patches), expected)


def test_nothing_compiles_after_warm_up_for_any_size(directory):
    llm = LLM(
        directory,
        max_num_seqs=1,
        max_model_len=64,
        max_num_batched_tokens=32,
        max_encode_items=1,
        on_recompile="raise",
        show_progress=False,
    )
    image_sizes = [(28, 56), (84, 28), (56, 56), (7, 200), (100, 90)]
    prompts = [{"prompt": "w5 <image> w6", "multi_modal_data": {"image": picture(size)}} for size in image_sizes]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=2), on_error="raise", use_tqdm=False)
    context = InputContext(llm.model_config)
    lengths = [len(idefics3.tokens_of_image(context, size)) for size in image_sizes]
    assert [len(output.prompt_token_ids) - 2 for output in outputs] == lengths
    assert len(set(lengths)) == 3


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_image_size": {"longest_edge": 21}}, r"a tile of 21 pixels .* is 3 patches wide, .* scale_factor 2"),
        ({"max_image_size": {"longest_edge": 6}}, r"a tile of 6 pixels .* is 0 patches wide"),
        ({"max_image_size": {"height": 28, "width": 28}}, r"max_image_size \{.*\} is not supported"),
        ({"size": {"longest_edge": 7 * TILE}}, r"size 196 and max_image_size 28 cut an image into 7 x 7 tiles"),
        ({"size": {"height": 56, "width": 56}}, r"first resized to a longest_edge"),
        ({"do_resize": False}, r"do_resize False .* is not supported"),
    ],
)
def test_options_of_the_processor_that_do_not_go_with_the_model(directory, options, message):
    with pytest.raises(ConfigError, match=message):
        processed(ModelConfig(model=directory, mm_processor_kwargs=options), picture((30, 30)))


def test_another_image_processor_is_refused(tmp_path):
    directory = GOLDEN.write_checkpoint(tmp_path)
    (directory / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "SiglipImageProcessor"}))
    with pytest.raises(ConfigError, match=r"SiglipImageProcessorPil does not cut .* there are Idefics3ImageProcessor"):
        processed(ModelConfig(model=directory), picture((30, 30)))


def test_an_image_of_which_nothing_would_be_left_is_refused():
    tiles = idefics3.Tiling(longest_edge=98, tile_size=49, rows=ROWS, splits=True)
    with pytest.raises(MediaError, match=r"an image of 10 x 2000 pixels is too narrow .* crop it"):
        idefics3.grid_of(tiles, (2000, 10))


def test_a_tokenizer_without_the_image_token_is_refused(directory):
    with pytest.raises(ConfigError, match="token of image_token_id 500"):
        idefics3.tile_tokens(ModelConfig(model=directory, hf_overrides={"image_token_id": 500}))((0, 0))


def test_videos_are_refused(model_config):
    with pytest.raises(RegistrationError, match="has no video input mapper"):
        MULTIMODAL_REGISTRY.map_input(model_config, {"video": np.zeros((2, 28, 28, 3), np.uint8)})


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("vision_config", {"patch_size": [7, 7]}, r"vision_config.patch_size \[7, 7\] is not supported"),
        ("text_config", {"model_type": "gpt2"}, r"a language model 'gpt2' is not supported; there are llama, mistral"),
    ],
)
def test_configs_that_are_refused(part, fields, message):
    config = GOLDEN.config | {part: GOLDEN.config[part] | fields}
    with pytest.raises(ConfigError, match=message):
        idefics3.Idefics3ForConditionalGeneration(
            transformers.Idefics3Config.from_dict(config), dtype=jnp.float32, rngs=nnx.Rngs(0)
        )
