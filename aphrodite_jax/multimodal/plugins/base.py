"""A modality: the base of its plugin, and embeddings that a user computed beforehand."""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import MediaError, RegistrationError
from aphrodite_jax.multimodal.context import InputContext
from aphrodite_jax.multimodal.inputs import MultiModalInputs

__all__ = ["MultiModalPlugin", "check_embeddings", "embedding_rows", "is_floating", "is_stack_of_embeddings"]


class MultiModalPlugin(abc.ABC):
    """One modality. A new one is a subclass, made known by ``MULTIMODAL_REGISTRY.register_plugin``.

    Class attributes:
      modality: the key under which items stand in ``multi_modal_data``.
    """

    modality: ClassVar[str]

    def split(self, data: Any, model_config: ModelConfig) -> tuple[Any, ...]:
        """Items of what the user gave: a list or tuple has one each, anything else is one."""
        return tuple(data) if isinstance(data, list | tuple) else (data,)

    @abc.abstractmethod
    def open(self, item: Any, model_config: ModelConfig) -> Any:
        """An item in the one form that mappers get; opening it again changes nothing.

        Raises:
          MediaError: it can't be opened.
        """

    @abc.abstractmethod
    def default_mapper(self, ctx: InputContext, items: Sequence[Any]) -> MultiModalInputs:
        """Keyword arrays of opened items, with the items on axis 0."""

    def default_max_tokens(self, ctx: InputContext) -> int:
        """Most tokens of one item, from the config.

        Raises:
          RegistrationError: the config does not tell.
        """
        raise RegistrationError(
            f"the config of {ctx.model_config.model!r} does not tell how many tokens one {self.modality} item takes "
            f"at most; register a number or a function with register_max_{self.modality}_tokens"
        )


def embedding_rows(item: Any) -> int:
    """Rows of an opened item that is embeddings computed beforehand, ``[rows, D]``; 0 for any other item."""
    return len(item) if isinstance(item, np.ndarray) and item.ndim == 2 and is_floating(item) else 0


def is_floating(array: np.ndarray) -> bool:
    """Whether the values are floating point, bfloat16 and its like included."""
    return array.dtype.kind == "f" or array.dtype.name.startswith(("bfloat", "float"))


def is_stack_of_embeddings(array: np.ndarray, model_config: ModelConfig) -> bool:
    """Whether these are embeddings of several items, ``[items, rows, D]``, and no floating-point pixels."""
    return array.ndim == 3 and is_floating(array) and array.shape[-1] == model_config.hf_text_config.hidden_size


def check_embeddings(array: np.ndarray, model_config: ModelConfig, modality: str, otherwise: str) -> np.ndarray:
    """Embeddings ``[rows, D]`` as float32, as wide as the model's token embeddings.

    Args:
      otherwise: how to give an item that is no embeddings, for the message.

    Raises:
      MediaError: another rank or width, no rows, or values that are not finite.
    """
    width = model_config.hf_text_config.hidden_size
    if array.ndim != 2 or array.shape[1] != width or not len(array):
        raise MediaError(
            f"{modality} embeddings of one item are [rows, {width}] for this model, got {list(array.shape)} "
            f"({otherwise})"
        )
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise MediaError(f"{modality} embeddings hold values that are not finite")
    return array
