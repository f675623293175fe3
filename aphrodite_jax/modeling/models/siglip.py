"""SigLIP's vision tower (https://arxiv.org/abs/2303.15343): CLIP's encoder without a class token."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from aphrodite_jax.modeling.layers.embedding import PatchEmbed
from aphrodite_jax.modeling.models.clip import VisionEncoder, check_image_size, vision_norm

__all__ = ["SiglipVisionEmbeddings", "SiglipVisionModel"]


class SiglipVisionEmbeddings(nnx.Module):
    """Patches and learned positions."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.config = config
        width, kw = config.hidden_size, {"dtype": dtype, "rngs": rngs}
        self.patch_embedding = PatchEmbed(config.num_channels, config.patch_size, width, use_bias=True, **kw)
        positions = (config.image_size // config.patch_size) ** 2
        self.position_embedding = nnx.Embed(positions, width, param_dtype=dtype, **kw)

    def __call__(self, pixel_values: Float[Array, "B C height width"]) -> Float[Array, "B T D"]:
        """Rows of patches."""
        check_image_size(self.config, pixel_values)
        return self.patch_embedding(pixel_values) + self.position_embedding.embedding[...][None]


class SiglipVisionTransformer(nnx.Module):
    """Embeddings, the encoder, and the norm behind its last layer, which hidden states do not have."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.embeddings = SiglipVisionEmbeddings(config, **kw)
        self.encoder = VisionEncoder(config, **kw)
        self.post_layernorm = vision_norm(config, **kw)

    def __call__(self, pixel_values, layers):
        """As `SiglipVisionModel`."""
        return self.encoder(self.embeddings(pixel_values), layers)


class SiglipVisionModel(nnx.Module):
    """SigLIP's image side, without its attention-pooling head."""

    has_class_token = False

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.vision_model = SiglipVisionTransformer(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, pixel_values: Float[Array, "B C height width"], layers: Sequence[int]
    ) -> tuple[Float[Array, "B T D"], ...]:
        """Hidden states of the tower at ``layers``."""
        return self.vision_model(pixel_values, layers)

    def last_hidden_state(self, pixel_values: Float[Array, "B C height width"]) -> Float[Array, "B T D"]:
        """Hidden states of the last layer, normed."""
        (x,) = self.vision_model(pixel_values, (-1,))
        return self.vision_model.post_layernorm(x)
