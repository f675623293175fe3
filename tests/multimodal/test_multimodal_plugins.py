"""What each modality takes as an item, how it is opened, and what its defaults make of it."""

import functools
import io
import json

import llava_files
import ml_dtypes
import numpy as np
import pytest
import transformers
from PIL import Image

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError, MediaError, RegistrationError, RequestError
from aphrodite_jax.inputs import load_tokenizer, render_chat
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, InputContext, MultiModalInputs, Video, embedding_rows
from aphrodite_jax.multimodal.context import model_class
from aphrodite_jax.multimodal.hf_processors import image_processor, items_of
from aphrodite_jax.multimodal.plugins import AudioPlugin, ImagePlugin, VideoPlugin
from aphrodite_jax.multimodal.registry import default_registry

WIDTH = llava_files.WIDTH


@pytest.fixture(scope="module")
def model_config(tmp_path_factory):
    return ModelConfig(
        model=llava_files.write_llava(tmp_path_factory.mktemp("llava")), limit_mm_per_prompt={"image": 8}
    )


def with_config(directory, **fields) -> InputContext:
    return InputContext(ModelConfig(model=llava_files.write_llava(directory, llava_files.llava_config(**fields))))


def picture(width=40, height=30, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def embeddings(rows=3, width=WIDTH, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(rows).normal(size=(rows, width)).astype(dtype)


# Images.


def encoded(image, kind="PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


# The first bytes of video files: MP4, WebM, MPEG transport, program and elementary streams, AVI.
CLIPS = [
    b"\0\0\0\x20ftypisom\0\0\2\0isomiso2mp41" + bytes(64),
    b"\x1aE\xdf\xa3\x01\0\0\0\0\0\0\x1fB\x86\x81\x01" + bytes(64),
    b"G@\x11\x10\0B\xf0%\0\x01\xc1\0\0\xff\x01\xff" + bytes(172),
    b"\0\0\1\xba!\0\1\0\1\x80\0\1" + bytes(64),
    b"\0\0\1\xb3\x16\0\xf0\x13\xff\xff\xe0\x18" + bytes(64),
    b"RIFF\x24\0\0\0AVI LIST" + bytes(64),
]


def test_items_of_images(model_config):
    split = functools.partial(ImagePlugin().split, model_config=model_config)
    a, b = picture(), picture(seed=1)
    assert split(a) == (a,)
    assert split([a, b]) == split((a, b)) == (a, b)
    assert split([]) == ()
    assert split("a.png") == ("a.png",)
    assert split(b"bytes") == (b"bytes",)
    assert len(split(np.zeros((5, 4, 4, 3), np.uint8))) == 5
    assert len(split(np.zeros((4, 4, 3), np.uint8))) == 1
    assert len(split(np.zeros((4, 4), np.uint8))) == 1
    assert len(split(np.zeros((5, 4, WIDTH), np.float32))) == 5
    assert len(split(np.zeros((4, WIDTH), ml_dtypes.bfloat16))) == 1
    assert len(split([embeddings(3), picture(), embeddings(4)])) == 3


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("plugin", [ImagePlugin(), VideoPlugin(), AudioPlugin()], ids=lambda p: p.modality)
def test_embeddings_are_opened_to_float32(model_config, plugin, dtype):
    given = embeddings(dtype=dtype)
    opened = plugin.open(given, model_config)
    assert opened.dtype == np.float32
    np.testing.assert_array_equal(opened, given.astype(np.float32))
    assert not np.shares_memory(opened, given)
    assert embedding_rows(opened) == 3
    np.testing.assert_array_equal(plugin.open(opened, model_config), opened)
    several = np.stack([given, given])
    assert [x.shape for x in plugin.split(several, model_config)] == [given.shape] * 2
    (one,) = plugin.split(given, model_config)
    assert one is given


@pytest.mark.parametrize("plugin", [ImagePlugin(), VideoPlugin(), AudioPlugin()], ids=lambda p: p.modality)
@pytest.mark.parametrize("shape", [(3, WIDTH + 1), (3, WIDTH - 1), (0, WIDTH)])
def test_embeddings_of_another_width_or_of_no_rows(model_config, plugin, shape):
    message = (
        rf"{plugin.modality} embeddings of one item are \[rows, 16\] for this model, got \[{shape[0]}, {shape[1]}\]"
    )
    with pytest.raises(MediaError, match=message):
        plugin.open(np.zeros(shape, np.float32), model_config)


@pytest.mark.parametrize("shape", [(), (WIDTH,), (1, 3, WIDTH), (2, 1, 3, WIDTH)])
def test_image_embeddings_of_another_rank(model_config, shape):
    with pytest.raises(MediaError, match=r"image embeddings of one item are \[rows, 16\]"):
        ImagePlugin().open(np.zeros(shape, np.float32), model_config)


@pytest.mark.parametrize(
    ("modality", "pixels"), [("image", "an image is a uint8"), ("video", "a video's frames are a uint8")]
)
@pytest.mark.parametrize("shape", [(48, 64, 3), (3, 48, 64), (1, 48, 64, 3)])
def test_floating_point_pixels_are_not_taken_for_many_embeddings(model_config, modality, pixels, shape):
    plugin = {"image": ImagePlugin(), "video": VideoPlugin()}[modality]
    (item,) = plugin.split(np.zeros(shape, np.float32), model_config)
    got = ", ".join(map(str, shape))
    with pytest.raises(
        MediaError, match=rf"{modality} embeddings of one item are \[rows, 16\].*got \[{got}\].*{pixels}"
    ):
        plugin.open(item, model_config)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_embeddings_are_finite(model_config, value):
    given = np.zeros((3, WIDTH))
    given[1, 2] = value
    with pytest.raises(MediaError, match="image embeddings hold values that are not finite"):
        ImagePlugin().open(given, model_config)


def test_embedding_rows_of_all_else():
    for item in (
        picture(),
        np.zeros((3, 4), np.uint8),
        np.zeros((3, 4, 5), np.float32),
        (np.zeros(3), 16000),
        "x",
        None,
    ):
        assert embedding_rows(item) == 0


def modes() -> dict[str, Image.Image]:
    rgba = picture(50, 60, seed=5).convert("RGBA")
    rgba.putalpha(picture(50, 60, seed=6).convert("L"))
    palette = picture(seed=7).quantize(32)
    palette.info["transparency"] = 3
    return {
        "RGB": picture(),
        "wide": picture(400, 20, seed=1),
        "tall": picture(20, 400, seed=2),
        "small": picture(3, 2, seed=3),
        "1x1": picture(1, 1, seed=4),
        "exact": picture(28, 28, seed=8),
        "L": picture(seed=9).convert("L"),
        "1": picture(seed=9).convert("1"),
        "CMYK": picture(seed=9).convert("CMYK"),
        "RGBA": rgba,
        "P": picture(seed=7).quantize(32),
        "P with transparency": palette,
    }


@pytest.mark.parametrize("name", modes())
def test_the_default_mapper_equals_the_processor_of_hugging_face(model_config, name):
    image = modes()[name]
    settings = {key: value for key, value in llava_files.CLIP_PROCESSOR.items() if key != "image_processor_type"}
    expected = transformers.CLIPImageProcessorPil(**settings)(images=[image], return_tensors="np")["pixel_values"]
    mapped = MULTIMODAL_REGISTRY.map_input(model_config, {"image": image})
    assert set(mapped) == {"pixel_values"}
    assert mapped["pixel_values"].dtype == np.float32
    np.testing.assert_array_equal(mapped["pixel_values"], expected.astype(np.float32))


def test_pixels_are_those_of_the_papers_arithmetic(model_config):
    image = picture(28, 28)
    mean, std = (np.array(llava_files.CLIP_PROCESSOR[key]) for key in ("image_mean", "image_std"))
    expected = ((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1)[None]
    mapped = MULTIMODAL_REGISTRY.map_input(model_config, {"image": image})
    np.testing.assert_allclose(mapped["pixel_values"], expected, atol=1e-6)


def test_images_are_mapped_as_each_alone(model_config):
    images = [image for image in modes().values()][:4]
    together = MULTIMODAL_REGISTRY.map_input(model_config, {"image": images})
    assert together["pixel_values"].shape == (4, 3, 28, 28)
    for row, image in zip(together["pixel_values"], images, strict=True):
        np.testing.assert_array_equal(
            row, MULTIMODAL_REGISTRY.map_input(model_config, {"image": image})["pixel_values"][0]
        )
    ctx = InputContext(model_config)
    at_once = ImagePlugin().default_mapper(ctx, [ImagePlugin().open(image, model_config) for image in images])
    np.testing.assert_array_equal(at_once["pixel_values"], together["pixel_values"])


def test_embeddings_pass_the_default_mapper(model_config):
    ctx, plugin = InputContext(model_config), ImagePlugin()
    mapped = plugin.default_mapper(ctx, [embeddings(3), embeddings(3)])
    assert mapped["image_embeds"].shape == (2, 3, WIDTH)
    ragged = plugin.default_mapper(ctx, [embeddings(3), embeddings(2)])
    assert [x.shape for x in ragged["image_embeds"]] == [(3, WIDTH), (2, WIDTH)]
    with pytest.raises(RequestError, match="pixels and embeddings can't be mapped together"):
        plugin.default_mapper(ctx, [embeddings(3), picture()])


def test_the_default_bound_of_image_tokens(tmp_path):
    bound = ImagePlugin().default_max_tokens
    assert bound(with_config(tmp_path / "a", image_size=336)) == 577
    assert bound(with_config(tmp_path / "b", image_size=336, image_seq_length=9)) == 577
    towerless = with_config(tmp_path / "d", image_seq_length=9)
    towerless.model_config.hf_config.vision_config.image_size = None
    assert bound(towerless) == 9
    text = llava_files.write_config(tmp_path / "c", llava_files.text_config())
    with pytest.raises(
        RegistrationError, match=r"does not tell how many tokens one image item takes.*register_max_image_tokens"
    ):
        bound(InputContext(ModelConfig(model=text)))


def test_the_processors_options(model_config):
    def pixels(**options):
        other = ModelConfig(model=model_config.model, mm_processor_kwargs=options)
        return MULTIMODAL_REGISTRY.map_input(other, {"image": picture()})["pixel_values"]

    assert pixels(size={"shortest_edge": 20}, crop_size={"height": 14, "width": 16}).shape == (1, 3, 14, 16)
    plain = pixels(do_normalize=False)
    assert plain.min() >= 0
    assert plain.max() <= 1
    with pytest.raises(
        ConfigError, match=r"CLIPImageProcessor\w* has no option 'cropsize'; its options are .*crop_size"
    ):
        pixels(cropsize=3)
    with pytest.raises(ConfigError, match=r"mm_processor_kwargs.*size"):
        pixels(size="large")


@pytest.mark.parametrize("content", [None, "{", json.dumps({"image_processor_type": "NoSuchProcessor"})])
def test_no_processor_to_use(tmp_path, content):
    llava_files.write_config(tmp_path, llava_files.llava_config(vision_config={"model_type": "clip_vision_model"}))
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(
        ConfigError, match=r"the default image mapper has no Hugging Face processor.*register_image_input_mapper"
    ):
        MULTIMODAL_REGISTRY.map_input(ModelConfig(model=tmp_path), {"image": picture()})


def test_a_processor_is_loaded_once_for_a_config(model_config):
    assert image_processor(model_config) is image_processor(model_config)
    assert image_processor(ModelConfig(model=model_config.model)) is not image_processor(model_config)


def test_results_that_are_not_one_an_item():
    with pytest.raises(RegistrationError, match="it gave x with 3 entries for 2 items"):
        items_of({"x": np.zeros((3, 4))}, 2, "it")
    ragged = items_of({"x": [np.zeros((2, 3)), [np.zeros(1), np.zeros(2)]]}, 2, "it")
    assert ragged["x"][0].dtype == np.float32
    assert [x.shape for x in ragged["x"][1]] == [(1,), (2,)]


# Videos.


def test_items_of_videos(model_config):
    split = functools.partial(VideoPlugin().split, model_config=model_config)
    a, b = [picture(), picture(seed=1)], [picture(seed=2)]
    array = np.zeros((5, 4, 4, 3), np.uint8)
    assert split(a) == (a,)
    assert split([a, b]) == (a, b)
    assert split((tuple(a), array)) == (tuple(a), array)
    assert len(split(array)) == 1
    assert len(split(np.stack([array, array]))) == 2
    assert len(split([array, array])) == 2
    assert len(split([embeddings(2), embeddings(3)])) == 2
    assert len(split([np.zeros((4, 4, 3), np.uint8)] * 2)) == 1  # two frames
    assert len(split({"frames": a, "fps": 2})) == 1
    assert len(split([{"frames": a}, {"frames": b}])) == 2
    assert len(split(["a.png", "b.png"])) == 1  # two frames
    assert split(["a.mp4", "b.webm"]) == ("a.mp4", "b.webm")
    assert split("a.mp4") == ("a.mp4",)
    assert split([]) == ([],)
    names = ["a.ts", "a.mkv", "clips/a", "clip.MPG", "data:video/x-own;base64,AA==", "data:;base64,AA=="]
    assert split(names) == tuple(names)
    frames = ["a.webp", "b.JPEG", "data:image/png;base64,AA==", "c.tif"]
    assert split(frames) == (frames,)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_bytes_in_a_list_are_videos_unless_they_are_pictures(model_config, wrap):
    split = functools.partial(VideoPlugin().split, model_config=model_config)
    clips = [wrap(clip) for clip in CLIPS]
    assert split(clips) == tuple(clips)
    assert split(clips[:1]) == (clips[0],)
    frames = [wrap(encoded(picture(), kind)) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
    assert split(frames) == (frames,)


def test_each_item_of_a_chat_is_one_video(model_config, tmp_path, monkeypatch):
    """Whatever its name: no list of frames is made of them."""
    llava_files.write_llava(tmp_path)
    llava_files.write_tokenizer(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
    own = ModelConfig(model=tmp_path)
    items = ["a.png", CLIPS[0], [picture()], encoded(picture())]
    content = [{"type": "video", "video": item} for item in items]
    prompt = render_chat([{"role": "user", "content": content}], load_tokenizer(own), own)
    assert prompt["multi_modal_data"] == {"video": items}
    monkeypatch.setattr(VideoPlugin, "open", lambda self, item, model_config: item)
    registry = default_registry()
    registry.register_video_input_mapper()(model_class(own))
    asked = ModelConfig(model=tmp_path, limit_mm_per_prompt={"video": len(items)})
    assert registry.split_items(asked, prompt["multi_modal_data"]) == {"video": tuple(items)}


def test_the_default_video_mapper_needs_a_processor(model_config):
    with pytest.raises(
        ConfigError, match=r"the default video mapper has no Hugging Face processor.*register_video_input_mapper"
    ):
        VideoPlugin().default_mapper(InputContext(model_config), [Video(frames=np.zeros((2, 4, 4, 3), np.uint8))])


@pytest.mark.parametrize("plugin", [VideoPlugin(), AudioPlugin()], ids=lambda p: p.modality)
def test_default_bounds_come_from_the_config(tmp_path, plugin):
    modality = plugin.modality
    assert plugin.default_max_tokens(with_config(tmp_path / "a", **{f"{modality}_seq_length": 7})) == 7
    with pytest.raises(RegistrationError, match=f"how many tokens one {modality} item takes"):
        plugin.default_max_tokens(with_config(tmp_path / "b"))


# Audio.


def test_items_of_audio(model_config):
    split = functools.partial(AudioPlugin().split, model_config=model_config)
    wave = np.zeros(10, np.float32)
    assert split((wave, 16000)) == ((wave, 16000),)
    assert split([wave, 16000]) == ([wave, 16000],)
    assert split([(wave, 16000)]) == ((wave, 16000),)
    assert len(split([(wave, 16000), (wave, 8000)])) == 2
    assert len(split((wave, np.int64(16000)))) == 1


def test_waveforms_are_opened_to_float32(model_config):
    plugin = AudioPlugin()
    wave, rate = plugin.open((np.array([-32768, 0, 16384], np.int16), 8000.0), model_config)
    assert (wave.dtype, rate) == (np.float32, 8000)
    np.testing.assert_array_equal(wave, np.float32([-1, 0, 0.5]))
    given = np.array([0.25, -0.5])
    wave, rate = plugin.open([given, 16000], model_config)
    assert wave.dtype == np.float32
    np.testing.assert_array_equal(wave, given)
    again, _ = plugin.open((wave, rate), model_config)
    np.testing.assert_array_equal(again, wave)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("a.wav", "an audio item is .*got str"),
        (np.zeros(4, np.float32), "an audio item is .*got ndarray"),
        ((np.zeros(4, np.float32),), "an audio item is .*got tuple"),
        ((np.zeros(4, np.float32), "16000"), "an audio item is"),
        ((np.zeros(4, np.float32), True), "an audio item is"),
        ((np.zeros(4, np.float32), 0), "a sampling rate is a whole number of hertz above 0, got 0"),
        ((np.zeros(4, np.float32), -5), "a sampling rate is a whole number of hertz above 0, got -5"),
        ((np.zeros(4, np.float32), float("nan")), "a sampling rate is a whole number of hertz above 0, got nan"),
        ((np.zeros(4, np.float32), float("inf")), "a sampling rate is a whole number of hertz above 0, got inf"),
        ((np.zeros(4, np.float32), 16000.5), "a sampling rate is a whole number of hertz above 0, got 16000.5"),
        ((np.zeros((4, 2), np.float32), 16000), r"a waveform is mono \[samples\].*got float32\[4, 2\] \(average the"),
        ((np.zeros(0, np.float32), 16000), "a waveform is mono"),
        ((np.zeros(4, np.uint8), 16000), "a waveform is mono"),
        ((np.array([np.nan]), 16000), "a waveform is mono"),
    ],
)
def test_audio_that_is_none(model_config, item, message):
    with pytest.raises(MediaError, match=message):
        AudioPlugin().open(item, model_config)


def test_the_default_audio_mapper(tmp_path):
    settings = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 4, "n_fft": 400, "chunk_length": 1}
    ctx = InputContext(ModelConfig(model=llava_files.write_llava(tmp_path, processor=settings)))
    waves = [np.random.default_rng(seed).normal(size=8000).astype(np.float32) for seed in range(2)]
    mapped = AudioPlugin().default_mapper(ctx, [(wave, 16000) for wave in waves])
    assert isinstance(mapped, MultiModalInputs)
    expected = transformers.WhisperFeatureExtractor(feature_size=4, n_fft=400, chunk_length=1)(
        waves, sampling_rate=16000, return_tensors="np"
    )["input_features"]
    np.testing.assert_array_equal(mapped["input_features"], expected)
    with pytest.raises(MediaError, match=r"the model hears 16000 Hz, got \[8000, 16000\]: resample beforehand"):
        AudioPlugin().default_mapper(ctx, [(waves[0], 16000), (waves[1], 8000)])
