"""InternVL's tiles and frames: their tokens, the bounds, shapes that are compiled ahead, and what is refused."""

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
from media_inputs import declared_shapes, mapped, padded_shapes, picture, processed, video

from aphrodite_jax import LLM, ModelConfig, SamplingParams
from aphrodite_jax.errors import ConfigError, MediaError, PlaceholderError
from aphrodite_jax.inputs import INPUT_REGISTRY, DummyData, LLMInputs
from aphrodite_jax.modeling.layers.attention import AttentionMetadata
from aphrodite_jax.modeling.loader import load_model
from aphrodite_jax.modeling.models import internvl
from aphrodite_jax.multimodal import InputContext
from aphrodite_jax.multimodal import frames as video_frames
from kernels_pallas.intervals import causal

pytestmark = pytest.mark.once

GOLDEN = read_golden("internvl")  # of five tiles at most, beside the whole
TILE, ROWS = 28, 4
IMAGE = checkpoints.IMAGE_TOKEN
SPECIAL = GOLDEN.described["special_tokens"]
START, END, VIDEO, NEWLINE, FRAME = (SPECIAL[name] for name in ("<img>", "</img>", "<video>", "\n", "Frame1:"))

PLACEHOLDERS = {"i": IMAGE, "v": VIDEO}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return GOLDEN.write_checkpoint(tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module")
def model_config(directory):
    return ModelConfig(model=directory, limit_mm_per_prompt={"image": 2, "video": 2})


sides = st.one_of(st.integers(1, 300), st.sampled_from([TILE, 2 * TILE, 3 * TILE, 2000]))
sizes = st.tuples(sides, sides)


# Tokens.


@hypothesis.given(st.lists(sizes, min_size=1, max_size=2))
@hypothesis.example([(1, 200), (200, 1)])
@hypothesis.settings(deadline=None, max_examples=25)
def test_images_become_the_tokens_of_hugging_face_s_processor(directory, model_config, image_sizes):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    processor = types.SimpleNamespace(
        start_image_token="<img>", image_token="<image>", end_image_token="</img>", image_seq_length=ROWS
    )
    image_processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    images = list(map(picture, image_sizes))
    features = image_processor(images, crop_to_patches=True)
    texts = [transformers.InternVLProcessor.replace_image_token(processor, features, i) for i in range(len(images))]
    inputs = processed(model_config, PLACEHOLDERS, "t" + "i" * len(images) + "t", images)
    assert list(inputs.prompt_token_ids) == tokenizer(" ".join(["w5", *texts, "w5"]))["input_ids"]
    for place, image in zip(inputs.placeholders["image"], images, strict=True):
        assert place.num_rows == mapped(model_config, "image", image)["pixel_values"].shape[1] * ROWS
        assert place.length <= internvl.max_image_tokens(InputContext(model_config))
        assert inputs.prompt_token_ids[place.offset] == START
        assert inputs.prompt_token_ids[place.stop - 1] == END


def test_images_that_are_not_cut(directory):
    model_config = ModelConfig(model=directory, mm_processor_kwargs={"crop_to_patches": False})
    [place] = processed(model_config, PLACEHOLDERS, "i", [picture((28, 140))]).placeholders["image"]
    assert place.num_rows == ROWS
    assert mapped(model_config, "image", picture((28, 140)))["pixel_values"].shape == (1, 1, 3, TILE, TILE)
    assert internvl.max_image_tokens(InputContext(model_config)) == ROWS + 2


def test_the_frames_of_a_video_are_named(model_config):
    inputs = processed(model_config, PLACEHOLDERS, "tv", videos=[video(2)])
    rows = [START, *[IMAGE] * ROWS, END]
    assert list(inputs.prompt_token_ids) == [5, FRAME, *rows, NEWLINE, FRAME + 1, *rows]
    [place] = inputs.placeholders["video"]
    assert (place.offset, place.num_rows) == (1, 2 * ROWS)
    np.testing.assert_array_equal(np.array(inputs.prompt_token_ids)[place.row_tokens], IMAGE)


def test_frames_are_scaled_as_the_video_processor_s_file_says(model_config):
    options = GOLDEN.described["files"]["video_preprocessor_config.json"]
    frame = checkpoints.images(1, seed=0)[0]
    pixels = mapped(model_config, "video", frame[None])["pixel_values_videos"]
    expected = (frame / 255 - options["image_mean"]) / options["image_std"]
    np.testing.assert_allclose(pixels[0, 0], expected.transpose(2, 0, 1), rtol=0, atol=1e-5)
    narrow = np.zeros((1, 3, 1, 3), np.uint8)  # whose sides could be taken for channels
    assert mapped(model_config, "video", narrow)["pixel_values_videos"].shape == (1, 1, 3, TILE, TILE)


@pytest.mark.parametrize("order", ["iv", "vi", "vtivi", "vviti"])
def test_images_and_videos_in_any_order(model_config, order):
    images = [picture((28, 28 * (1 + index))) for index in range(order.count("i"))]
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
    image, frames = np.zeros((7, 64), np.float32), np.zeros((2 * ROWS, 64), np.float32)
    inputs = processed(model_config, PLACEHOLDERS, "iv", [image], [frames])
    assert [place.num_rows for place in inputs.placeholders["image"]] == [7]
    assert inputs.prompt_token_ids[7 + 2] == FRAME
    assert [place.num_rows for place in inputs.placeholders["video"]] == [2 * ROWS]
    with pytest.raises(MediaError, match="video embeddings have 4 rows a frame for this model, got 7"):
        processed(model_config, PLACEHOLDERS, "v", videos=[image])


def test_a_tokenizer_that_does_not_name_its_tokens_has_the_usual_ones(tmp_path, directory):
    checkpoints.write_tokenizer(tmp_path, special_tokens=SPECIAL)
    model_config = ModelConfig(model=directory, tokenizer=tmp_path)
    assert internvl.video_token_id(model_config) == VIDEO
    assert internvl.media_text(model_config)(0) == (START, IMAGE, END)


def test_a_placeholder_without_its_item(model_config):
    with pytest.raises(PlaceholderError, match=rf"1 placeholders \(token {VIDEO}\) for 0 items"):
        processed(model_config, PLACEHOLDERS, "iv", [picture((28, 28))])


# Bounds and shapes.


def test_the_bounds_are_reached_by_the_dummy_data(model_config):
    context = InputContext(model_config)
    dummy = internvl.dummy_data(context, 512, {"image": 2, "video": 2})
    assert isinstance(dummy, DummyData)
    inputs = INPUT_REGISTRY.process_input(
        model_config, LLMInputs(prompt_token_ids=dummy.prompt_token_ids, multi_modal_data=dummy.multi_modal_data)
    )
    assert len(inputs.prompt_token_ids) == 512
    lengths = {modality: {place.length for place in places} for modality, places in inputs.placeholders.items()}
    assert lengths == {"image": {6 * ROWS + 2}, "video": {internvl.max_video_tokens(context)}}
    assert internvl.max_image_tokens(context) == 6 * ROWS + 2
    frames = {len(frames) for frames in dummy.multi_modal_data["video"]}
    assert frames == {internvl.max_frames(context)}
    more = len(internvl.tokens_of_video(context, internvl.max_frames(context) + 1))
    assert 2 * (6 * ROWS + 2) + 2 * more > 512, "another frame would not fit"


def test_the_largest_items_must_fit(directory):
    context = InputContext(ModelConfig(model=directory, max_model_len=30))
    with pytest.raises(
        ConfigError, match="1 image items of up to 26 and 1 video items of up to 7 tokens do not fit in 30 tokens"
    ):
        internvl.dummy_data(context, 30, {"image": 1, "video": 1})


@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 5), (4, 11), (6, 12), (1, 40)])
def test_every_image_has_one_of_the_shapes_of_the_examples(directory, least, most):
    model_config = ModelConfig(model=directory, mm_processor_kwargs={"min_patches": least, "max_patches": most})
    lines = [picture((1, tiles)) for tiles in range(least, most + 1)]
    others = [picture(size) for size in [(300, 1), (40, 50), (100, 90), (400, 300), (280, 280)]]
    shapes = padded_shapes(model_config, "image", lines + others)
    declared = {shape for shape in declared_shapes(model_config) if shape[0][0] == "pixel_values"}
    assert shapes <= declared
    assert max(shapes) == max(declared)


