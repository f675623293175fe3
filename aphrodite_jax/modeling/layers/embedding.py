"""Patches of an image to rows of a vision tower, and media rows into a prompt."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from aphrodite_jax.modeling.sharding import MODEL, model_axis_size, over_model_axis

__all__ = ["PatchEmbed", "TokenEmbed", "merge_multimodal_embeddings"]


class TokenEmbed(nnx.Embed):
    """Token embeddings; on a mesh each device has a part of the vocabulary, if the devices divide it."""

    def __call__(self, token_ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        """A row for each token."""
        devices = model_axis_size()
        if devices == 1 or self.num_embeddings % devices:
            return super().__call__(token_ids)

        def own_part(table, token_ids):
            places = token_ids - jax.lax.axis_index(MODEL) * len(table)
            is_own = (places >= 0) & (places < len(table))
            rows = table[jnp.clip(places, 0, len(table) - 1)]
            return jax.lax.psum(jnp.where(is_own[:, None], rows, jnp.zeros((), rows.dtype)), MODEL)

        return over_model_axis(own_part, (P(MODEL), P()), P())(self.embedding[...], token_ids)


class PatchEmbed(nnx.Module):
    """A convolution whose stride is its kernel size, as one matrix product over flattened patches.

    ``kernel`` is ``[C * p * p, D]``; ``conv_shape`` is the shape ``(D, C, p, p)`` that checkpoints store.
    """

    def __init__(self, channels: int, patch_size: int, width: int, *, use_bias: bool, dtype, rngs: nnx.Rngs):
        self.conv_shape = (width, channels, patch_size, patch_size)
        self.patch_size = patch_size
        shape = (channels * patch_size**2, width)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype)) if use_bias else None

    def __call__(self, pixel_values: Float[Array, "B C height width"]) -> Float[Array, "B patches D"]:
        """Rows of patches, left to right, then top to bottom."""
        B, C, height, width = pixel_values.shape
        p = self.patch_size
        rows, columns = height // p, width // p
        x = pixel_values[:, :, : rows * p, : columns * p].astype(self.kernel[...].dtype)
        x = x.reshape(B, C, rows, p, columns, p).transpose(0, 2, 4, 1, 3, 5)
        return self.of_patches(x.reshape(B, rows * columns, C * p * p))

    def of_patches(self, patches: Float[Array, "B patches pixels"]) -> Float[Array, "B patches D"]:
        """Rows of patches that are cut out and flattened already."""
        x = patches.astype(self.kernel[...].dtype) @ self.kernel[...]
        return x if self.bias is None else x + self.bias[...][None, None]


def merge_multimodal_embeddings(
    inputs_embeds: Float[Array, "T D"], is_placeholder: Bool[Array, " T"], media: Float[Array, "rows D"]
) -> Float[Array, "T D"]:
    """Token embeddings with the i-th placeholder row replaced by the i-th row of ``media``.

    There are as many placeholder rows as rows of media; a shape can't show it, so callers check it before.
    """
    index = jnp.cumsum(is_placeholder.astype(jnp.int32)) - 1
    rows = media[jnp.clip(index, 0, media.shape[0] - 1)].astype(inputs_embeds.dtype)
    return jax.lax.select(jnp.broadcast_to(is_placeholder[:, None], rows.shape), rows, inputs_embeds)
