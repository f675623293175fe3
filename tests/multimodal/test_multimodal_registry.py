"""MULTIMODAL_REGISTRY on its own: a model directory and a config value are all that it needs."""

import dataclasses
import gc
import threading
import warnings
import weakref

import llava_files
import numpy as np
import pytest
from PIL import Image

from aphrodite_jax import register_model
from aphrodite_jax.config import ModelConfig
from aphrodite_jax.engine.admission import map_media
from aphrodite_jax.engine.profiling import media_shapes
from aphrodite_jax.errors import ConfigError, MediaError, RegistrationError, RequestError, TooManyItemsError
from aphrodite_jax.inputs import INPUT_REGISTRY, DummyData, LLMInputs, PlaceholderRange
from aphrodite_jax.modeling.models.interfaces import SupportsMultiModal
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, MultiModalInputs, MultiModalPlugin, MultiModalRegistry
from aphrodite_jax.multimodal.registry import default_registry


@pytest.fixture
def registry():
    return default_registry()


@pytest.fixture
def serve(llava):
    """Makes a class the one that serves a config."""

    def serve(model_cls: type, **options) -> ModelConfig:
        register_model(model_cls.__name__)(model_cls)
        return ModelConfig(model=llava, hf_overrides={"architectures": [model_cls.__name__]}, **options)

    return serve