def test_every_video_has_one_of_the_shapes_of_the_examples(model_config):
    shapes = padded_shapes(model_config, "video", [video(count) for count in (1, 8, 9, 17, 31, 32)])
    assert len(shapes) == 4
    assert shapes <= declared_shapes(model_config)


def test_little_of_the_work_is_for_padding(directory):
    context = InputContext(ModelConfig(model=directory, mm_processor_kwargs={"max_patches": 12}))
    photos = [(3, 4), (2, 3), (9, 16), (1, 1), (4, 3), (3, 2), (16, 9), (5, 4), (1, 2), (3, 1), (210, 297)]
    tiles = [internvl.num_tiles(context, (50 * height, 50 * width)) for height, width in photos]
    encoded = [next(count for count in internvl.TILE_COUNTS if count >= number) for number in tiles]
    assert sum(encoded) <= 1.1 * sum(tiles)


def test_padding_does_not_change_an_item_s_rows(model_config):
    model = load_model(model_config)
    encode = jax.jit(lambda arrays: model.embed_multimodal(**arrays))
    items = {"image": checkpoints.images_of([(60, 60)], 0)[0], "video": checkpoints.video_of((3, 30, 40), 0)}
    for modality, item in items.items():
        arrays = mapped(model_config, modality, item)
        padded = internvl.pad_media(model_config.hf_config, arrays)
        [rows], [more] = encode(arrays)[modality], encode(padded)[modality]
        assert len(more) > len(rows)
        np.testing.assert_allclose(more[: len(rows)], rows, rtol=0, atol=1e-5)


