"""INPUT_REGISTRY on its own: processors, dummy data, and what both may not return."""

import llava_files
import numpy as np
import pytest
from PIL import Image

from aphrodite_jax import architectures, register_model
from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import (
    ConfigError,
    MediaError,
    PlaceholderError,
    RegistrationError,
    RequestError,
    TooManyItemsError,
)
from aphrodite_jax.inputs import (
    INPUT_REGISTRY,
    DummyData,
    InputRegistry,
    LLMInputs,
    PlaceholderRange,
    expand_placeholders,
)
from aphrodite_jax.modeling.models.interfaces import SupportsMultiModal
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, MultiModalInputs
from aphrodite_jax.multimodal.registry import default_registry

IMAGE = llava_files.IMAGE_TOKEN


@pytest.fixture
def mm_registry():
    return default_registry()


@pytest.fixture
def registry(mm_registry):
    return InputRegistry(mm_registry)


@pytest.fixture
def make_model(llava, mm_registry):
    """A model class of images, with an input processor and dummy data if they are given, and its config."""

    def make_model(registry, processor=None, dummy=None, **options) -> ModelConfig:
        class Own(SupportsMultiModal):
            pass

        def to_sizes(ctx, items):
            return MultiModalInputs({"sizes": np.array([item.size for item in items])})

        mm_registry.register_image_input_mapper(to_sizes)(Own)
        mm_registry.register_max_image_tokens(3)(Own)
        if processor is not None:
            assert registry.register_input_processor(processor)(Own) is Own
        if dummy is not None:
            assert registry.register_dummy_data(dummy)(Own) is Own
        register_model("Own")(Own)
        return ModelConfig(model=llava, hf_overrides={"architectures": ["Own"]}, **options)

    return make_model


def picture(size=(40, 30)) -> Image.Image:
    return Image.new("RGB", size, "red")


def prompt(tokens, **media) -> LLMInputs:
    return LLMInputs(prompt_token_ids=tokens, prompt="text", multi_modal_data=media)


def expand(ctx, inputs, length=3) -> LLMInputs:
    images = inputs.multi_modal_data.get("image", ())
    tokens, ranges = expand_placeholders(inputs.prompt_token_ids, IMAGE, [length] * len(images))
    return LLMInputs(
        prompt_token_ids=tokens,
        prompt=inputs.prompt,
        multi_modal_data=inputs.multi_modal_data,
        placeholders={"image": ranges},
    )


# Processing.


def test_a_processor_gets_opened_items_and_its_result_is_returned(registry, make_model):
    seen = []

    def processor(ctx, inputs):
        seen.append((ctx.model_config, inputs))
        return expand(ctx, inputs)

    model_config = make_model(registry, processor, limit_mm_per_prompt={"image": 2})
    given = prompt([5, IMAGE, 6, IMAGE], image=[np.zeros((30, 40), np.uint8), picture()])
    before = given.prompt_token_ids, list(given.multi_modal_data["image"])
    processed = registry.process_input(model_config, given)
    assert processed.prompt_token_ids == (5, IMAGE, IMAGE, IMAGE, 6, IMAGE, IMAGE, IMAGE)
    assert processed.placeholders["image"] == (PlaceholderRange(1, 3), PlaceholderRange(5, 3))
    assert processed.prompt == "text"
    assert [image.mode for image in processed.multi_modal_data["image"]] == ["RGB", "RGB"]
    ((config, inputs),) = seen
    assert config is model_config
    assert isinstance(inputs.multi_modal_data["image"], tuple)
    assert all(isinstance(image, Image.Image) for image in inputs.multi_modal_data["image"])
    # What the caller gave is as it was.
    assert given.prompt_token_ids == before[0]
    assert all(a is b for a, b in zip(given.multi_modal_data["image"], before[1], strict=True))
    assert dict(given.placeholders) == {}


def test_a_prompt_without_media(registry, make_model):
    model_config = make_model(registry, expand)
    for given in (prompt([5, 6]), prompt([5, 6], image=None), prompt([5, 6], image=[])):
        processed = registry.process_input(model_config, given)
        assert processed.prompt_token_ids == (5, 6)
        assert dict(processed.multi_modal_data) == {}


def test_the_default_returns_inputs_as_they_are(registry, make_model):
    model_config = make_model(registry)
    assert registry.process_input(model_config, prompt([5, 6])).prompt_token_ids == (5, 6)
    with pytest.raises(
        PlaceholderError, match=r"1 image items and 0 ranges of placeholders.*without one, prompts with media"
    ):
        registry.process_input(model_config, prompt([5, IMAGE], image=picture()))


def test_errors_of_the_media_are_those_of_the_multimodal_registry(registry, make_model, tmp_path):
    model_config = make_model(registry, expand)
    with pytest.raises(TooManyItemsError, match="2 image items, at most 1"):
        registry.process_input(model_config, prompt([IMAGE, IMAGE], image=(picture(), picture())))
    with pytest.raises(MediaError, match="is not a file here"):
        registry.process_input(model_config, prompt([IMAGE], image="no/such.png"))
    with pytest.raises(RequestError, match="unknown modality 'smell'"):
        registry.process_input(model_config, prompt([IMAGE], smell=1))
    text = ModelConfig(model=llava_files.write_config(tmp_path, llava_files.text_config()))
    assert registry.process_input(text, prompt([1, 2])).prompt_token_ids == (1, 2)
    with pytest.raises(RequestError, match="LlamaForCausalLM takes text alone, the prompt comes with image"):
        registry.process_input(text, prompt([1, 2], image=picture()))