def picture(seed=0, size=(40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


def map_sizes(ctx, items) -> MultiModalInputs:
    return MultiModalInputs({"sizes": np.array([item.size for item in items])})


# As in a notebook: a directory with a config and a preprocessor, and LLaVA's class.


def test_the_registry_alone_maps_images(llava):
    model_config = ModelConfig(model=llava, limit_mm_per_prompt={"image": 2})
    one = MULTIMODAL_REGISTRY.map_input(model_config, {"image": picture()})
    assert one["pixel_values"].shape == (1, 3, 28, 28)
    two = MULTIMODAL_REGISTRY.map_input(model_config, {"image": [picture(), picture(1, (300, 20))]})
    assert two["pixel_values"].shape == (2, 3, 28, 28)
    np.testing.assert_array_equal(two["pixel_values"][:1], one["pixel_values"])
    assert MULTIMODAL_REGISTRY.get_max_multimodal_tokens(model_config) == 2 * 4
    assert MULTIMODAL_REGISTRY.max_tokens_per_item(model_config) == {"image": 4}
    assert MULTIMODAL_REGISTRY.get_mm_limits(model_config) == {"image": 2}


def test_nothing_to_map(llava):
    model_config = ModelConfig(model=llava)
    for data in ({}, {"image": []}, {"image": ()}, {"image": None}):
        assert MULTIMODAL_REGISTRY.map_input(model_config, data) == MultiModalInputs()
        assert MULTIMODAL_REGISTRY.split_items(model_config, data) == {}
    assert MULTIMODAL_REGISTRY.split_items(model_config, None) == {}


@pytest.mark.parametrize("collect", [list, tuple, lambda items: np.stack([np.asarray(item) for item in items])])
def test_items_over_the_limit(llava, collect):
    for limit, options in ((1, {}), (2, {"limit_mm_per_prompt": {"image": 2}})):
        model_config = ModelConfig(model=llava, **options)
        images = [picture(seed) for seed in range(limit + 1)]
        assert len(MULTIMODAL_REGISTRY.split_items(model_config, {"image": collect(images[:limit])})["image"]) == limit
        with pytest.raises(TooManyItemsError) as info:
            MULTIMODAL_REGISTRY.map_input(model_config, {"image": collect(images)})
        assert str(info.value) == (
            f"the prompt has {limit + 1} image items, at most {limit} allowed: "
            f'set limit_mm_per_prompt={{"image": {limit + 1}}}'
        )
        assert isinstance(info.value, ValueError)


def test_the_limit_is_checked_before_anything_is_opened(llava):
    with pytest.raises(TooManyItemsError):
        MULTIMODAL_REGISTRY.map_input(ModelConfig(model=llava), {"image": ["no/such.png", "nor/this.png"]})


def test_embeddings_become_keyword_arrays(llava):
    model_config = ModelConfig(model=llava, limit_mm_per_prompt={"image": 3})
    embeds = np.ones((4, llava_files.WIDTH), np.float32)
    assert MULTIMODAL_REGISTRY.map_input(model_config, {"image": embeds})["image_embeds"].shape == (1, 4, 16)
    several = MULTIMODAL_REGISTRY.map_input(model_config, {"image": np.stack([embeds, embeds])})
    assert set(several) == {"image_embeds"}
    assert several["image_embeds"].shape == (2, 4, 16)
    with pytest.raises(MediaError, match=r"\[rows, 16\] for this model, got \[4, 15\]"):
        MULTIMODAL_REGISTRY.map_input(model_config, {"image": embeds[:, 1:]})


def test_the_callers_data_do_not_change(llava):
    model_config = ModelConfig(model=llava, limit_mm_per_prompt={"image": 2})
    images = [np.asarray(picture()).copy(), picture(1)]
    data = {"image": images}
    before = [np.array(image) for image in images]
    split = MULTIMODAL_REGISTRY.split_items(model_config, data)
    mapped = MULTIMODAL_REGISTRY.map_input(model_config, data)
    assert set(data) == {"image"}
    assert data["image"] is images
    assert len(images) == 2
    for image, old in zip(images, before, strict=True):
        np.testing.assert_array_equal(np.asarray(image), old)
    assert isinstance(split["image"], tuple)
    with pytest.raises(ValueError, match="read-only"):
        mapped["pixel_values"][0] = 0


# Errors, each its own.


def test_an_unknown_modality(llava):
    model_config = ModelConfig(model=llava)
    with pytest.raises(RequestError, match="unknown modality 'smell'; there are image, video, audio"):
        MULTIMODAL_REGISTRY.map_input(model_config, {"smell": 1})
    for register in (MULTIMODAL_REGISTRY.register_input_mapper, MULTIMODAL_REGISTRY.register_max_multimodal_tokens):
        with pytest.raises(RegistrationError, match="unknown modality 'smell'"):
            register("smell")
    with pytest.raises(ConfigError, match="unknown modality 'smell'"):
        MULTIMODAL_REGISTRY.get_mm_limits(ModelConfig(model=llava, limit_mm_per_prompt={"smell": 2}))


def test_no_mapper(llava, registry, serve):
    data = {"audio": (np.zeros(4, np.float32), 16000)}
    with pytest.raises(RegistrationError) as info:
        MULTIMODAL_REGISTRY.map_input(ModelConfig(model=llava), data)
    assert str(info.value) == (
        "LlavaForConditionalGeneration has no audio input mapper (it takes image); to add one, decorate the class "
        "with MULTIMODAL_REGISTRY.register_input_mapper('audio')"
    )

    class Bare(SupportsMultiModal):
        pass

    with pytest.raises(RegistrationError, match=r"Bare has no image input mapper \(it takes nothing yet\)"):
        registry.map_input(serve(Bare), {"image": picture()})


def test_two_mappers_of_one_keyword(registry, serve):
    def to_values(ctx, items):
        return MultiModalInputs({"values": np.zeros((len(items), 2))})

    @registry.register_audio_input_mapper(to_values)
    @registry.register_image_input_mapper(to_values)
    class Both(SupportsMultiModal):
        pass

    model_config = serve(Both)
    image, audio = {"image": picture()}, {"audio": (np.ones(4, np.float32), 16000)}
    assert registry.map_input(model_config, image)["values"].shape == (1, 2)
    assert registry.map_input(model_config, audio)["values"].shape == (1, 2)
    with pytest.raises(RegistrationError, match="Both: the mappers of image and audio both give 'values'; rename one"):
        registry.map_input(model_config, image | audio)


def test_the_engine_refuses_two_mappers_of_one_keyword(serve):
    """For the dummy data at the start, and for a request that has both."""

    def to_values(ctx, items):
        return MultiModalInputs({"values": np.zeros((len(items), 2), np.float32)})

    def dummy_data(ctx, seq_len, mm_counts):
        media = {"audio": [(np.ones(4, np.float32), 16000)], "image": [picture()]}
        return DummyData(prompt_token_ids=(0, 0), multi_modal_data=media)

    def place(ctx, inputs):
        places = {"audio": (PlaceholderRange(0, 1),), "image": (PlaceholderRange(1, 1),)}
        return dataclasses.replace(inputs, placeholders={name: places[name] for name in inputs.multi_modal_data})

    @MULTIMODAL_REGISTRY.register_audio_input_mapper(to_values)
    @MULTIMODAL_REGISTRY.register_image_input_mapper(to_values)
    @MULTIMODAL_REGISTRY.register_max_audio_tokens(1)
    @MULTIMODAL_REGISTRY.register_max_image_tokens(1)
    @INPUT_REGISTRY.register_dummy_data(dummy_data)
    @INPUT_REGISTRY.register_input_processor(place)
    class TwoOfOne(SupportsMultiModal):
        pass

    model_config = serve(TwoOfOne)
    message = "TwoOfOne: the mappers of audio and image both give 'values'; rename one"
    with pytest.raises(RegistrationError, match=message):
        media_shapes(model_config, lambda mm_kwargs: {"image": [1]})
    dummy = dummy_data(None, 2, {})
    inputs = LLMInputs(prompt_token_ids=dummy.prompt_token_ids, multi_modal_data=dummy.multi_modal_data)
    with pytest.raises(RegistrationError, match=message):
        map_media(model_config, INPUT_REGISTRY.process_input(model_config, inputs))
    one = dataclasses.replace(inputs, multi_modal_data={"image": inputs.multi_modal_data["image"]})
    assert len(map_media(model_config, INPUT_REGISTRY.process_input(model_config, one))) == 1


def test_limits_of_modalities_that_the_model_does_not_take(llava, tmp_path):
    with pytest.raises(
        ConfigError, match="limit_mm_per_prompt names 'audio', but LlavaForConditionalGeneration takes image"
    ):
        MULTIMODAL_REGISTRY.get_mm_limits(ModelConfig(model=llava, limit_mm_per_prompt={"audio": 1}))
    text = llava_files.write_config(tmp_path, llava_files.text_config())
    with pytest.raises(ConfigError, match="limit_mm_per_prompt names 'image', but LlamaForCausalLM takes text alone"):
        MULTIMODAL_REGISTRY.get_mm_limits(ModelConfig(model=text, limit_mm_per_prompt={"image": 1}))
    assert MULTIMODAL_REGISTRY.get_mm_limits(ModelConfig(model=text)) == {}
    assert MULTIMODAL_REGISTRY.get_max_multimodal_tokens(ModelConfig(model=text)) == 0
    with pytest.raises(RequestError, match="LlamaForCausalLM takes text alone, the prompt comes with image"):
        MULTIMODAL_REGISTRY.map_input(ModelConfig(model=text), {"image": picture()})
    assert MULTIMODAL_REGISTRY.map_input(ModelConfig(model=text), {}) == MultiModalInputs()


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda ctx, items: {"x": np.zeros((1, 2))}, RegistrationError, "must return MultiModalInputs, got dict"),
        (lambda ctx, items: None, RegistrationError, "must return MultiModalInputs, got NoneType"),
        (lambda ctx, items: MultiModalInputs({"x": np.zeros((2, 2))}), RegistrationError, "gave arrays of 2"),
        (
            lambda ctx, items: MultiModalInputs({"x": np.zeros(())}),
            RegistrationError,
            "axis 0 of every array is the items",
        ),
        (
            lambda ctx, items: MultiModalInputs({"a b": np.zeros(1)}),
            RegistrationError,
            "a keyword of __call__ is a name",
        ),
        (lambda ctx, items: MultiModalInputs(), RegistrationError, "gave arrays of 0"),
        (lambda ctx, items: 1 // 0, RequestError, "the image input mapper of Own failed: ZeroDivisionError"),
        (lambda ctx, items: items[7], RequestError, "the image input mapper of Own failed: IndexError"),
        (lambda ctx: None, RequestError, "the image input mapper of Own failed: TypeError"),
        (lambda ctx, items: int("seven"), ValueError, "invalid literal for int"),
    ],
)
def test_mappers_that_fail(registry, serve, function, error, message):
    @registry.register_image_input_mapper(function)
    class Own(SupportsMultiModal):
        pass

    model_config = serve(Own)
    for _ in range(2):  # a failure is not kept
        with pytest.raises(error, match=message):
            registry.map_input(model_config, {"image": picture()})