# The engine.


@pytest.fixture(scope="module")
def llm(directory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(video_frames, "MAX_FRAMES", 8)  # one shape of videos
        return LLM(
            directory,
            mm_processor_kwargs={"max_patches": 2},
            max_num_seqs=1,
            max_model_len=96,
            max_num_batched_tokens=64,
            max_encode_items=1,
            on_recompile="raise",
            show_progress=False,
        )


def test_a_video_before_an_image(llm, model_config):
    """Their rows stand for one token: the engine puts each item's where its tokens are."""
    frames, image = checkpoints.video_of((2, 30, 40), 1), checkpoints.images(1, 2)[0]
    request = {"prompt": "w9 <video> w8 <image> w7", "multi_modal_data": {"image": image, "video": frames}}
    [output] = llm.generate([request], SamplingParams(temperature=0, max_tokens=1), on_error="raise", use_tqdm=False)
    model, ids = load_model(model_config), jnp.asarray(output.prompt_token_ids)
    arrays = mapped(model_config, "image", image) | mapped(model_config, "video", frames)
    metadata = AttentionMetadata(intervals={"full": causal(len(ids))})

    @jax.jit
    def logits(arrays):
        media = {modality: rows[0] for modality, rows in model.embed_multimodal(**arrays).items()}
        rows = jnp.concatenate([media["video"], media["image"]])
        embeds = model.embed_input_ids(ids).at[np.flatnonzero(np.asarray(ids) == IMAGE)].set(rows)
        hidden, _ = model(ids, jnp.arange(len(ids)), None, metadata, inputs_embeds=embeds)
        return model.compute_logits(hidden[-1:])

    assert output.outputs[0].token_ids == (int(logits(arrays).argmax()),)
    with pytest.raises(ValueError, match="images and videos in one call can't be told apart"):
        model(ids, jnp.arange(len(ids)), None, metadata, **arrays)


# What is refused.


def test_too_many_frames(model_config):
    with pytest.raises(MediaError, match=r'33 frames, at most 32 are taken: .* video_sampling=\{"num_frames": 32\}'):
        mapped(model_config, "video", video(33))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"size": {"height": 56, "width": 56}},
            r"makes tiles of 56 x 56 pixels .* takes 28 x 28: they must be the same",
        ),
        ({"do_resize": False}, r"do_resize False"),
        ({"max_patches": 49}, r"max_patches 49 is not supported: at most 48 are"),
    ],
)
def test_options_of_the_processor_that_do_not_go_with_the_model(directory, options, message):
    with pytest.raises(ConfigError, match=message):
        processed(ModelConfig(model=directory, mm_processor_kwargs=options), PLACEHOLDERS, "i", [picture((30, 30))])


