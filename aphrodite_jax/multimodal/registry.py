"""MULTIMODAL_REGISTRY: which function maps which modality for which model class, and what an item may take."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError, RegistrationError, RequestError, TooManyItemsError
from aphrodite_jax.multimodal.context import InputContext, model_class
from aphrodite_jax.multimodal.hashing import content_hash
from aphrodite_jax.multimodal.hf_processors import OncePerConfig
from aphrodite_jax.multimodal.inputs import MediaItems, MultiModalInputs
from aphrodite_jax.multimodal.mapped_items import MappedItems
from aphrodite_jax.multimodal.model_functions import ClassTable, ModelT, call_model_function, check_function
from aphrodite_jax.multimodal.plugins import AudioPlugin, ImagePlugin, MultiModalPlugin, VideoPlugin, embedding_rows
from aphrodite_jax.multimodal.video import frame_sampling

__all__ = ["InputMapper", "MaxTokens", "MultiModalRegistry"]

InputMapper = Callable[[InputContext, Sequence[Any]], MultiModalInputs]
MaxTokens = int | Callable[[InputContext], int]
Decorator = Callable[[ModelT], ModelT]


class MultiModalRegistry:
    """Mappers and token bounds of model classes, by modality.

    A class takes a modality when a mapper is registered for it on the class or one of its bases. All stored
    functions are pure; the registry keeps no state of a request.
    """

    def __init__(self, plugins: Sequence[MultiModalPlugin] = ()):
        self._plugins: dict[str, MultiModalPlugin] = {}
        self._mappers: dict[str, ClassTable[InputMapper]] = {}
        self._max_tokens: dict[str, ClassTable[MaxTokens]] = {}
        for plugin in plugins:
            self.register_plugin(plugin)

    # Registering.

    def register_plugin(self, plugin: MultiModalPlugin) -> None:
        """Add a modality.

        Raises:
          RegistrationError: no plugin, or its modality is there already.
        """
        if not isinstance(plugin, MultiModalPlugin):
            raise RegistrationError(f"a MultiModalPlugin is registered, got {plugin!r}")
        if plugin.modality in self._plugins:
            raise RegistrationError(f"modality {plugin.modality!r} has a plugin already")
        self._plugins[plugin.modality] = plugin
        self._mappers[plugin.modality] = ClassTable(f"{plugin.modality} input mapper")
        self._max_tokens[plugin.modality] = ClassTable(f"bound of {plugin.modality} tokens")

    def register_input_mapper(self, modality: str, function: InputMapper | None = None) -> Decorator:
        """Class decorator: ``function(ctx, items)`` maps opened items of ``modality`` to keyword arrays.

        None takes the modality's default: the checkpoint's Hugging Face processor. Embeddings that a user
        computed beforehand do not come to ``function``: they are rows already.

        Raises:
          RegistrationError: an unknown modality, or what is given is no function.
        """
        plugin = self._plugin(modality, RegistrationError)
        function = plugin.default_mapper if function is None else function
        check_function(function, f"{modality} input mapper")
        return self._mappers[modality].decorator(function)

    def register_max_multimodal_tokens(self, modality: str, max_tokens: MaxTokens | None = None) -> Decorator:
        """Class decorator: most tokens of one item of ``modality``, a number or ``function(ctx)``.

        None takes the modality's default, which reads the config.

        Raises:
          RegistrationError: an unknown modality, a number below 1, or what is given is no function.
        """
        plugin = self._plugin(modality, RegistrationError)
        max_tokens = plugin.default_max_tokens if max_tokens is None else max_tokens
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
            check_function(max_tokens, f"bound of {modality} tokens", alternative="a number or ")
        elif max_tokens < 1:
            raise RegistrationError(f"the bound of {modality} tokens is at least 1, got {max_tokens}")
        return self._max_tokens[modality].decorator(max_tokens)

    def register_image_input_mapper(self, function: InputMapper | None = None) -> Decorator:
        """`register_input_mapper` for images."""
        return self.register_input_mapper("image", function)

    def register_video_input_mapper(self, function: InputMapper | None = None) -> Decorator:
        """`register_input_mapper` for videos."""
        return self.register_input_mapper("video", function)

    def register_audio_input_mapper(self, function: InputMapper | None = None) -> Decorator:
        """`register_input_mapper` for audio."""
        return self.register_input_mapper("audio", function)

    def register_max_image_tokens(self, max_tokens: MaxTokens | None = None) -> Decorator:
        """`register_max_multimodal_tokens` for images."""
        return self.register_max_multimodal_tokens("image", max_tokens)

    def register_max_video_tokens(self, max_tokens: MaxTokens | None = None) -> Decorator:
        """`register_max_multimodal_tokens` for videos."""
        return self.register_max_multimodal_tokens("video", max_tokens)

    def register_max_audio_tokens(self, max_tokens: MaxTokens | None = None) -> Decorator:
        """`register_max_multimodal_tokens` for audio."""
        return self.register_max_multimodal_tokens("audio", max_tokens)

    # Asking.

    def modalities(self, model_cls: type) -> tuple[str, ...]:
        """Modalities that ``model_cls`` takes, in the order in which the plugins were registered."""
        return tuple(modality for modality, mappers in self._mappers.items() if model_cls in mappers)

    def has_bound(self, model_cls: type, modality: str) -> bool:
        """Whether a bound of tokens is registered for ``modality`` on ``model_cls`` or one of its bases."""
        return model_cls in self._max_tokens[modality]

    def get_mm_limits(self, model_config: ModelConfig) -> Mapping[str, int]:
        """Most items of one prompt for each modality that the model takes.

        Raises:
          ConfigError: ``limit_mm_per_prompt`` names a modality that the model does not take, or ``video_sampling`` is
            wrong, or set for a model that takes no videos.
        """
        model_cls = model_class(model_config)
        taken = self.modalities(model_cls)
        for modality in model_config.limit_mm_per_prompt:
            self._plugin(modality, ConfigError)
            if not taken:
                raise ConfigError(f"limit_mm_per_prompt names {modality!r}, but {model_cls.__name__} takes text alone")
            if modality not in taken:
                raise ConfigError(
                    f"limit_mm_per_prompt names {modality!r}, but {model_cls.__name__} takes {', '.join(taken)}"
                )
        if model_config.video_sampling and "video" not in taken:
            raise ConfigError(f"video_sampling is set, but {model_cls.__name__} takes no videos")
        if model_config.video_sampling:
            frame_sampling(model_config)  # which refuses options that mean nothing
        return MappingProxyType({modality: model_config.limit_for(modality) for modality in taken})

    def max_tokens_per_item(self, model_config: ModelConfig) -> Mapping[str, int]:
        """Most tokens of one item for each modality that the model takes.

        Raises:
          RegistrationError: no bound is registered, or a bound is no number of at least 1.
        """
        model_cls = model_class(model_config)
        return MappingProxyType(
            {modality: self._bound(model_config, model_cls, modality) for modality in self.get_mm_limits(model_config)}
        )

    def get_max_multimodal_tokens(self, model_config: ModelConfig) -> int:
        """Most tokens that the media of one prompt take: each modality's bound times its limit; 0 for text models."""
        limits = self.get_mm_limits(model_config)
        bounds = self.max_tokens_per_item(model_config)
        return sum(limit * bounds[modality] for modality, limit in limits.items())

    # Items to arrays.

    def split_items(
        self, model_config: ModelConfig, multi_modal_data: Mapping[str, Any] | None
    ) -> dict[str, tuple[Any, ...]]:
        """Opened items of each modality that has any, checked against the limits; the data are not changed.

        Raises:
          RequestError: an unknown modality, or one that the model does not take.
          TooManyItemsError: more items than ``limit_mm_per_prompt`` allows.
          MediaError: an item that can't be opened.
        """
        items = {}
        for modality, data in (multi_modal_data or {}).items():
            plugin = self._plugin(modality, RequestError)
            if isinstance(data, MediaItems):
                parts = tuple(data)
            else:
                parts = () if data is None else plugin.split(data, model_config)
            if not parts:
                continue
            self._mapper(model_config, modality)
            limit = self.get_mm_limits(model_config)[modality]
            if len(parts) > limit:
                raise TooManyItemsError(
                    f"the prompt has {len(parts)} {modality} items, at most {limit} allowed: "
                    f'set limit_mm_per_prompt={{"{modality}": {len(parts)}}}'
                )
            items[modality] = self.open_items(model_config, modality, parts)
        return items

    def open_items(self, model_config: ModelConfig, modality: str, items: Sequence[Any]) -> tuple[Any, ...]:
        """Items of one modality, opened one by one.

        Raises:
          RequestError: an unknown modality.
          MediaError: an item that can't be opened.
        """
        plugin = self._plugin(modality, RequestError)
        return tuple(plugin.open(item, model_config) for item in items)

    def map_items(self, model_config: ModelConfig, modality: str, items: Sequence[Any]) -> MultiModalInputs:
        """Keyword arrays of opened items of one modality, with the items on axis 0.

        Each item is mapped by itself, so that what it becomes does not depend on the others; an item that
        came before is taken from a cache by its content.

        Raises:
          RegistrationError: the mapper gave something else than arrays of one item.
        """
        mapped = [self._map_item(model_config, modality, item) for item in items]
        return MultiModalInputs.batch(mapped)

    def map_input(self, model_config: ModelConfig, multi_modal_data: Mapping[str, Any]) -> MultiModalInputs:
        """Keyword arrays of all items of a prompt, of every modality.

        Raises:
          RegistrationError: the mappers of two modalities give the same keyword.
          RequestError: as `split_items`.
        """
        items = self.split_items(model_config, multi_modal_data)
        mapped = {modality: self.map_items(model_config, modality, found) for modality, found in items.items()}
        self.check_keywords(model_config, mapped)
        return MultiModalInputs({keyword: value for arrays in mapped.values() for keyword, value in arrays.items()})

    def check_keywords(self, model_config: ModelConfig, keywords: Mapping[str, Iterable[str]]) -> None:
        """Refuse mapped items of which two modalities have one keyword: the model could not tell them apart.

        Args:
          keywords: of the arrays of each modality's items.

        Raises:
          RegistrationError: there is such a keyword.
        """
        origin: dict[str, str] = {}
        for modality, names in keywords.items():
            for keyword in names:
                if origin.setdefault(keyword, modality) != modality:
                    raise RegistrationError(
                        f"{model_class(model_config).__name__}: the mappers of {origin[keyword]} and {modality} both "
                        f"give {keyword!r}; rename one"
                    )

    def mapper(self, model_config: ModelConfig, modality: str) -> InputMapper:
        """The function that maps items of ``modality`` for the model.

        Raises:
          RequestError: the model takes text alone.
          RegistrationError: it has no mapper for this modality.
        """
        self._plugin(modality, RequestError)
        return self._mapper(model_config, modality)

    # Inside.

    def _map_item(self, model_config: ModelConfig, modality: str, item: Any) -> MultiModalInputs:
        """Arrays of one item, without an axis for the items."""
        if embedding_rows(item):
            return MultiModalInputs({f"{modality}_embeds": item})
        mapper = self._mapper(model_config, modality)
        # The function belongs to the key: a notebook may register another one for the same class.
        key = (modality, mapper, content_hash(item))
        kept = _mapped_items(model_config)
        inputs = kept.get(key)
        if inputs is None:
            name = f"the {modality} input mapper of {model_class(model_config).__name__}"
            inputs = call_model_function(mapper, name, InputContext(model_config), (item,))
            if not isinstance(inputs, MultiModalInputs):
                raise RegistrationError(f"{name} must return MultiModalInputs, got {type(inputs).__name__}")
            if inputs.num_items != 1:
                raise RegistrationError(f"{name} got one item and gave arrays of {inputs.num_items}: {inputs!r}")
            (inputs,) = inputs.split()
            kept.put(key, inputs)
        return inputs

    def _plugin(self, modality: str, error: type[Exception]) -> MultiModalPlugin:
        if modality not in self._plugins:
            raise error(f"unknown modality {modality!r}; there are {', '.join(self._plugins)}")
        return self._plugins[modality]

    def _mapper(self, model_config: ModelConfig, modality: str) -> InputMapper:
        model_cls = model_class(model_config)
        mapper = self._mappers[modality].get(model_cls)
        if mapper is not None:
            return mapper
        taken = self.modalities(model_cls)
        if not taken and not getattr(model_cls, "supports_multimodal", False):
            raise RequestError(f"{model_cls.__name__} takes text alone, the prompt comes with {modality}")
        raise RegistrationError(
            f"{model_cls.__name__} has no {modality} input mapper (it takes {', '.join(taken) or 'nothing yet'}); "
            f"to add one, decorate the class with MULTIMODAL_REGISTRY.register_input_mapper({modality!r})"
        )

    def _bound(self, model_config: ModelConfig, model_cls: type, modality: str) -> int:
        bound = self._max_tokens[modality].get(model_cls)
        if bound is None:
            raise RegistrationError(
                f"{model_cls.__name__} takes {modality}, but has no bound of its tokens: decorate it with "
                f"MULTIMODAL_REGISTRY.register_max_multimodal_tokens({modality!r}, ...)"
            )
        if callable(bound):
            bound = bound(InputContext(model_config))
        if isinstance(bound, bool) or not isinstance(bound, int) or bound < 1:
            raise RegistrationError(
                f"the bound of {modality} tokens of {model_cls.__name__} is a whole number of at least 1, got {bound!r}"
            )
        return bound


@OncePerConfig
def _mapped_items(model_config: ModelConfig) -> MappedItems:
    return MappedItems()


def default_registry() -> MultiModalRegistry:
    """A registry that knows images, videos and audio."""
    return MultiModalRegistry([ImagePlugin(), VideoPlugin(), AudioPlugin()])
