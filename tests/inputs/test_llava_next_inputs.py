"""LLaVA-NeXT's tiles: tokens of an image of any size, the bound, and shapes that are compiled ahead."""

import copy

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from golden_files import read_golden
from hypothesis import strategies as st
from media_inputs import declared_shapes, padded_shapes
from PIL import Image

from aphrodite_jax import ModelConfig
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.modeling.loader.load import abstract_model
from aphrodite_jax.modeling.models import llava_next
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, InputContext

pytestmark = pytest.mark.once

GOLDEN = read_golden("llava_next_mistral")
SIDE = GOLDEN.config["vision_config"]["image_size"]
PATCHES = SIDE // GOLDEN.config["vision_config"]["patch_size"]
ROWS_OF_LARGEST = PATCHES**2 + 2 * PATCHES * (2 * PATCHES + 1)
"""The whole image, and two by two tiles whose lines end with a row each."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return GOLDEN.write_checkpoint(tmp_path_factory.mktemp("llava_next"))


@pytest.fixture(scope="module")
def model_config(directory):
    return ModelConfig(model=directory)


@pytest.fixture(scope="module")
def processor(directory):
    return transformers.LlavaNextProcessor(
        image_processor=transformers.AutoImageProcessor.from_pretrained(directory, backend="pil"),
        tokenizer=transformers.AutoTokenizer.from_pretrained(directory),
        patch_size=SIDE // PATCHES,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


sides = st.one_of(st.integers(1, 300), st.sampled_from([SIDE, 2 * SIDE, 3 * SIDE, 2000]))


@hypothesis.given(sides, sides)
@hypothesis.settings(deadline=None, max_examples=200)
def test_an_image_takes_as_many_tokens_as_in_hugging_face(model_config, processor, height, width):
    inputs = {"image_sizes": [[height, width]], "pixel_values": np.zeros((1, 1, 3, SIDE, SIDE))}
    index = llava_next.row_index(model_config.hf_config, (height, width))
    assert len(index) == processor.replace_image_token(inputs, 0).count("<image>")
    rows, columns = llava_next.grid_of(model_config.hf_config, (height, width))
    newline = (1 + rows * columns) * PATCHES**2
    patches = index[index != newline]
    assert len(set(patches.tolist())) == len(patches)
    assert set(range(PATCHES**2)) <= set(patches.tolist()), "the whole image is there"
    assert index.max() <= newline


def test_the_bound_is_reached_by_the_largest_image_alone(model_config):
    context = InputContext(model_config)
    assert llava_next.max_image_tokens(context) == ROWS_OF_LARGEST
    dummy = llava_next.dummy_data(context, 300, {"image": 2})
    sizes = {image.size for image in dummy.multi_modal_data["image"]}
    assert sizes == {(2 * SIDE, 2 * SIDE)}
    assert len(dummy.prompt_token_ids) == 2 + 300 - 2 * ROWS_OF_LARGEST


@hypothesis.given(sides, sides)
@hypothesis.settings(deadline=None, max_examples=25)
def test_every_image_has_one_of_the_shapes_of_the_examples(model_config, height, width):
    image = Image.new("RGB", (min(width, 300), min(height, 300)))
    assert padded_shapes(model_config, "image", [image]) <= declared_shapes(model_config)
    mapped = MULTIMODAL_REGISTRY.map_items(model_config, "image", [image])
    padded = llava_next.pad_media(model_config.hf_config, mapped)
    np.testing.assert_array_equal(padded["row_index"][:, : mapped["row_index"].shape[1]], mapped["row_index"])


def test_a_processor_with_other_tiles_is_refused(directory):
    options = {"image_grid_pinpoints": [[SIDE, 3 * SIDE]]}
    with pytest.raises(ConfigError, match=r"56 x 56 pixels into 4 tiles, the config's image_grid_pinpoints say 5"):
        MULTIMODAL_REGISTRY.map_input(
            ModelConfig(model=directory, mm_processor_kwargs=options), {"image": Image.new("RGB", (2 * SIDE, 2 * SIDE))}
        )


def test_a_tower_without_a_class_token_is_refused():
    config = copy.deepcopy(GOLDEN.config)
    config["vision_config"] = read_golden("llava_siglip_llama").config["vision_config"]
    config = transformers.LlavaNextConfig.from_dict(config)
    with pytest.raises(ConfigError, match="over a siglip_vision_model is not supported"):
        abstract_model(llava_next.LlavaNextForConditionalGeneration, config, jnp.float32)