def test_another_image_processor_is_refused(tmp_path):
    directory = GOLDEN.write_checkpoint(tmp_path)
    (directory / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "SiglipImageProcessor"}))
    with pytest.raises(ConfigError, match=r"SiglipImageProcessorPil does not cut .* there is GotOcr2ImageProcessor"):
        processed(ModelConfig(model=directory), PLACEHOLDERS, "i", [picture((30, 30))])


def test_a_tokenizer_without_the_tokens_is_refused(tmp_path, directory):
    with pytest.raises(ConfigError, match="the token of image_token_id 500 whole"):
        internvl.media_text(ModelConfig(model=directory, hf_overrides={"image_token_id": 500}))(0)
    checkpoints.write_tokenizer(tmp_path)
    model_config = ModelConfig(model=directory, tokenizer=tmp_path)
    with pytest.raises(ConfigError, match=r"no token '<video>': name it in tokenizer_config.json as 'video_token'"):
        internvl.video_token_id(model_config)


def build(config):
    config = transformers.InternVLConfig.from_dict(config)
    return internvl.InternVLForConditionalGeneration(config, dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("outer", "inner"), [(True, True), (True, False), (False, True), (False, False)])
def test_embeddings_are_tied_where_both_configs_say_so(outer, inner):
    text = GOLDEN.config["text_config"] | {"tie_word_embeddings": inner}
    model = nnx.eval_shape(lambda: build(GOLDEN.config | {"text_config": text, "tie_word_embeddings": outer}))
    assert hasattr(model.language_model, "lm_head") == (not (outer and inner))


@pytest.mark.parametrize(
    ("fields", "tower", "message"),
    [
        ({"downsample_ratio": 0.4}, {}, "downsample_ratio 0.4 is not supported"),
        ({"downsample_ratio": 1 / 3}, {}, "divides the 4 patches along the side of a tile"),
        (
            {"vision_feature_layer": [1, 2]},
            {},
            r"vision_feature_layer \[1, 2\] is not supported: one number in \[-4, 4\)",
        ),
        ({"vision_feature_layer": 4}, {}, "vision_feature_layer 4 is not supported"),
        ({"vision_feature_select_strategy": "full"}, {}, "strategy 'full' of InternVL is not supported"),
        ({}, {"image_size": [28, 56]}, r"vision_config.image_size \[28, 56\] is not supported: both sides are equal"),
        ({}, {"norm_type": "batch_norm"}, "norm_type 'batch_norm' is not supported; there are layer_norm, rms_norm"),
        ({"text_config": {"model_type": "gpt2"}}, {}, "'gpt2' is not supported; there are llama, qwen2, qwen3"),
    ],
)
def test_configs_that_are_refused(fields, tower, message):
    config = GOLDEN.config | {"vision_config": GOLDEN.config["vision_config"] | tower} | fields
    with pytest.raises(ConfigError, match=message):
        nnx.eval_shape(lambda: build(config))