def result(tokens=(IMAGE,) * 4, ranges=((0, 2),), items=1, **fields):
    """A processor with a fixed result."""
    spans = [span if not isinstance(span, tuple) else PlaceholderRange(*span) for span in ranges]
    return lambda ctx, inputs: LLMInputs(
        prompt_token_ids=tokens,
        **{"multi_modal_data": {"image": [picture()] * items}, "placeholders": {"image": spans}} | fields,
    )


@pytest.mark.parametrize(
    ("processor", "error", "message"),
    [
        (lambda ctx, inputs: None, RegistrationError, "the input processor of Own must return LLMInputs, got NoneType"),
        (lambda ctx, inputs: {"prompt_token_ids": [1]}, RegistrationError, "must return LLMInputs, got dict"),
        (lambda ctx, inputs: (1, 2), RegistrationError, "must return LLMInputs, got tuple"),
        (lambda ctx, inputs: {}["x"], RequestError, "the input processor of Own failed: KeyError: 'x'"),
        (lambda ctx, inputs: int("x"), ValueError, "invalid literal"),
        (lambda inputs: inputs, RequestError, "the input processor of Own failed: TypeError"),
        (
            result(items=0, ranges=()),
            RegistrationError,
            "got 1 image items and returned 0: it returns a tuple of as many",
        ),
        (result(multi_modal_data={}, placeholders={}), RegistrationError, "got 1 image items and returned 0"),
        (result(items=2, ranges=((0, 1), (1, 1))), RegistrationError, "got 1 image items and returned 2"),
        (result(multi_modal_data={"image": picture()}), RegistrationError, "got 1 image items and returned Image"),
        (result(ranges=()), PlaceholderError, "1 image items and 0 ranges"),
        (result(ranges=((0, 1), (1, 1))), PlaceholderError, "1 image items and 2 ranges"),
        (
            result(placeholders={"image": [PlaceholderRange(0, 1)], "audio": [PlaceholderRange(2, 1)]}),
            PlaceholderError,
            "0 audio items and 1 ranges",
        ),
        (result(ranges=[[0, 1]]), RegistrationError, "must return a PlaceholderRange for each image item"),
        (result(ranges=[(0, 0)]), PlaceholderError, "overlaps another range or leaves the prompt of 4 tokens"),
        (result(ranges=[(0, -1)]), PlaceholderError, "overlaps another range or leaves the prompt"),
        (result(ranges=[(-1, 2)]), PlaceholderError, "overlaps another range or leaves the prompt"),
        (result(ranges=[(3, 2)]), PlaceholderError, r"PlaceholderRange\(offset=3, length=2\), which overlaps"),
        (result(ranges=[(4, 1)]), PlaceholderError, "leaves the prompt of 4 tokens"),
    ],
)
def test_processors_that_return_something_else(registry, make_model, processor, error, message):
    model_config = make_model(registry, processor)
    with pytest.raises(error, match=message):
        registry.process_input(model_config, prompt([IMAGE], image=picture()))


def test_ranges_must_not_overlap(registry, make_model):
    def processor(ranges):
        return lambda ctx, inputs: LLMInputs(
            prompt_token_ids=(IMAGE,) * 6,
            multi_modal_data=inputs.multi_modal_data,
            placeholders={"image": [PlaceholderRange(*span) for span in ranges]},
        )

    given = prompt([IMAGE, IMAGE], image=[picture(), picture()])
    for ranges in ([(0, 3), (2, 3)], [(2, 3), (0, 3)], [(0, 6), (1, 1)], [(1, 1), (1, 1)]):
        model_config = make_model(registry, processor(ranges), limit_mm_per_prompt={"image": 2})
        with pytest.raises(PlaceholderError, match="overlaps another range"):
            registry.process_input(model_config, given)
    model_config = make_model(registry, processor([(3, 3), (0, 3)]), limit_mm_per_prompt={"image": 2})
    spans = registry.process_input(model_config, given).placeholders["image"]
    assert [span.offset for span in spans] == [3, 0]  # in the order of the items


# Dummy data.


def test_the_default_dummy_data(registry, mm_registry, make_model, tmp_path):
    model_config = make_model(registry)
    assert registry.dummy_data_for_profiling(model_config, 5, mm_registry) == DummyData(prompt_token_ids=(0,) * 5)
    text = ModelConfig(model=llava_files.write_config(tmp_path, llava_files.text_config()))
    dummy = INPUT_REGISTRY.dummy_data_for_profiling(text, 7, MULTIMODAL_REGISTRY)
    assert dummy.prompt_token_ids == (0,) * 7
    assert dummy.multi_modal_data == {}


