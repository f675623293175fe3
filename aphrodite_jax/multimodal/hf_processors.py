"""The checkpoint's own Hugging Face processors for images, videos and audio, without torch."""

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import transformers
from flax.core import FrozenDict, unfreeze

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError, RegistrationError
from aphrodite_jax.multimodal.inputs import MultiModalInputs

__all__ = ["OncePerConfig", "audio_processor", "image_processor", "items_of", "video_processor"]

ValueT = TypeVar("ValueT")

# Options of a call, which the mapper chooses, and not of the processor.
_NOT_OPTIONS = {"data_format", "device", "disable_grouping", "input_data_format", "return_tensors"}


class OncePerConfig(Generic[ValueT]):
    """Decorator: what is loaded for a ModelConfig is kept as long as that very config lives."""

    def __init__(self, load: Callable[[ModelConfig], ValueT]):
        self._load = load
        self._kept: dict[int, ValueT] = {}
        self._lock = threading.Lock()
        self.__doc__ = load.__doc__

    def __call__(self, model_config: ModelConfig) -> ValueT:
        """What is loaded for this very config, loaded now if it was not before."""
        with self._lock:
            key = id(model_config)
            if key not in self._kept:
                self._kept[key] = self._load(model_config)
                weakref.finalize(model_config, self._kept.pop, key, None)
            return self._kept[key]


@OncePerConfig
def image_processor(model_config: ModelConfig) -> Any:
    """The checkpoint's image processor (PIL backend) with ``mm_processor_kwargs`` set.

    Raises:
      ConfigError: there is none, it has no PIL form, or an option is unknown or ill-valued.
    """
    load, name = transformers.AutoImageProcessor.from_pretrained, model_config.model
    try:
        processor = load(name, revision=model_config.revision, backend="pil")
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(_missing(name, "image", error)) from error
    if getattr(processor, "backend", "pil") != "pil":
        raise ConfigError(_missing(name, "image", f"{type(processor).__name__} needs torchvision and has no PIL form"))
    options = unfreeze(FrozenDict(model_config.mm_processor_kwargs))  # Hugging Face takes nested plain dicts alone
    known = set(getattr(type(processor), "valid_kwargs", transformers.ImagesKwargs).__annotations__) - _NOT_OPTIONS
    if unknown := sorted(set(options) - known):
        raise ConfigError(
            f"mm_processor_kwargs: {type(processor).__name__} has no option {', '.join(map(repr, unknown))}; "
            f"its options are {', '.join(sorted(known))}"
        )
    if not options:
        return processor
    try:
        processor = load(name, revision=model_config.revision, backend="pil", **options)
    except Exception as error:
        raise ConfigError(f"mm_processor_kwargs {options}: {type(error).__name__}: {error}") from error
    return processor


@OncePerConfig
def video_processor(model_config: ModelConfig) -> Any:
    """The checkpoint's video processor; `ConfigError` where there is none or it needs what is not installed."""
    try:
        return transformers.AutoVideoProcessor.from_pretrained(model_config.model, revision=model_config.revision)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(_missing(model_config.model, "video", error)) from error


@OncePerConfig
def audio_processor(model_config: ModelConfig) -> Any:
    """The checkpoint's audio feature extractor; `ConfigError` where there is none."""
    try:
        return transformers.AutoFeatureExtractor.from_pretrained(model_config.model, revision=model_config.revision)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(_missing(model_config.model, "audio", error)) from error


def items_of(features: Mapping[str, Any], num_items: int, who: str) -> MultiModalInputs:
    """A processor's result with the items on axis 0; float64 becomes float32.

    Raises:
      RegistrationError: a value has not one entry per item.
    """
    for keyword, value in features.items():
        if len(value) != num_items:
            raise RegistrationError(
                f"{who} gave {keyword} with {len(value)} entries for {num_items} items, so the default mapper "
                "can't tell them apart; register a mapper of your own"
            )
    return MultiModalInputs.batch(
        [
            MultiModalInputs({keyword: _to_host(value[i]) for keyword, value in features.items()})
            for i in range(num_items)
        ]
    )


def _to_host(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_to_host(element) for element in value]
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _missing(model: str, modality: str, reason: Exception | str) -> str:
    reason = " ".join(str(reason).split())
    return (
        f"the default {modality} mapper has no Hugging Face processor to use for {model!r}; add its files, or "
        f"register a mapper with register_{modality}_input_mapper(function). Reason: {reason}"
    )