# Decorators.


def test_decorators_return_the_class_and_tell_its_modalities(registry):
    class Model:
        pass

    for decorator in (
        registry.register_input_mapper("image"),
        registry.register_image_input_mapper(map_sizes),
        registry.register_video_input_mapper(),
        registry.register_audio_input_mapper(),
        registry.register_max_multimodal_tokens("image", 3),
        registry.register_max_image_tokens(),
        registry.register_max_video_tokens(lambda ctx: 3),
        registry.register_max_audio_tokens(2),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert decorator(Model) is Model
    assert registry.modalities(Model) == ("image", "video", "audio")
    assert default_registry().modalities(Model) == ()


def test_a_second_registration_warns_and_replaces(registry, serve):
    class Own(SupportsMultiModal):
        pass

    registry.register_image_input_mapper(map_sizes)(Own)
    registry.register_max_image_tokens(3)(Own)
    model_config = serve(Own)
    assert set(registry.map_input(model_config, {"image": picture()})) == {"sizes"}
    with pytest.warns(UserWarning, match="Own already has a registered image input mapper; the new one replaces it"):
        registry.register_image_input_mapper(lambda ctx, items: MultiModalInputs({"other": np.zeros(len(items))}))(Own)
    with pytest.warns(
        UserWarning, match="Own already has a registered bound of image tokens; the new one replaces it"
    ) as seen:
        registry.register_max_image_tokens(5)(Own)
    assert seen[0].filename == __file__
    assert set(registry.map_input(model_config, {"image": picture()})) == {"other"}  # nor is the old result kept
    assert registry.get_max_multimodal_tokens(model_config) == 5


def test_lookup_follows_the_mro(registry, serve):
    @registry.register_max_image_tokens(3)
    @registry.register_image_input_mapper(map_sizes)
    class Base(SupportsMultiModal):
        pass

    class Other(SupportsMultiModal):
        pass

    registry.register_max_image_tokens(4)(Other)
    registry.register_video_input_mapper()(Other)
    registry.register_max_video_tokens(10)(Other)

    class Child(Base):
        pass

    class Both(Other, Base):
        pass

    class Own(Base):
        pass

    registry.register_max_image_tokens(7)(Own)  # no warning: the base keeps its own
    assert registry.modalities(Child) == ("image",)
    assert registry.modalities(Both) == ("image", "video")
    assert registry.max_tokens_per_item(serve(Child)) == {"image": 3}
    assert registry.max_tokens_per_item(serve(Both)) == {"image": 4, "video": 10}
    assert registry.max_tokens_per_item(serve(Own)) == {"image": 7}
    assert registry.max_tokens_per_item(serve(Base)) == {"image": 3}
    assert set(registry.map_input(serve(Both), {"image": picture()})) == {"sizes"}


def test_decorating_without_parentheses(registry):
    for register in (
        registry.register_image_input_mapper,
        registry.register_video_input_mapper,
        registry.register_audio_input_mapper,
        registry.register_max_image_tokens,
        registry.register_max_video_tokens,
        registry.register_max_audio_tokens,
    ):
        with pytest.raises(RegistrationError, match="got the class Model; write the decorator with parentheses"):

            @register
            class Model:
                pass

    with pytest.raises(RegistrationError, match="unknown modality"):

        @registry.register_input_mapper
        class Another:
            pass


def test_what_is_registered_is_a_function_or_a_number(registry):
    with pytest.raises(RegistrationError, match="image input mapper: a function is registered, got 3"):
        registry.register_image_input_mapper(3)
    for bound in ("many", 2.5, True, [1]):
        with pytest.raises(RegistrationError, match="bound of image tokens: a number or a function is registered, got"):
            registry.register_max_image_tokens(bound)
    for bound in (0, -4):
        with pytest.raises(RegistrationError, match=f"the bound of image tokens is at least 1, got {bound}"):
            registry.register_max_image_tokens(bound)
    for thing in (map_sizes, "Model", None):
        with pytest.raises(RegistrationError, match="image input mapper: a model class is decorated, got"):
            registry.register_image_input_mapper(map_sizes)(thing)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "4"])
