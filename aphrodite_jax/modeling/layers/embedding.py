"""Patches of an image to rows of a vision tower, and media rows into a prompt."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

__all__ = ["PatchEmbed", "merge_multimodal_embeddings"]


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
