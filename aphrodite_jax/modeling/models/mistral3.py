"""Mistral 3 (Mistral Small 3.1 and later): Mistral over Pixtral's tower, with squares of patches merged into one row.

https://mistral.ai/news/mistral-small-3-1

How an image becomes tokens: as in `pixtral`, but that sides are stretched to whole squares of ``spatial_merge_size``
patches a side, and each square becomes one row: the projector norms the patches, puts those of a square side by side,
and makes them as wide as the tower again before it projects them.
"""

import copy

from flax import nnx
from jaxtyping import Array, Float

from aphrodite_jax.errors import ConfigError
from aphrodite_jax.modeling.layers.activation import activation
from aphrodite_jax.modeling.models.llava import feature_layers
from aphrodite_jax.modeling.models.pixtral import PixtralForConditionalGeneration

__all__ = ["Mistral3ForConditionalGeneration"]


class Mistral3PatchMerger(nnx.Module):
    """The patches of a square, which stand one after another, to one row."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        width, self.square = config.vision_config.hidden_size, config.spatial_merge_size**2
        kw = {"use_bias": False, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.merging_layer = nnx.Linear(width * self.square, width, **kw)

    def __call__(self, x: Float[Array, "B patches tower"]) -> Float[Array, "B rows tower"]:
        """Each square on its own; of a channel the values of all its patches stand side by side."""
        B, patches, width = x.shape
        squares = x.reshape(B, patches // self.square, self.square, width).swapaxes(2, 3)
        return self.merging_layer(squares.reshape(B, -1, width * self.square))


class Mistral3MultiModalProjector(nnx.Module):
    """Patches of the tower to fewer rows as wide as the language model."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        if len(feature_layers(config)) > 1:
            raise ConfigError(
                f"vision_feature_layer {config.vision_feature_layer} of Mistral 3 is not supported: its projector "
                "takes the hidden states of one layer"
            )
        width, fan_out = config.vision_config.hidden_size, config.text_config.hidden_size
        kw = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.norm = nnx.RMSNorm(width, epsilon=config.text_config.rms_norm_eps, **kw)
        self.patch_merger = Mistral3PatchMerger(config, dtype=dtype, rngs=rngs)
        self.act = activation(config.projector_hidden_act)
        self.linear_1 = nnx.Linear(width, fan_out, use_bias=config.multimodal_projector_bias, **kw)
        self.linear_2 = nnx.Linear(fan_out, fan_out, use_bias=config.multimodal_projector_bias, **kw)

    def __call__(self, x: Float[Array, "B patches tower"]) -> Float[Array, "B rows D"]:
        """Each square of patches on its own."""
        return self.linear_2(self.act(self.linear_1(self.patch_merger(self.norm(x)))))


class Mistral3ForConditionalGeneration(PixtralForConditionalGeneration):
    """Mistral 3 over Mistral."""

    traits = ("images at their own size and shape", "squares of patches merged", "tokens at the ends of lines")

    projector_class = Mistral3MultiModalProjector

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        config = copy.copy(config)
        config.tie_word_embeddings = ties_embeddings(config)
        super().__init__(config, dtype=dtype, rngs=rngs)


def ties_embeddings(config) -> bool:
    """Whether the output head is the token embeddings: where the outer config and that of the language model say so.

    The outer one does where its file is silent, as published ones are. Hugging Face then looks whether the checkpoint
    has a head of its own; of published checkpoints the language model's config tells.
    """
    return config.tie_word_embeddings and config.text_config.tie_word_embeddings