def test_bounds_that_functions_give_are_checked(registry, serve, value):
    @registry.register_max_image_tokens(lambda ctx: value)
    @registry.register_image_input_mapper()
    class Own(SupportsMultiModal):
        pass

    message = "the bound of image tokens of Own is a whole number of at least 1, got"
    with pytest.raises(RegistrationError, match=message):
        registry.get_max_multimodal_tokens(serve(Own))


def test_a_class_without_bound(registry, serve):
    @registry.register_image_input_mapper()
    class Own(SupportsMultiModal):
        pass

    with pytest.raises(RegistrationError, match="Own takes image, but has no bound of its tokens: decorate it with"):
        registry.get_max_multimodal_tokens(serve(Own))


def test_bounds_are_multiplied_by_the_limits_and_added(registry, serve):
    @registry.register_max_audio_tokens(lambda ctx: ctx.get_hf_config().text_config.hidden_size)
    @registry.register_audio_input_mapper()
    @registry.register_max_image_tokens(5)
    @registry.register_image_input_mapper()
    class Own(SupportsMultiModal):
        pass

    assert registry.get_max_multimodal_tokens(serve(Own)) == 5 + 16
    assert registry.get_max_multimodal_tokens(serve(Own, limit_mm_per_prompt={"image": 3, "audio": 2})) == 15 + 32


