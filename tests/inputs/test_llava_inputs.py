"""LLaVA's input functions: the tokens of an image are the rows that the model makes of it."""

import llava_files
import numpy as np
import pytest
import transformers
from PIL import Image

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError, PlaceholderError
from aphrodite_jax.inputs import INPUT_REGISTRY, LLMInputs, PlaceholderRange
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY

IMAGE = llava_files.IMAGE_TOKEN

SIZES = [
    # tower, image size, patch size, strategy, tokens of an image
    ("clip", 336, 14, "default", 576),
    ("clip", 336, 14, "full", 577),
    ("siglip", 384, 14, "full", 729),
    ("siglip", 384, 14, "default", 728),  # drops its first patch, as Hugging Face does
    ("clip", 30, 14, "default", 4),
    ("clip", 14, 14, "full", 2),
]


def make_config(directory, tower="clip", image_size=28, patch_size=14, strategy="default", **options) -> ModelConfig:
    config = llava_files.llava_config(
        tower, image_size=image_size, patch_size=patch_size, vision_feature_select_strategy=strategy
    )
    config["text_config"]["max_position_embeddings"] = 4096
    return ModelConfig(model=llava_files.write_llava(directory, config), **options)


@pytest.mark.parametrize(("tower", "image_size", "patch_size", "strategy", "tokens"), SIZES)
def test_tokens_of_an_image(tmp_path, tower, image_size, patch_size, strategy, tokens):
    model_config = make_config(tmp_path, tower, image_size, patch_size, strategy, limit_mm_per_prompt={"image": 2})
    assert MULTIMODAL_REGISTRY.get_max_multimodal_tokens(model_config) == 2 * tokens
    images = [Image.new("RGB", (5, 700)), Image.new("RGB", (1, 1))]  # the size of the picture does not count
    given = LLMInputs(prompt_token_ids=(1, IMAGE, 7, IMAGE, 8), multi_modal_data={"image": images})
    processed = INPUT_REGISTRY.process_input(model_config, given)
    assert processed.prompt_token_ids == (1, *[IMAGE] * tokens, 7, *[IMAGE] * tokens, 8)
    assert processed.placeholders["image"] == (PlaceholderRange(1, tokens), PlaceholderRange(2 + tokens, tokens))


@pytest.mark.parametrize(("tower", "image_size", "patch_size", "strategy", "tokens"), SIZES)
def test_dummy_data_are_the_largest_prompt(tmp_path, tower, image_size, patch_size, strategy, tokens):
    model_config = make_config(tmp_path, tower, image_size, patch_size, strategy, limit_mm_per_prompt={"image": 2})
    dummy = INPUT_REGISTRY.dummy_data_for_profiling(model_config, 2 * tokens + 10, MULTIMODAL_REGISTRY)
    assert len(dummy.multi_modal_data["image"]) == 2
    processed = INPUT_REGISTRY.process_input(
        model_config, LLMInputs(prompt_token_ids=dummy.prompt_token_ids, multi_modal_data=dummy.multi_modal_data)
    )
    assert len(processed.prompt_token_ids) == 2 * tokens + 10
    assert sum(span.length for span in processed.placeholders["image"]) == 2 * tokens
    exact = INPUT_REGISTRY.dummy_data_for_profiling(model_config, 2 * tokens, MULTIMODAL_REGISTRY)
    assert exact.prompt_token_ids == (IMAGE, IMAGE)
    with pytest.raises(
        ConfigError, match=f"2 image items of up to {tokens} tokens do not fit in {2 * tokens - 1} tokens"
    ):
        INPUT_REGISTRY.dummy_data_for_profiling(model_config, 2 * tokens - 1, MULTIMODAL_REGISTRY)


def test_the_defaults_of_hugging_face_are_llava_15(tmp_path):
    transformers.LlavaConfig(architectures=["LlavaForConditionalGeneration"]).save_pretrained(tmp_path)
    assert MULTIMODAL_REGISTRY.get_max_multimodal_tokens(ModelConfig(model=tmp_path)) == 576


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_embeddings_take_a_token_for_each_row(tmp_path, rows):
    embeds = np.zeros((rows, llava_files.WIDTH), np.float32)
    given = LLMInputs(prompt_token_ids=(1, IMAGE, 2), multi_modal_data={"image": embeds})
    processed = INPUT_REGISTRY.process_input(make_config(tmp_path), given)
    assert processed.placeholders["image"] == (PlaceholderRange(1, rows),)
    assert len(processed.prompt_token_ids) == rows + 2


def test_text_alone(tmp_path):
    processed = INPUT_REGISTRY.process_input(make_config(tmp_path), LLMInputs(prompt_token_ids=(5, 6, 7)))
    assert processed.prompt_token_ids == (5, 6, 7)
    assert dict(processed.placeholders) == {}


@pytest.mark.parametrize("count", [0, 2])
def test_placeholders_and_images_that_do_not_match(tmp_path, count):
    image = Image.new("RGB", (4, 4))
    given = LLMInputs(prompt_token_ids=(1, *[IMAGE] * count), multi_modal_data={"image": image})
    with pytest.raises(PlaceholderError, match=rf"has {count} placeholders \(token 3\) for 1 items"):
        INPUT_REGISTRY.process_input(make_config(tmp_path), given)
    with pytest.raises(PlaceholderError, match=r"has 1 placeholders \(token 3\) for 0 items"):
        INPUT_REGISTRY.process_input(make_config(tmp_path), LLMInputs(prompt_token_ids=(1, IMAGE)))


def test_a_tower_that_is_not_known(tmp_path):
    config = llava_files.llava_config(vision_config={"model_type": "dinov2"})
    model_config = ModelConfig(model=llava_files.write_llava(tmp_path, config))
    with pytest.raises(
        ConfigError, match="a vision tower 'dinov2' is not supported; there are clip_vision_model, siglip"
    ):
        MULTIMODAL_REGISTRY.get_max_multimodal_tokens(model_config)
