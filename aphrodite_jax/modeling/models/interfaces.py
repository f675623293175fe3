"""What the engine asks of a model class, and what makes one multimodal."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jaxtyping import Array, Float, Int

from aphrodite_jax.errors import RegistrationError
from aphrodite_jax.inputs import InputContext, PlacedItem
from aphrodite_jax.modeling.layers.attention import AttentionMetadata, KVCache
from aphrodite_jax.modeling.layers.embedding import merge_multimodal_embeddings
from aphrodite_jax.modeling.loader.weight_rules import WeightRule

__all__ = ["LanguageModel", "MaskSpec", "SupportsMRoPE", "SupportsMultiModal", "position_axes", "supports_multimodal"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """One kind of mask of a model's layers, as a rule over a prompt (`kernels_pallas.intervals`).

    Attributes:
      window: keys that a row sees at most, its own included; None sees all before it.
      bidirectional: modalities whose placeholder spans see themselves whole; spans that touch are one.
      clamp_start: whether such a row looks back no further than its window, though it looks ahead to its span's end.
      prefix: the whole prompt sees itself whole; generated tokens are causal.
    """

    window: int | None = None
    bidirectional: tuple[str, ...] = ()
    clamp_start: bool = False
    prefix: bool = False


@runtime_checkable
class LanguageModel(Protocol):
    """An nnx module that the engine can run.

    Built as ``cls(config, dtype=..., rngs=...)`` from the Hugging Face config; all parameters have ``dtype``.

    Class attributes:
      weight_rules: how checkpoint names become parameter paths.

    A class may have ``traits``, a tuple of what sets it apart, in a few words each, for lists of models; and a method
    ``final_norm(hidden_states [T, D])``, the norm behind its last layer, with which `LLM.capture` reads what stands
    between the layers as tokens; and ``logical_axes``, names for the axes of parameters that
    `aphrodite_jax.modeling.sharding.LOGICAL_AXES` does not name, without which it runs on one device alone.
    """

    weight_rules: ClassVar[tuple[WeightRule, ...]]

    @staticmethod
    def mask_specs(config: transformers.PretrainedConfig) -> dict[str, MaskSpec]:
        """The mask kinds of this model's layers, by the name under which they look up their intervals."""
        ...

    @staticmethod
    def kv_cache_shapes(config: transformers.PretrainedConfig) -> Sequence[tuple[int, int]]:
        """``(num_kv_heads, head_dim)`` of each decoder layer."""
        ...

    def embed_input_ids(self, input_ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Token embeddings.

        They may be wider than the hidden states, with zeros where rows of media carry what goes to deeper layers.
        """
        ...

    def __call__(
        self,
        input_ids: Int[Array, " T"],
        positions: Int[Array, " T"] | Int[Array, "axes T"],
        kv_caches: tuple[KVCache, ...] | None,
        attn_metadata: AttentionMetadata,
        *,
        inputs_embeds: Float[Array, "T D"] | None = None,
    ) -> tuple[Float[Array, "T D"], tuple[KVCache, ...] | None]:
        """Hidden states after the last norm, and the caches with this call's keys and values written.

        ``inputs_embeds``, if given, takes the place of the token embeddings.
        """
        ...

    def compute_logits(self, hidden_states: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """Next-token logits, in float32."""
        ...


class SupportsMultiModal:
    """A model that takes media; a mix-in for nnx modules.

    Its ``__call__`` reserves keyword parameters for the arrays that its input mappers make (``pixel_values``,
    say); called with them, it encodes the media and puts the rows where the prompt has the placeholder token.
    The engine does the same in two programs, `embed_multimodal` and a ``__call__`` with ``inputs_embeds``,
    so that nothing of the media is in the second one's shape.

    For `LLM.chat` a class also has a static method ``placeholder_str(modality, index)``: the text that stands for
    the ``index``-th item, from 1, in a prompt.
    """

    supports_multimodal: ClassVar[bool] = True
    video_sampling: ClassVar[Mapping[str, Any]] = {}
    """Fields of `FrameSampling` for video files, where the checkpoint's own files and the user say nothing else."""

    def embed_multimodal(self, **mm_kwargs: jax.Array) -> Mapping[str, Sequence[Float[Array, "rows D"]]]:
        """Encode media: modality to one array of rows per item, in the order of the items.

        The arrays are those of the mappers, with items on axis 0. Rows are as wide as token embeddings.
        """
        raise RegistrationError(f"{type(self).__name__} takes media but has no embed_multimodal method")

    def media_token(self, modality: str) -> int:
        """The token that stands for a row of an item: the config's ``image_token_id`` or ``image_token_index``, say."""
        config = self.config  # pyright: ignore[reportAttributeAccessIssue]
        found = getattr(config, f"{modality}_token_id", None)
        return getattr(config, f"{modality}_token_index") if found is None else found

    def embed_with_media(
        self, input_ids: Int[Array, " T"], media: Mapping[str, Iterable[Float[Array, "rows D"]]]
    ) -> Float[Array, "T D"]:
        """Token embeddings, with the rows of ``media`` (`embed_multimodal`) in the places of their tokens, in order.

        For ``__call__`` without an engine; there must be one token per row.
        """
        embeds = self.embed_input_ids(input_ids)  # pyright: ignore[reportAttributeAccessIssue]
        for modality, rows in media.items():
            is_row = input_ids == self.media_token(modality)
            embeds = merge_multimodal_embeddings(embeds, is_row, jnp.concatenate(list(rows)))
        return embeds

    @staticmethod
    def pad_media(config: transformers.PretrainedConfig, mm_kwargs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One item's arrays in the shape for which they are encoded; a pure function.

        Where items differ in shape without end, this leaves a few shapes. ``mm_kwargs`` has an axis of one item first.
        What is added makes rows behind the item's own, and changes none of these.
        """
        return dict(mm_kwargs)

    @staticmethod
    def media_shapes(ctx: InputContext) -> Sequence[Mapping[str, jax.ShapeDtypeStruct]]:
        """Arrays of one item by keyword, with an axis of one item first: one for each shape that `pad_media` gives.

        Their programs are compiled before the first request. Those of the registered dummy data need not be among
        them, and where they are the only ones, none is needed.
        """
        return ()


class SupportsMRoPE:
    """A model whose rows have a position on each of several axes, such as time, height and width; a mix-in.

    Its ``__call__`` gets ``positions [axes, T]``. Those of a prompt are computed once; the tokens of the answer follow
    with the same number on all axes, one more than the largest of the prompt.
    """

    position_axes: ClassVar[int] = 3

    @staticmethod
    def prompt_positions(
        config: transformers.PretrainedConfig, token_ids: Int[np.ndarray, " T"], media: Sequence[PlacedItem]
    ) -> Int[np.ndarray, "axes T"]:
        """Positions of a prompt's tokens; a pure function. ``media`` stand in the order of their places.

        A token's positions depend on what stands up to it alone, for pages are shared by prompts that begin alike.
        """
        raise RegistrationError("a model that SupportsMRoPE has prompt_positions")


def position_axes(model_cls: type) -> int:
    """Axes of a row's position: 1, or as many as a `SupportsMRoPE` has."""
    return model_cls.position_axes if issubclass(model_cls, SupportsMRoPE) else 1


def supports_multimodal(model_cls: type) -> bool:
    """Whether ``model_cls`` is multimodal: a `SupportsMultiModal`."""
    return issubclass(model_cls, SupportsMultiModal)
