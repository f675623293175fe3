"""INPUT_REGISTRY: how a model class processes prompts, and the largest prompt that it may be given."""

from collections.abc import Callable, Mapping

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import PlaceholderError, RegistrationError
from aphrodite_jax.inputs.data import DummyData, LLMInputs, PlaceholderRange
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, MultiModalRegistry
from aphrodite_jax.multimodal.context import InputContext, model_class
from aphrodite_jax.multimodal.model_functions import ClassTable, ModelT, call_model_function, check_function
from aphrodite_jax.multimodal.registry import MaxTokens

__all__ = ["INPUT_REGISTRY", "DummyDataFunction", "InputProcessor", "InputRegistry"]

InputProcessor = Callable[[InputContext, LLMInputs], LLMInputs]
DummyDataFunction = Callable[[InputContext, int, Mapping[str, int]], DummyData]
Decorator = Callable[[ModelT], ModelT]


class InputRegistry:
    """Input processors and dummy data of model classes. All stored functions are pure.

    The decorators for token bounds are those of the multimodal registry, under the same names.
    """

    def __init__(self, mm_registry: MultiModalRegistry):
        self._mm_registry = mm_registry
        self._processors: ClassTable[InputProcessor] = ClassTable("input processor")
        self._dummy_data: ClassTable[DummyDataFunction] = ClassTable("dummy data function")

    def register_input_processor(self, function: InputProcessor) -> Decorator:
        """Class decorator: ``function(ctx, inputs)`` returns new `LLMInputs` with placeholders expanded.

        It gets a tuple of opened items for each modality of the prompt, and is called for prompts without media
        too. The default returns its inputs as they are.

        Raises:
          RegistrationError: what is given is no function.
        """
        check_function(function, "input processor")
        return self._processors.decorator(function)

    def register_dummy_data(self, function: DummyDataFunction) -> Decorator:
        """Class decorator: ``function(ctx, seq_len, mm_counts)`` makes a prompt of the largest legal size.

        ``mm_counts`` has the items of each modality that a prompt may hold; processed, the prompt has ``seq_len``
        tokens at most. The default is ``seq_len`` zeros and no media.

        Raises:
          RegistrationError: what is given is no function.
        """
        check_function(function, "dummy data function")
        return self._dummy_data.decorator(function)

    def register_max_multimodal_tokens(self, modality: str, max_tokens: MaxTokens | None = None) -> Decorator:
        """As that of ``MULTIMODAL_REGISTRY``, which stores it."""
        return self._mm_registry.register_max_multimodal_tokens(modality, max_tokens)

    def register_max_image_tokens(self, max_tokens: MaxTokens | None = None) -> Decorator:
        """As that of ``MULTIMODAL_REGISTRY``, which stores it."""
        return self._mm_registry.register_max_image_tokens(max_tokens)

    def register_max_video_tokens(self, max_tokens: MaxTokens | None = None) -> Decorator:
        """As that of ``MULTIMODAL_REGISTRY``, which stores it."""
        return self._mm_registry.register_max_video_tokens(max_tokens)

    def register_max_audio_tokens(self, max_tokens: MaxTokens | None = None) -> Decorator:
        """As that of ``MULTIMODAL_REGISTRY``, which stores it."""
        return self._mm_registry.register_max_audio_tokens(max_tokens)

    def has_input_processor(self, model_cls: type) -> bool:
        """Whether one is registered on ``model_cls`` or one of its bases."""
        return model_cls in self._processors

    def has_dummy_data(self, model_cls: type) -> bool:
        """Whether a function is registered on ``model_cls`` or one of its bases."""
        return model_cls in self._dummy_data

    def process_input(self, model_config: ModelConfig, inputs: LLMInputs) -> LLMInputs:
        """Open the media of a prompt and let the model's input processor expand their placeholders.

        Returns:
          New inputs: ``multi_modal_data`` has a tuple of opened items for each modality, and ``placeholders``
          a range for each item.

        Raises:
          RequestError: media that can't be opened or that the model does not take; an input processor that
            failed.
          PlaceholderError: placeholders and items do not match.
          RegistrationError: an input processor that returned something else than `LLMInputs` with the items that it
            got and `PlaceholderRange` for them.
        """
        inputs = LLMInputs(
            prompt_token_ids=inputs.prompt_token_ids,
            prompt=inputs.prompt,
            multi_modal_data=self._mm_registry.split_items(model_config, inputs.multi_modal_data),
        )
        model_cls = model_class(model_config)
        name = f"the input processor of {model_cls.__name__}"
        function = self._processors.get(model_cls)
        if function is not None:
            processed = call_model_function(function, name, InputContext(model_config), inputs)
            if not isinstance(processed, LLMInputs):
                raise RegistrationError(f"{name} must return LLMInputs, got {type(processed).__name__}")
            _check_items(inputs, processed, name)
            inputs = processed
        _check_placeholders(inputs, name)
        return inputs

    def dummy_data_for_profiling(
        self, model_config: ModelConfig, seq_len: int, mm_registry: MultiModalRegistry | None = None
    ) -> DummyData:
        """The model's dummy data for prompts of ``seq_len`` tokens and as many items as its limits allow.

        Raises:
          RegistrationError: a dummy data function that returned something else than `DummyData`, or a prompt
            that is longer than ``seq_len`` before its placeholders are even expanded.
        """
        model_cls = model_class(model_config)
        mm_counts = (mm_registry or self._mm_registry).get_mm_limits(model_config)
        function = self._dummy_data.get(model_cls) or _default_dummy_data
        dummy = function(InputContext(model_config), seq_len, mm_counts)
        name = f"the dummy data function of {model_cls.__name__}"
        if not isinstance(dummy, DummyData):
            raise RegistrationError(f"{name} must return DummyData, got {type(dummy).__name__}")
        if len(dummy.prompt_token_ids) > seq_len:
            raise RegistrationError(f"{name} gave {len(dummy.prompt_token_ids)} tokens where {seq_len} is the limit")
        return dummy