def test_dummy_data_get_the_limits(registry, mm_registry, make_model):
    seen = []

    def dummy(ctx, seq_len, mm_counts):
        seen.append((ctx.model_config, seq_len, dict(mm_counts)))
        with pytest.raises(TypeError):
            mm_counts["image"] = 0
        return DummyData(prompt_token_ids=(IMAGE, 0), multi_modal_data={"image": [picture()]})

    model_config = make_model(registry, dummy=dummy, limit_mm_per_prompt={"image": 4})
    for given in ((mm_registry,), ()):
        assert len(registry.dummy_data_for_profiling(model_config, 9, *given).multi_modal_data["image"]) == 1
    assert seen == [(model_config, 9, {"image": 4})] * 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "the dummy data function of Own must return DummyData, got NoneType"),
        (LLMInputs(prompt_token_ids=(1,)), "must return DummyData, got LLMInputs"),
        (((1, 2), {}), "must return DummyData, got tuple"),
        (DummyData(prompt_token_ids=(0,) * 6), "gave 6 tokens where 5 is the limit"),
    ],
)
def test_dummy_data_functions_that_return_something_else(registry, mm_registry, make_model, value, message):
    model_config = make_model(registry, dummy=lambda ctx, seq_len, mm_counts: value)
    with pytest.raises(RegistrationError, match=message):
        registry.dummy_data_for_profiling(model_config, 5, mm_registry)


def test_dummy_data_of_a_wrong_limit(llava):
    with pytest.raises(ConfigError, match="limit_mm_per_prompt names 'audio'"):
        INPUT_REGISTRY.dummy_data_for_profiling(
            ModelConfig(model=llava, limit_mm_per_prompt={"audio": 2}), 64, MULTIMODAL_REGISTRY
        )


# Decorators.


def test_bounds_are_registered_on_either_registry(registry, mm_registry, llava):
    class Own(SupportsMultiModal):
        pass

    for modality in ("image", "video", "audio"):
        mm_registry.register_input_mapper(modality, lambda ctx, items: None)(Own)
    assert registry.register_max_image_tokens(2)(Own) is Own
    assert registry.register_max_video_tokens(lambda ctx: 30)(Own) is Own
    assert registry.register_max_audio_tokens(400)(Own) is Own
    register_model("Own")(Own)
    model_config = ModelConfig(model=llava, hf_overrides={"architectures": ["Own"]})
    assert mm_registry.max_tokens_per_item(model_config) == {"image": 2, "video": 30, "audio": 400}
    with pytest.warns(UserWarning, match="Own already has a registered bound of image tokens"):
        registry.register_max_multimodal_tokens("image")(Own)
    assert mm_registry.get_max_multimodal_tokens(model_config) == 5 + 30 + 400
    with pytest.raises(RegistrationError, match="unknown modality 'smell'"):
        registry.register_max_multimodal_tokens("smell", 3)


def test_a_second_registration_warns_and_replaces(registry, mm_registry, make_model):
    model_config = make_model(registry, expand, lambda ctx, n, counts: DummyData(prompt_token_ids=(1,)))
    own = architectures.resolve_architecture(["Own"])
    with pytest.warns(UserWarning, match="Own already has a registered input processor; the new one replaces it"):
        registry.register_input_processor(lambda ctx, inputs: expand(ctx, inputs, length=2))(own)
    with pytest.warns(UserWarning, match="Own already has a registered dummy data function; the new one replaces it"):
        registry.register_dummy_data(lambda ctx, n, counts: DummyData(prompt_token_ids=(2,)))(own)
    assert registry.process_input(model_config, prompt([IMAGE], image=picture())).prompt_token_ids == (IMAGE, IMAGE)
    assert registry.dummy_data_for_profiling(model_config, 5, mm_registry).prompt_token_ids == (2,)


def test_lookup_follows_the_mro(registry, mm_registry, make_model):
    model_config = make_model(registry, expand, lambda ctx, n, counts: DummyData(prompt_token_ids=(1,)))

    class Child(architectures.resolve_architecture(["Own"])):
        pass

    register_model("Own")(Child)
    assert len(registry.process_input(model_config, prompt([IMAGE], image=picture())).prompt_token_ids) == 3
    registry.register_dummy_data(lambda ctx, n, counts: DummyData(prompt_token_ids=(2,)))(Child)
    assert registry.dummy_data_for_profiling(model_config, 5, mm_registry).prompt_token_ids == (2,)


@pytest.mark.parametrize("value", [None, 3, "f"])
def test_what_is_registered_is_a_function(registry, value):
    with pytest.raises(RegistrationError, match="input processor: a function is registered, got"):
        registry.register_input_processor(value)
    with pytest.raises(RegistrationError, match="dummy data function: a function is registered, got"):
        registry.register_dummy_data(value)


def test_decorating_without_parentheses(registry):
    for register in (
        registry.register_input_processor,
        registry.register_dummy_data,
        registry.register_max_image_tokens,
    ):
        with pytest.raises(RegistrationError, match="got the class Model; write the decorator with parentheses"):

            @register
            class Model:
                pass