# Classes of notebook cells.


def test_a_class_of_a_cell_that_runs_again_is_freed(registry, serve):
    def cell():
        @register_model("Cell")
        @registry.register_max_image_tokens(3)
        @registry.register_image_input_mapper(map_sizes)
        class Cell(SupportsMultiModal):
            pass

        return Cell

    first = weakref.ref(cell())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the new class is another one: nothing is replaced
        second = cell()
    gc.collect()
    assert first() is None
    model_config = serve(second)
    assert registry.map_input(model_config, {"image": picture()})["sizes"].tolist() == [[40, 30]]


# Results that are kept.


def counted(registry):
    calls = []

    @registry.register_image_input_mapper(lambda ctx, items: calls.append(items) or map_sizes(ctx, items))
    class Own(SupportsMultiModal):
        pass

    return Own, calls


def test_equal_content_is_mapped_once(registry, serve, tmp_path):
    model_cls, calls = counted(registry)
    model_config = serve(model_cls, limit_mm_per_prompt={"image": 3})
    path = tmp_path / "a.png"
    picture().save(path)
    first = registry.map_input(model_config, {"image": picture()})
    for again in (picture(), np.asarray(picture()), path, path.read_bytes(), picture().convert("RGBA")):
        assert registry.map_input(model_config, {"image": again}) == first
    assert len(calls) == 1
    assert all(len(items) == 1 for items in calls)
    registry.map_input(model_config, {"image": [picture(), picture(1), picture(1)]})
    assert len(calls) == 2
    registry.map_input(
        ModelConfig(model=model_config.model, hf_overrides=model_config.hf_overrides), {"image": picture()}
    )
    assert len(calls) == 3  # another config may have other processor options


def test_results_do_not_outlive_their_config(registry, serve):
    model_cls, _ = counted(registry)
    model_config = serve(model_cls)
    registry.map_input(model_config, {"image": picture()})
    gone = weakref.ref(model_config)
    del model_config
    gc.collect()
    assert gone() is None


def test_many_threads_map_at_once(registry, serve):
    model_cls, calls = counted(registry)
    model_config = serve(model_cls)
    results = []

    def work():
        for seed in range(5):
            results.append(registry.map_input(model_config, {"image": picture(seed)})["sizes"].tolist())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[[40, 30]]] * 20
    assert 5 <= len(calls) <= 20


# A new modality.


class PointsPlugin(MultiModalPlugin):
    """Sets of points, ``[points, 3]`` integers."""

    modality = "points"

    def open(self, item, model_config):
        array = np.asarray(item)
        if array.ndim != 2 or array.shape[1] != 3:
            raise MediaError(f"points are [points, 3], got {list(array.shape)}")
        return array

    def default_mapper(self, ctx, items):
        return MultiModalInputs.batch([MultiModalInputs({"points": item}) for item in items])

    def default_max_tokens(self, ctx):
        return 6


def test_a_plugin_is_a_new_modality(registry, serve):
    with pytest.raises(RegistrationError, match="unknown modality 'points'"):
        registry.register_input_mapper("points")
    registry.register_plugin(PointsPlugin())

    @registry.register_max_multimodal_tokens("points")
    @registry.register_input_mapper("points")
    class Own(SupportsMultiModal):
        pass

    model_config = serve(Own, limit_mm_per_prompt={"points": 2})
    a, b = np.zeros((4, 3), int), np.ones((5, 3), int)
    mapped = registry.map_input(model_config, {"points": [a, b]})
    np.testing.assert_array_equal(mapped["points"][0], a)
    np.testing.assert_array_equal(mapped["points"][1], b)
    assert registry.get_max_multimodal_tokens(model_config) == 12
    with pytest.raises(MediaError, match=r"points are \[points, 3\], got \[4\]"):
        registry.map_input(model_config, {"points": np.zeros(4, int)})
    with pytest.raises(RegistrationError, match="modality 'points' has a plugin already"):
        registry.register_plugin(PointsPlugin())


@pytest.mark.parametrize("plugin", [PointsPlugin, "points", None])
def test_what_is_no_plugin(plugin):
    with pytest.raises(RegistrationError, match="a MultiModalPlugin is registered, got"):
        MultiModalRegistry().register_plugin(plugin)
