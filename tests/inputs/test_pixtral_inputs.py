"""Pixtral and Mistral 3: tokens of an image of any size, lines and their ends, the bound, and shapes compiled ahead."""

import copy
import functools
import json
import types

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
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

from aphrodite_jax import ModelConfig
from aphrodite_jax.errors import ConfigError, MediaError
from aphrodite_jax.inputs import INPUT_REGISTRY, LLMInputs
from aphrodite_jax.modeling.loader import load_model
from aphrodite_jax.modeling.models import pixtral
from aphrodite_jax.modeling.models.mistral3 import Mistral3ForConditionalGeneration, ties_embeddings
from aphrodite_jax.modeling.models.pixtral import PixtralForConditionalGeneration
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, InputContext

pytestmark = pytest.mark.once

GOLDENS = {name: read_golden(name) for name in ("pixtral", "mistral3")}
SIDE, LARGEST = 10, 120
"""Pixels of the side of what becomes a row, in both (in Mistral 3 two patches of 5), and of an image at most."""
IMAGE, BREAK, END = 159, 158, 157
SMALLER = {"size": {"longest_edge": 75}}


@pytest.fixture(scope="module", params=GOLDENS)
def directory(request, tmp_path_factory):
    return GOLDENS[request.param].write_checkpoint(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mistral3_directory(tmp_path_factory):
    return GOLDENS["mistral3"].write_checkpoint(tmp_path_factory.mktemp("mistral3"))


@pytest.fixture(scope="module")
def ctx(directory):
    return InputContext(ModelConfig(model=directory))


def picture(height, width):
    return Image.new("RGB", (width, height))


sides = st.one_of(st.integers(1, 400), st.sampled_from([SIDE, SIDE + 1, LARGEST, LARGEST + 1, 20_000]))


@hypothesis.given(sides, sides)
@hypothesis.settings(deadline=None, max_examples=200)
def test_an_image_takes_as_many_tokens_as_in_hugging_face(ctx, height, width):
    whole = np.broadcast_to(np.uint8(0), (3, height, width))
    expected = get_resize_output_image_size(
        whole, size=(LARGEST,) * 2, patch_size=(SIDE,) * 2, input_data_format="channels_first"
    )
    lines, columns = (side // SIDE for side in expected)
    if lines * columns == 0:
        with pytest.raises(MediaError, match="too narrow to fit 120 x 120: crop it"):
            pixtral.grid_of(ctx, (height, width))
        return
    tokens = pixtral.tokens_of_image(ctx, (height, width))
    assert tokens == ([IMAGE] * columns + [BREAK]) * (lines - 1) + [IMAGE] * columns + [END]
    assert len(tokens) <= pixtral.max_image_tokens(ctx)


def test_lines_of_two_images_that_touch(ctx):
    model_config = ModelConfig(model=ctx.model_config.model, limit_mm_per_prompt={"image": 2})
    images = [picture(11, 30), picture(5, 6)]
    inputs = LLMInputs(prompt_token_ids=(1, IMAGE, IMAGE, 9), multi_modal_data={"image": images})
    inputs = INPUT_REGISTRY.process_input(model_config, inputs)
    line = (IMAGE,) * 3
    assert inputs.prompt_token_ids == (1, *line, BREAK, *line, END, IMAGE, END, 9)
    first, second = inputs.placeholders["image"]
    assert (first.offset, first.length, first.num_rows) == (1, 8, 6)
    assert (second.offset, second.length, second.num_rows) == (9, 2, 1)
    assert first.row_tokens.tolist() == [1, 2, 3, 5, 6, 7]


def test_rows_computed_beforehand_are_the_image_s_tokens_alone(ctx):
    inputs = LLMInputs(prompt_token_ids=(1, IMAGE, END), multi_modal_data={"image": np.zeros((3, 64), np.float32)})
    inputs = INPUT_REGISTRY.process_input(ctx.model_config, inputs)
    assert inputs.prompt_token_ids == (1, IMAGE, IMAGE, IMAGE, END)


@pytest.mark.parametrize(
    ("options", "height", "width"), [({}, 12, 12), (SMALLER, 8, 8), ({"size": {"height": 30, "width": 75}}, 3, 8)]
)
def test_the_bound_is_reached_by_the_dummy_data(ctx, options, height, width):
    ctx = InputContext(ModelConfig(model=ctx.model_config.model, mm_processor_kwargs=options))
    most = height * (width + 1)
    assert pixtral.max_image_tokens(ctx) == most
    dummy = pixtral.dummy_data(ctx, 400, {"image": 2})
    assert len(dummy.prompt_token_ids) == 2 + 400 - 2 * most
    for image in dummy.multi_modal_data["image"]:
        assert pixtral.grid_of(ctx, (image.height, image.width)) == (height, width)


def test_patches_stand_in_squares_with_their_places(ctx):
    config = ctx.model_config.hf_config
    pixels = np.arange(3 * 20 * 30, dtype=np.float32).reshape(3, 20, 30)
    arrays = pixtral.patches_of(config, pixels)
    p = config.vision_config.patch_size
    for patch, (line, column) in zip(arrays["pixel_values"], arrays["patch_positions"], strict=True):
        there = pixels[:, line * p : (line + 1) * p, column * p : (column + 1) * p]
        np.testing.assert_array_equal(patch, there.reshape(-1))
    squares = (arrays["patch_positions"] * p // SIDE).reshape(2 * 3, -1, 2)
    assert (squares == squares[:, :1]).all()
    assert squares[:, 0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert set(arrays["kv_stop"].tolist()) == {len(arrays["pixel_values"])}


def padded(model_config, image):
    """A mapped item's arrays as the encoder gets them, and how many patches are its own."""
    mapped = dict(MULTIMODAL_REGISTRY.map_items(model_config, "image", [image]))
    return pixtral.pad_media(model_config.hf_config, mapped), mapped["pixel_values"].shape[1]


@hypothesis.given(sides.filter(lambda side: side < 400), sides.filter(lambda side: side < 400), st.booleans())
@hypothesis.settings(deadline=None, max_examples=25)
def test_every_image_has_one_of_the_shapes_of_the_examples(ctx, height, width, smaller):
    model_config = ModelConfig(model=ctx.model_config.model, mm_processor_kwargs=SMALLER if smaller else {})
    height, width = max(height, width // 50 + 1), max(width, height // 50 + 1)  # else too narrow
    arrays, patches = padded(model_config, picture(height, width))
    assert padded_shapes(model_config, "image", [picture(height, width)]) <= declared_shapes(model_config)
    assert arrays["kv_stop"][0].tolist() == [patches] * patches + [0] * (arrays["kv_stop"].shape[1] - patches)
    assert not any(array[:, patches:].any() for array in arrays.values())


def published(image_size, patch_size, merge_size):
    vision = types.SimpleNamespace(image_size=image_size, patch_size=patch_size)
    return types.SimpleNamespace(vision_config=vision, spatial_merge_size=merge_size)


@pytest.mark.parametrize("config", [published(1024, 16, 1), published(1540, 14, 2), published(1000, 14, 3)])
def test_shapes_are_few_and_photographs_waste_little_of_them(config):
    rows = pixtral.padded_rows(config)
    assert rows == sorted(set(rows))
    assert len(rows) <= 16
    side = pixtral.row_side(config)
    most = -(-config.vision_config.image_size // side)
    assert rows[-1] == most**2
    # Widths and heights of screens and cameras, at sizes from a thumbnail's to the largest.
    shapes = [(4, 3), (3, 4), (16, 9), (3, 2), (1, 1), (2, 1)]
    grids = [
        max(1, round(edge * w / max(w, h))) * max(1, round(edge * h / max(w, h)))
        for edge in range(most // 6, most + 1)
        for w, h in shapes
    ]
    grids = [grid for grid in grids if grid * config.spatial_merge_size**2 >= pixtral.FEWEST_PATCHES]
    waste = [1 - grid / next(count for count in rows if count >= grid) for grid in grids]
    assert np.mean(waste) < 0.25
    assert max(waste) < 0.5


def test_padding_changes_no_row_of_the_image(directory):
    model_config = ModelConfig(model=directory, dtype="float32")
    image = Image.fromarray(GOLDENS["pixtral"].prompts[2].images[0])
    arrays, patches = padded(model_config, image)
    own = {name: array[:, :patches] for name, array in arrays.items()}
    foreign = {
        "pixel_values": np.random.default_rng(0).normal(size=arrays["pixel_values"].shape).astype(np.float32),
        "patch_positions": np.full_like(arrays["patch_positions"], 3),
    }
    with_noise = {name: np.concatenate([own[name], foreign[name][:, patches:]], axis=1) for name in foreign}
    graphdef, params = nnx.split(load_model(model_config))

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def encode(params, arrays):
        return nnx.merge(graphdef, params).embed_multimodal(**arrays)["image"]

    [expected] = encode(params, own)
    [with_zeros] = encode(params, arrays)
    [with_noise] = encode(params, arrays | with_noise)
    assert len(expected) < len(with_zeros) == len(with_noise)
    assert np.isfinite(with_zeros).all()
    for actual in (with_zeros, with_noise):
        np.testing.assert_allclose(actual[: len(expected)], expected, rtol=0, atol=5e-5)


def test_images_of_one_size_and_of_several_are_encoded_as_one_by_one(directory):
    model_config = ModelConfig(model=directory, dtype="float32", limit_mm_per_prompt={"image": 2})
    graphdef, params = nnx.split(load_model(model_config))
    pictures = [Image.fromarray(GOLDENS["pixtral"].prompts[2].images[i][:20, :24]) for i in (0, 1)]

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def encode(params, arrays):
        return nnx.merge(graphdef, params).embed_multimodal(**arrays)["image"]

    together = dict(MULTIMODAL_REGISTRY.map_input(model_config, {"image": pictures}))
    assert all(isinstance(array, np.ndarray) for array in together.values())
    apart = encode(params, {name: tuple(array) for name, array in together.items()})
    for one, other in zip(encode(params, together), apart, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-5)
    assert np.abs(apart[0] - apart[1]).max() > 0.1


# What is refused.


def expect_config_error(directory, match, **options):
    with pytest.raises(ConfigError, match=match):
        MULTIMODAL_REGISTRY.map_input(ModelConfig(model=directory, **options), {"image": picture(20, 25)})


def test_options_of_the_processor_that_do_not_go_with_the_model(mistral3_directory):
    def refuse(match, **options):
        expect_config_error(mistral3_directory, match, mm_processor_kwargs=options)

    refuse("patch_size can't be chosen: sides are stretched to the model's 10", patch_size=20)
    refuse("up to 300 x 300 pixels, the model's image_size is 120", size={"longest_edge": 300})
    refuse("neither 'longest_edge' nor 'height' and 'width'", size={"shortest_edge": 30})
    refuse("made 25 x 20 pixels of an image of 25 x 20, expected 30 x 20: it must resize", do_resize=False)


def test_another_kind_of_processor_is_refused(tmp_path):
    directory = GOLDENS["mistral3"].write_checkpoint(tmp_path)
    (directory / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))
    expect_config_error(directory, "CLIPImageProcessorPil does not keep the shape of images")


def test_ends_of_lines_have_the_names_that_the_processor_s_file_tells(tmp_path):
    directory = GOLDENS["mistral3"].write_checkpoint(tmp_path)
    file = directory / "processor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"image_break_token": "w7"}))
    assert pixtral.line_ends(ModelConfig(model=directory)) == (7, END)
    file.unlink()
    assert pixtral.line_ends(ModelConfig(model=directory)) == (BREAK, END)
    file.write_text(json.dumps(settings | {"image_end_token": "[NONE]"}))
    with pytest.raises(ConfigError, match=r"has no token '\[NONE\]' \(image_end_token\)"):
        pixtral.line_ends(ModelConfig(model=directory))


def build(name, **fields):
    """The abstract model of a golden's config with other fields."""
    config = copy.deepcopy(GOLDENS[name].config)
    for field, value in fields.items():
        config[field] = {**config[field], **value} if isinstance(value, dict) else value
    config = transformers.AutoConfig.for_model(**config)
    cls = {"pixtral": PixtralForConditionalGeneration, "mistral3": Mistral3ForConditionalGeneration}[name]
    return nnx.eval_shape(lambda: cls(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("name", "fields", "match"),
    [
        ("pixtral", {"vision_feature_select_strategy": "default"}, "strategy 'default' over Pixtral's tower is not"),
        ("pixtral", {"vision_config": {"patch_size": [10, 10]}}, r"vision_config.patch_size \[10, 10\] is not"),
        ("pixtral", {"vision_feature_layer": [1, 3]}, r"vision_feature_layer 3 is outside \[-3, 3\)"),
        ("pixtral", {"vision_config": {"hidden_act": "sine"}}, "activation 'sine' is not supported"),
        ("mistral3", {"vision_feature_layer": [1, 2]}, "takes the hidden states of one layer"),
        ("mistral3", {"text_config": {"model_type": "gemma"}}, "a language model 'gemma' is not supported"),
        ("mistral3", {"vision_config": {"model_type": "siglip_vision_model"}}, "a vision tower 'siglip_vision_model'"),
    ],
)
def test_configs_that_are_refused(name, fields, match):
    with pytest.raises(ConfigError, match=match):
        build(name, **fields)


def test_layers_side_by_side():
    assert build("pixtral", vision_feature_layer=[0, -1]).multi_modal_projector.linear_1.in_features == 64
    assert build("mistral3", vision_feature_layer=[-1]).multi_modal_projector.linear_1.in_features == 32


@pytest.mark.parametrize(("outer", "inner", "tied"), [(None, False, False), (None, True, True), (False, True, False)])
def test_an_output_head_of_its_own_where_one_of_the_configs_says_so(outer, inner, tied):
    """``None`` is what published files of Mistral 3 have: nothing, which Hugging Face's config reads as true."""
    fields = {} if outer is None else {"tie_word_embeddings": outer}
    config = {name: value for name, value in GOLDENS["mistral3"].config.items() if name != "tie_word_embeddings"}
    config = config | fields | {"text_config": config["text_config"] | {"tie_word_embeddings": inner}}
    config = transformers.AutoConfig.for_model(**config)
    assert ties_embeddings(config) == tied
    model = nnx.eval_shape(lambda: Mistral3ForConditionalGeneration(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    assert hasattr(model.language_model, "lm_head") != tied
