"""Qwen-VL's sizes: tokens of images and videos, bounds, shapes that all come down to, positions on three axes."""

import functools
import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from golden_files import read_golden
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from aphrodite_jax import LLM, ModelConfig, SamplingParams
from aphrodite_jax.architectures import resolve_architecture
from aphrodite_jax.engine.admission import map_media
from aphrodite_jax.errors import ConfigError, MediaError, RequestError
from aphrodite_jax.inputs import INPUT_REGISTRY, LLMInputs, PlacedItem, PlaceholderRange
from aphrodite_jax.modeling.layers.rotary import axis_of_pairs, rotary_table
from aphrodite_jax.modeling.loader import load_model
from aphrodite_jax.modeling.models import qwen2_5_vl, qwen3_vl, qwen_vl_inputs
from aphrodite_jax.modeling.models.qwen_vl_inputs import PixelLimits
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, InputContext, Video
from aphrodite_jax.multimodal.context import model_class

pytestmark = pytest.mark.once

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
GOLDENS = {name: read_golden(name) for name in NAMES}
IMAGE, VIDEO, START, END = 159, 158, 157, 156
PUBLISHED = {  # pixels that checkpoints on the hub allow an image
    "qwen2_vl": PixelLimits(side=28, least=56 * 56, most=28 * 28 * 16384),
    "qwen3_vl": PixelLimits(side=32, least=65536, most=16777216),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {name: GOLDENS[name].write_checkpoint(tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture(params=NAMES)
def context(request, directories):
    return context_of(directories, request.param)


def context_of(directories, name, **options):
    return InputContext(ModelConfig(model=directories[name], limit_mm_per_prompt={"image": 4, "video": 3}, **options))


def picture(height, width):
    return Image.fromarray(np.random.default_rng(height * 1000 + width).integers(0, 255, (height, width, 3), np.uint8))


def clip(num_frames, height, width, **fields):
    return Video(
        frames=np.stack([np.asarray(picture(height + i, width))[:height] for i in range(num_frames)]), **fields
    )


def mapped(context, modality, item):
    arrays = MULTIMODAL_REGISTRY.map_items(context.model_config, modality, [item])
    return {name: np.asarray(array) for name, array in arrays.items()}


def processed(context, prompt, **media):
    inputs = LLMInputs(prompt_token_ids=prompt, multi_modal_data=media)
    return INPUT_REGISTRY.process_input(context.model_config, inputs)


# Sizes.

sides = st.one_of(st.integers(1, 400), st.integers(1, 6000))
some_limits = st.builds(
    lambda side, least, times: PixelLimits(side=side, least=least, most=math.ceil(least * times)),
    st.sampled_from([14, 28, 32]),
    st.integers(1, 400_000),
    st.one_of(st.just(1), st.floats(1, 3), st.floats(1, 1000)),
)


@hypothesis.given(sides, sides, some_limits)
@hypothesis.settings(deadline=None, max_examples=300)
def test_images_are_resized_as_in_hugging_face_and_no_size_is_beyond_the_bound(height, width, limits):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(MediaError, match=f"an image of {width} x {height} pixels is too narrow"):
            qwen_vl_inputs.squares_of(limits, (height, width))
        return
    expected = smart_resize(height, width, limits.side, min_pixels=limits.least, max_pixels=limits.most)
    squares = qwen_vl_inputs.squares_of(limits, (height, width))
    assert squares == tuple(pixels // limits.side for pixels in expected)
    assert math.prod(squares) <= qwen_vl_inputs.most_rows(limits)
    assert math.prod(squares) >= math.floor(min(limits.least, limits.most / 4) / limits.side**2)


@hypothesis.given(st.integers(2, 50), sides, sides, st.integers(1, 10**6), st.floats(1, 1000))
@hypothesis.settings(deadline=None, max_examples=200)
def test_frames_that_share_their_pixels_are_resized_as_in_hugging_face(num_frames, height, width, least, times):
    video_processing = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    most = math.ceil(least * times)
    limits = qwen_vl_inputs.VideoLimits(
        side=32, layer=2, least=least, most=most, is_capped=False, max_tokens=9, max_frames=50
    )
    frames = qwen3_vl.frame_limits(limits, num_frames)
    try:
        expected = video_processing.smart_resize(num_frames, height, width, 2, 32, least, most)
    except ValueError:
        with pytest.raises(MediaError, match="too narrow"):
            qwen_vl_inputs.squares_of(frames, (height, width))
    else:
        assert qwen_vl_inputs.squares_of(frames, (height, width)) == tuple(pixels // 32 for pixels in expected)


@pytest.mark.parametrize("capped", [False, True])
def test_limits_of_frames_may_be_capped(capped):
    limits = qwen_vl_inputs.VideoLimits(
        side=28, layer=2, least=100_000, most=600_000, is_capped=capped, max_tokens=1000, max_frames=768
    )
    each = [qwen_vl_inputs.frame_limits(limits, count).most for count in (2, 4, 400)]
    assert each == ([600_000, 352_800, 105_000] if capped else [600_000] * 3)
    together = [qwen3_vl.frame_limits(limits, count).most for count in (2, 4, 400)]
    assert together == ([600_000, 600_000, 42_000_000] if capped else [600_000] * 3)


@hypothesis.given(height=st.integers(8, 130), width=st.integers(8, 130))
@hypothesis.settings(
    deadline=None, max_examples=8, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_an_image_has_as_many_tokens_as_in_hugging_face_and_one_of_the_shapes(context, height, width):
    image = picture(height, width)
    inputs = processed(context, (5, IMAGE, 6), image=image)
    config = context.get_hf_config()
    processor = transformers.AutoImageProcessor.from_pretrained(context.model_config.model, backend="pil")
    count = processor.get_number_of_image_patches(height, width) // 4
    assert inputs.prompt_token_ids == (5, *[IMAGE] * count, 6)
    assert inputs.placeholders == {"image": (PlaceholderRange(1, count),)}
    arrays = mapped(context, "image", image)
    assert arrays["image_grid"].prod() == count
    padded = model_class(context.model_config).pad_media(config, arrays)
    shapes = qwen_vl_inputs.media_shapes(context)
    assert {name: (array.shape, array.dtype) for name, array in padded.items()} in [
        {name: (struct.shape, struct.dtype) for name, struct in one.items()} for one in shapes
    ]
    for name, array in padded.items():
        np.testing.assert_array_equal(array[:, : arrays[name].shape[1]], arrays[name])
    if "image_row_order" in padded:
        np.testing.assert_array_equal(
            np.sort(padded["image_row_order"][0]), np.arange(padded["image_row_order"].shape[1])
        )


def test_padding_wastes_a_quarter_at_most_on_photographs():
    sizes = [(768, 1024), (1080, 1920), (3024, 4032), (480, 640), (1200, 800), (600, 600), (2448, 3264), (400, 1600)]
    for limits in PUBLISHED.values():
        rows = [math.prod(qwen_vl_inputs.squares_of(limits, size)) for size in sizes]
        assert sum(map(qwen_vl_inputs.padded_rows, rows)) <= 1.25 * sum(rows)


def test_numbers_of_rows_after_padding():
    assert [qwen_vl_inputs.padded_rows(rows) for rows in (1, 16, 17, 24, 25, 33, 48, 49, 16384, 16385)] == [
        16, 16, 24, 24, 32, 48, 48, 64, 16384, 24576,
    ]  # fmt: skip


# Bounds and dummy data.


@pytest.mark.parametrize("limits", PUBLISHED.values(), ids=PUBLISHED)
def test_the_bound_of_images_is_reached(limits):
    assert qwen_vl_inputs.most_rows(limits) == 16384
    assert math.prod(qwen_vl_inputs.squares_of(limits, qwen_vl_inputs.largest_image(limits))) == 16384


def test_a_narrow_image_may_be_the_largest(context):
    """Where 36 squares are allowed, an image of 1 x 200 keeps a line of 84."""
    assert qwen_vl_inputs.max_image_tokens(context) == 84
    limits = qwen_vl_inputs.image_limits(context)
    assert qwen_vl_inputs.squares_of(limits, qwen_vl_inputs.largest_image(limits)) == (1, 84)


@pytest.mark.parametrize("room", [200, 240])
def test_dummy_data_hold_both_kinds_and_fill_the_prompt(context, room):
    dummy = qwen_vl_inputs.dummy_data(context, room, {"image": 2, "video": 1})
    inputs = processed(context, dummy.prompt_token_ids, **dummy.multi_modal_data)
    assert len(inputs.prompt_token_ids) == room
    spans = inputs.placeholders
    assert [span.length for span in spans["image"]] == [84, 84]
    assert room - 168 - 4 <= spans["video"][0].length <= room - 168
    for item in map_media(context.model_config, inputs):
        assert item.mm_kwargs[f"{item.modality}_grid"].prod() == item.placeholder.num_rows


def test_dummy_data_that_do_not_fit(context):
    with pytest.raises(
        ConfigError, match="up to 84 tokens and 1 video items do not fit in 85 tokens: lower max_pixels"
    ):
        qwen_vl_inputs.dummy_data(context, 85, {"image": 1, "video": 1})


def test_a_video_has_as_many_tokens_as_the_context_at_most(context):
    assert 500 <= qwen_vl_inputs.max_video_tokens(context) <= 512
    small = InputContext(ModelConfig(model=context.model_config.model, max_model_len=40))
    assert 30 <= qwen_vl_inputs.max_video_tokens(small) <= 40
    with pytest.raises(RequestError, match=r"a video of 30 frames .* takes \d+ tokens, at most \d+ are supported here"):
        processed(small, (VIDEO,), video=clip(30, 40, 40))
    none = InputContext(ModelConfig(model=context.model_config.model, max_model_len=1))
    with pytest.raises(ConfigError, match="no video fits in 1 tokens: raise max_model_len"):
        qwen_vl_inputs.max_video_tokens(none)


# Arrays.


@pytest.fixture(scope="module")
def models(directories):
    return {name: load_model(ModelConfig(model=directories[name], dtype="float32")) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_same_alone_and_padded_and_together(directories, models, name):
    """Two videos, one of more layers and one of more lines, whose arrays have one shape after padding."""
    context, model = context_of(directories, name), models[name]
    graphdef, state = nnx.split(model)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def encode(state, arrays):
        return list(nnx.merge(graphdef, state).embed_multimodal(**arrays)["video"])

    items = [mapped(context, "video", clip(*shape)) for shape in ((6, 33, 47), (4, 44, 47))]
    padded = [model.pad_media(context.get_hf_config(), arrays) for arrays in items]
    together = encode(state, {key: np.concatenate([arrays[key] for arrays in padded]) for key in padded[0]})
    for arrays, behind in zip(items, together, strict=True):
        [alone] = encode(state, arrays)
        assert len(behind) == 24 > len(alone) == arrays["video_grid"].prod()
        np.testing.assert_allclose(behind[: len(alone)], alone, rtol=0, atol=1e-5)


def test_a_video_of_one_frame_over_and_over_has_the_image_s_pixels(context):
    image = picture(30, 44)
    video = Video(frames=np.stack([np.asarray(image)] * 3))
    image, video = mapped(context, "image", image), mapped(context, "video", video)
    assert (image["image_grid"].tolist(), video["video_grid"].tolist()) == ([[1, 2, 3]], [[2, 2, 3]])
    for name in ("patches", "positions"):
        np.testing.assert_array_equal(video[f"video_{name}"], np.tile(image[f"image_{name}"], (1, 2, 1)))


def test_patches_see_their_own_layer(context):
    frames = mapped(context, "video", clip(4, 30, 30))["video_frames"][0]
    half = len(frames) // 2
    np.testing.assert_array_equal(frames, np.repeat([[0, half], [half, 2 * half]], half, axis=0))


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 4, 6), (2, 5, 3), (3, 1, 7)])
def test_what_the_tower_must_know_is_hugging_face_s(grid):
    torch = pytest.importorskip("torch")
    from transformers import vision_utils

    config = transformers.AutoConfig.for_model(**GOLDENS["qwen2_5_vl"].config)
    patches = np.arange(math.prod(grid) * 4, dtype=np.float32)[:, None]
    arrays = qwen2_5_vl.arrange(config, patches, grid)
    patch_grid = torch.tensor([[grid[0], 2 * grid[1], 2 * grid[2]]])
    index, bounds = vision_utils.get_vision_window_index(patch_grid, spatial_merge_size=2, window_size=28, patch_size=7)
    order = (4 * index[:, None] + torch.arange(4)).flatten().numpy()
    np.testing.assert_array_equal(arrays["patches"][:, 0], order)
    np.testing.assert_array_equal(arrays["row_order"], torch.argsort(index))
    positions = vision_utils.get_vision_position_ids(patch_grid, 2).numpy()
    np.testing.assert_array_equal(arrays["positions"], positions[order])
    np.testing.assert_array_equal(np.unique(arrays["windows"]), bounds)

    config = transformers.AutoConfig.for_model(**GOLDENS["qwen3_vl"].config)
    places, weights = qwen3_vl.table_places(config, grid)
    expected = vision_utils.get_vision_interpolation_indices_and_weights(
        patch_grid, num_grid_per_side=5, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    np.testing.assert_array_equal(places, expected[0])
    np.testing.assert_array_equal(weights, expected[1])


# Prompts.

WRAPPED = {"image": (START, IMAGE, END), "video": (START, VIDEO, END)}


@pytest.mark.parametrize("order", ["vi", "iv", "vivi", "iivv", "viiv"])
def test_both_kinds_stand_where_they_are_said_to_in_any_order(context, order):
    kinds = [{"i": "image", "v": "video"}[letter] for letter in order]
    prompt = sum((WRAPPED[kind] for kind in kinds), ())
    media = {
        "image": [picture(20 + 14 * i, 50) for i in range(order.count("i"))],
        "video": [clip(2 + 2 * i, 30, 40) for i in range(order.count("v"))],
    }
    inputs = processed(context, prompt, **media)
    ids = np.array(inputs.prompt_token_ids)
    placed = map_media(context.model_config, inputs)
    assert [item.modality for item in placed] == kinds
    for item in placed:
        rows = item.placeholder.row_tokens
        assert (ids[rows] == {"image": IMAGE, "video": VIDEO}[item.modality]).all()
        assert len(rows) == item.mm_kwargs[f"{item.modality}_grid"].prod()
        assert (ids[item.placeholder.offset - 1], ids[item.placeholder.stop]) == (START, END)
    assert sum(item.placeholder.num_rows for item in placed) == np.isin(ids, (IMAGE, VIDEO)).sum()


def grids(min_layers=1, max_layers=1):
    return st.tuples(st.integers(min_layers, max_layers), st.integers(1, 5), st.integers(1, 5))


items = st.lists(st.one_of(grids().map(lambda g: ("image", g)), grids(1, 9).map(lambda g: ("video", g))), max_size=5)


def reference_of(name, cls):
    """A class of Hugging Face's modeling file."""
    pytest.importorskip("torch", reason="the reference models of Hugging Face need torch")
    return getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), cls)


@functools.cache
def rope_index(name):
    """Hugging Face's function of the family for a config, which needs no weights."""
    config = transformers.AutoConfig.for_model(**GOLDENS[name].config)
    family = reference_of(
        name, {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[name] + "Model"
    )
    stand_in = SimpleNamespace(config=config)
    stand_in.get_vision_position_ids = functools.partial(family.get_vision_position_ids, stand_in)
    return config, functools.partial(family.get_rope_index, stand_in)


@pytest.mark.parametrize("name", NAMES)
@hypothesis.given(items=items, fps=st.sampled_from([0.3, 1.0, 2.0, 3.0, 7.5, 24.0]))
@hypothesis.settings(deadline=None, max_examples=40)
def test_positions_are_hugging_face_s(name, items, fps):
    config, reference = rope_index(name)
    torch = importlib.import_module("torch")
    ids, placed = [5, 6], []
    for modality, grid in items:
        layers, token = grid[0], {"image": IMAGE, "video": VIDEO}[modality]
        whole = [token] * math.prod(grid)
        if name == "qwen3_vl" and modality == "video":
            whole = ([7, START] + [token] * (math.prod(grid) // layers) + [END]) * layers
        is_row = tuple(t == token for t in whole)
        span = PlaceholderRange(len(ids) + 1, len(whole), None if all(is_row) else is_row)
        arrays = {f"{modality}_grid": np.array([grid])}
        if name == "qwen2_5_vl" and modality == "video":
            arrays["video_seconds"] = np.float32([2 / fps])
        placed.append(PlacedItem(modality=modality, placeholder=span, mm_kwargs=arrays))
        ids += [START, *whole, END, 9]
    model = resolve_architecture(GOLDENS[name].config["architectures"])
    actual = model.prompt_positions(config, np.array(ids), placed)
    kinds = torch.tensor([[{IMAGE: 1, VIDEO: 2}.get(t, 0) for t in ids]])
    of_kind = {k: torch.tensor([[g[0], 2 * g[1], 2 * g[2]] for m, g in items if m == k]) for k in ("image", "video")}
    expected, _ = reference(
        input_ids=torch.tensor([ids]),
        mm_token_type_ids=kinds,
        image_grid_thw=of_kind["image"] if len(of_kind["image"]) else None,
        video_grid_thw=of_kind["video"] if len(of_kind["video"]) else None,
        second_per_grid_ts=torch.full((len(of_kind["video"]),), 2 / fps),
    )
    np.testing.assert_array_equal(actual, expected[:, 0])


def test_positions_of_text_alone(context):
    model = model_class(context.model_config)
    positions = model.prompt_positions(context.get_hf_config(), np.arange(4), ())
    np.testing.assert_array_equal(positions, [[0, 1, 2, 3]] * 3)


def test_layers_of_a_video_are_its_seconds_apart(directories):
    context = context_of(directories, "qwen2_5_vl")
    for times, seconds in (((0.0, 0.5, 1.0, 1.5), 1.0), (None, 2 / 24), ((3.0,) * 4, 2 / 24)):
        assert mapped(context, "video", clip(4, 30, 30, timestamps=times))["video_seconds"] == [np.float32(seconds)]


def test_layers_of_a_video_are_told_apart_by_their_times(directories):
    context = context_of(directories, "qwen3_vl")
    assert qwen3_vl.times_of_layers(clip(5, 8, 8, timestamps=(0.0, 1.0, 2.5, 3.0, 9.0)), 3) == [0.5, 2.75, 9.0]
    assert qwen3_vl.times_of_layers(clip(3, 8, 8), 2) == [0.5 / 24, 2 / 24]
    tokenizer = transformers.AutoTokenizer.from_pretrained(context.model_config.model)
    inputs = processed(context, (5, VIDEO), video=clip(3, 32, 64, timestamps=(0.0, 0.5, 1.0)))
    rows = "<|vision_start|>" + "<|video_pad|>" * 8 + "<|vision_end|>"
    text = f"w5 <0.2 seconds>{rows}<1.0 seconds>{rows}"
    assert inputs.prompt_token_ids == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


# Rotary positions.


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("scaling", [{}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}])
def test_pairs_turn_by_the_axes_of_hugging_face(name, scaling):
    cls = {"qwen2_vl": "Qwen2VLRotaryEmbedding", "qwen3_vl": "Qwen3VLTextRotaryEmbedding"}[name]
    reference, torch = reference_of(name, cls), importlib.import_module("torch")
    config = transformers.AutoConfig.for_model(**GOLDENS[name].config).text_config
    config.rope_parameters = {**config.rope_parameters, **scaling}
    positions = np.random.default_rng(0).integers(0, 300, (3, 7))
    cos, sin = reference(config)(torch.zeros(1), torch.tensor(positions)[:, None])
    table = rotary_table(config, jnp.asarray(positions), jnp.full(7, 300))
    half = cos.shape[-1] // 2
    np.testing.assert_allclose(table.cos, cos[0, :, :half], rtol=0, atol=1e-4)
    np.testing.assert_allclose(table.sin, sin[0, :, :half], rtol=0, atol=1e-4)


def test_sections_of_pairs():
    sections = {"mrope_section": [4, 2, 2]}
    assert axis_of_pairs(sections, 3, 8).tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert axis_of_pairs({**sections, "mrope_interleaved": True}, 3, 8).tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    for wrong in ({}, {"mrope_section": [4, 4]}, {"mrope_section": [4, 2, 1]}):
        with pytest.raises(ConfigError, match=r"mrope_section .* is not supported: it tells for each of 3 axes"):
            axis_of_pairs(wrong, 3, 8)
    config = transformers.AutoConfig.for_model(**GOLDENS["qwen2_vl"].config).text_config
    config.rope_parameters = {**config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(ConfigError, match="'dynamic' is not supported with positions on 3 axes"):
        rotary_table(config, jnp.zeros((3, 4), int), jnp.full(4, 4))


# What is refused.


def test_embeddings_are_refused(context):
    width = context.model_config.hf_text_config.hidden_size
    for modality, token in (("image", IMAGE), ("video", VIDEO)):
        with pytest.raises(RequestError, match=f"{modality} embeddings can't be taken: its rows' positions need lines"):
            processed(context, (token,), **{modality: np.ones((3, width), np.float32)})


def test_a_video_of_one_frame_is_an_image_to_qwen3_vl(directories):
    with pytest.raises(MediaError, match="a video has 2 frames at least, got 1: give an image, or more frames"):
        processed(context_of(directories, "qwen3_vl"), (VIDEO,), video=clip(1, 40, 40))
    assert len(processed(context_of(directories, "qwen2_vl"), (VIDEO,), video=clip(1, 40, 40)).prompt_token_ids) == 9


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("preprocessor_config.json", {"patch_size": 8}, r"'patch_size': 8.*for this model they are .*'patch_size': 7"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize False"),
        ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "there is Qwen2VLImageProcessor"),
        ("video_preprocessor_config.json", {"merge_size": 1}, "the video processor has .*'merge_size': 1"),
        (
            "video_preprocessor_config.json",
            {"image_mean": [0.5] * 3},
            "image_mean .* frames are prepared as images are",
        ),
        ("video_preprocessor_config.json", {"size": {"longest_edge": 9}}, "needs 'shortest_edge' and 'longest_edge'"),
    ],
)
def test_processors_that_do_not_go_with_the_model_are_refused(tmp_path, file, options, message):
    directory = GOLDENS["qwen2_vl"].write_checkpoint(tmp_path)
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    with pytest.raises(ConfigError, match=message):
        qwen_vl_inputs.video_limits(ModelConfig(model=directory))


def test_max_pixels_of_a_call_are_for_images_and_for_frames_that_have_their_own(directories):
    for name, most in (("qwen2_vl", 2000), ("qwen3_vl", 40 * 256)):
        context = context_of(directories, name, mm_processor_kwargs={"max_pixels": 2000})
        assert qwen_vl_inputs.image_limits(context).most == 2000
        assert qwen_vl_inputs.video_limits(context.model_config).most == most


CONFIGS = [
    ("qwen2_vl", {"vision_config": {"patch_size": [7, 7]}}, "vision_config.patch_size"),
    ("qwen2_vl", {"vision_config": {"num_heads": 16}}, "a width of 32 in 16 heads"),
    ("qwen2_vl", {"vision_config": {"in_channels": 1}}, "vision_config.in_channels 1 is not supported"),
    ("qwen2_vl", {"vision_config": {"hidden_size": 32}}, "rows 32 wide, the language model's hidden_size is 64"),
    ("qwen2_5_vl", {"vision_config": {"window_size": 8}}, "window_size 8 is not supported"),
    ("qwen3_vl", {"vision_config": {"deepstack_visual_indexes": [0, 3]}}, r"\[3\] are not supported: the tower has"),
    ("qwen3_vl", {"text_config": {"num_hidden_layers": 1}}, "of 2 layers are not supported: the decoder has 1"),
]


@pytest.mark.parametrize(("name", "fields", "message"), CONFIGS)
def test_configs_that_are_not_supported(name, fields, message):
    config = {**GOLDENS[name].config}
    for part, values in fields.items():
        config[part] = {**config[part], **values}
    hf_config = transformers.AutoConfig.for_model(**config)
    model = resolve_architecture(GOLDENS[name].config["architectures"])
    with pytest.raises(ConfigError, match=message):
        nnx.eval_shape(lambda: model(hf_config, dtype=jnp.float32, rngs=nnx.Rngs(0)))


# Configs, sizes, the whole engine.


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_flat_configs_of_old_files_mean_the_same(directories, models, tmp_path, name):
    old = {**GOLDENS[name].config}
    text = {**old.pop("text_config")}
    rope = text.pop("rope_parameters")
    old |= {key: value for key, value in text.items() if key != "model_type"}
    old |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    old["vision_config"] = {key: value for key, value in old["vision_config"].items() if key != "model_type"}
    model_config = ModelConfig(model=GOLDENS[name].write_checkpoint(tmp_path, config=old), dtype="float32")
    config, new = model_config.hf_text_config, context_of(directories, name).model_config.hf_text_config
    assert {**config.rope_parameters, "type": None} == {**new.rope_parameters, "type": None}
    same = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "layer_types", "rms_norm_eps", "vocab_size")
    assert [getattr(config, field) for field in same] == [getattr(new, field) for field in same]
    model = load_model(model_config)
    jax.tree.map(
        np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(models[name]))
    )


@pytest.mark.once
@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[1] / "published").glob("qwen*_vl_*.json")), ids=lambda f: f.stem
)
def test_the_largest_published_tower_makes_rows_as_wide_as_embeddings(file):
    config = transformers.AutoConfig.for_model(**json.loads(file.read_text()))
    model = resolve_architecture(config.architectures)
    tower = nnx.eval_shape(lambda: model.tower_class(config.vision_config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    patches = np.zeros((4 * 24, qwen_vl_inputs.patch_width(config.vision_config)), np.float32)
    arrays = {name: array[None] for name, array in model.arrange(config, patches, (2, 3, 4)).items()}
    with jax.numpy_dtype_promotion("standard"):  # norms go through float32
        rows = nnx.eval_shape(lambda tower, arrays: tower(**arrays), tower, arrays)
    deeper = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    assert (rows.shape, rows.dtype) == ((1, 24, config.text_config.hidden_size * (1 + deeper)), jnp.bfloat16)


def test_nothing_compiles_after_warm_up_for_any_size(tmp_path):
    golden = GOLDENS["qwen2_5_vl"]
    text = golden.config["text_config"] | {"max_position_embeddings": 96}
    llm = LLM(
        golden.write_checkpoint(tmp_path, config=golden.config | {"text_config": text}),
        max_num_seqs=1,
        max_num_batched_tokens=32,
        max_encode_items=1,
        on_recompile="raise",
        show_progress=False,
    )
    sizes = [(28, 56), (84, 84), (20, 20), (90, 40), (60, 130)]
    prompts = [{"prompt": "w5 <image> w6", "multi_modal_data": {"image": picture(*size)}} for size in sizes]
    shapes = [(2, 30, 40), (5, 60, 40), (9, 40, 40)]
    prompts += [{"prompt": "w5 <|video_pad|> w6", "multi_modal_data": {"video": clip(*shape)}} for shape in shapes]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=2), on_error="raise", use_tqdm=False)
    assert [len(output.prompt_token_ids) - 2 for output in outputs] == [8, 36, 4, 18, 36, 6, 36, 45]