def _default_dummy_data(ctx: InputContext, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    return DummyData(prompt_token_ids=(0,) * seq_len)


def _check_items(given: LLMInputs, processed: LLMInputs, name: str) -> None:
    """Raise unless there are as many items of each modality as before, so that none is dropped in silence."""
    for modality in {*given.multi_modal_data, *processed.multi_modal_data}:
        before, items = given.multi_modal_data.get(modality, ()), processed.multi_modal_data.get(modality, ())
        if not isinstance(items, list | tuple) or len(items) != len(before):
            after = len(items) if isinstance(items, list | tuple) else type(items).__name__
            raise RegistrationError(
                f"{name} got {len(before)} {modality} items and returned {after}: it returns a tuple of as many"
            )
    for modality, ranges in processed.placeholders.items():
        if not all(isinstance(span, PlaceholderRange) for span in ranges):
            raise RegistrationError(f"{name} must return a PlaceholderRange for each {modality} item, got {ranges}")


def _check_placeholders(inputs: LLMInputs, name: str) -> None:
    """Raise unless every item has one range, within the prompt and apart from all others."""
    for modality in {*inputs.multi_modal_data, *inputs.placeholders}:
        items, ranges = inputs.multi_modal_data.get(modality, ()), inputs.placeholders.get(modality, ())
        if len(items) != len(ranges):
            raise PlaceholderError(
                f"the prompt has {len(items)} {modality} items and {len(ranges)} ranges of placeholders for them; "
                f"{name} makes one for each (without one, prompts with media can't be served)"
            )
    spans: list[PlaceholderRange] = sorted(
        (span for ranges in inputs.placeholders.values() for span in ranges), key=lambda span: span.offset
    )
    end = 0
    for span in spans:
        well_formed = span.num_rows >= 1 and (span.is_row is None or len(span.is_row) == span.length)
        if span.offset < end or not well_formed or span.stop > len(inputs.prompt_token_ids):
            raise PlaceholderError(
                f"{name} gave {span}, which overlaps another range or leaves the prompt of "
                f"{len(inputs.prompt_token_ids)} tokens, or has no row"
            )
        end = span.stop


INPUT_REGISTRY = InputRegistry(MULTIMODAL_REGISTRY)
