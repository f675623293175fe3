"""CLIP's vision tower (https://arxiv.org/abs/2103.00020), and the encoder that SigLIP shares with it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from aphrodite_jax.modeling.layers.activation import activation
from aphrodite_jax.modeling.layers.attention import attend_batch
from aphrodite_jax.modeling.layers.embedding import PatchEmbed
from aphrodite_jax.modeling.layers.norms import layer_norm
from aphrodite_jax.modeling.layers.stack import call_layer

__all__ = ["CLIPVisionModel", "VisionEncoder", "check_image_size"]


class VisionAttention(nnx.Module):
    """Self-attention in which every patch of an image sees every other."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.num_heads = config.num_attention_heads
        width, kw = config.hidden_size, {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.q_proj = nnx.Linear(width, width, **kw)
        self.k_proj = nnx.Linear(width, width, **kw)
        self.v_proj = nnx.Linear(width, width, **kw)
        self.out_proj = nnx.Linear(width, width, **kw)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Attention within each image."""
        B, T, D = x.shape
        q, k, v = (
            projection(x).reshape(B, T, self.num_heads, -1) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attend_batch(q, k, v).reshape(B, T, D))


class VisionMLP(nnx.Module):
    """Feed-forward with one hidden layer."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.act = activation(config.hidden_act)
        self.fc1 = nnx.Linear(config.hidden_size, config.intermediate_size, **kw)
        self.fc2 = nnx.Linear(config.intermediate_size, config.hidden_size, **kw)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The feed-forward of each patch."""
        return self.fc2(self.act(self.fc1(x)))


class VisionEncoderLayer(nnx.Module):
    """Attention and feed-forward, each after a norm and added to what came in."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.self_attn = VisionAttention(config, **kw)
        self.layer_norm1 = vision_norm(config, **kw)
        self.mlp = VisionMLP(config, **kw)
        self.layer_norm2 = vision_norm(config, **kw)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """One layer."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nnx.Module):
    """A stack of layers that can stop early; towers with layers of their own subclass it."""

    layer_class: type = VisionEncoderLayer

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.layers = nnx.List(
            self.layer_class(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)
        )

    def __call__(
        self, x: Float[Array, "B T D"], layers: Sequence[int], *args: Any
    ) -> tuple[Float[Array, "B T D"], ...]:
        """The hidden states numbered ``layers``, in their order; 0 is the input, -1 the last layer's output.

        ``args`` are what each layer gets beside them.
        """
        count = len(self.layers) + 1
        for index in layers:
            if not -count <= index < count:
                raise ValueError(f"vision feature layer {index} is outside [-{count}, {count})")
        wanted = [index % count for index in layers]
        states = [x]
        for layer in self.layers[: max(wanted)]:
            states.append(call_layer(layer, states[-1], *args))
        return tuple(states[index] for index in wanted)


class CLIPVisionEmbeddings(nnx.Module):
    """The class token, patches, and learned positions."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.config = config
        width, kw = config.hidden_size, {"dtype": dtype, "rngs": rngs}
        self.class_embedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (width,), dtype))
        self.patch_embedding = PatchEmbed(config.num_channels, config.patch_size, width, use_bias=False, **kw)
        positions = (config.image_size // config.patch_size) ** 2 + 1
        self.position_embedding = nnx.Embed(positions, width, param_dtype=dtype, **kw)

    def __call__(self, pixel_values: Float[Array, "B C height width"]) -> Float[Array, "B T D"]:
        """Rows of the tower: the class token, then the patches."""
        check_image_size(self.config, pixel_values)
        x = self.patch_embedding(pixel_values)
        first = jnp.broadcast_to(self.class_embedding[...], (len(x), 1, x.shape[-1]))
        return jnp.concatenate([first, x], axis=1) + self.position_embedding.embedding[...][None]


class CLIPVisionTransformer(nnx.Module):
    """Embeddings, a norm, and the encoder. ``post_layernorm`` is the checkpoint's and serves poolers alone."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.embeddings = CLIPVisionEmbeddings(config, **kw)
        self.pre_layrnorm = vision_norm(config, **kw)  # spelt as in the checkpoints
        self.encoder = VisionEncoder(config, **kw)
        self.post_layernorm = vision_norm(config, **kw)

    def __call__(self, pixel_values, layers):
        """As `CLIPVisionModel`."""
        return self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)), layers)


class CLIPVisionModel(nnx.Module):
    """CLIP's image side, without its pooler."""

    has_class_token = True

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.vision_model = CLIPVisionTransformer(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, pixel_values: Float[Array, "B C height width"], layers: Sequence[int]
    ) -> tuple[Float[Array, "B T D"], ...]:
        """Hidden states of the tower at ``layers``; the first row is the class token."""
        return self.vision_model(pixel_values, layers)


def check_image_size(config, pixel_values) -> None:
    """Raise a `ValueError` unless the pixels are ``[B, C, image_size, image_size]``."""
    expected = (config.num_channels, config.image_size, config.image_size)
    if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected:
        raise ValueError(f"expected pixel_values [B, {', '.join(map(str, expected))}], got {pixel_values.shape}")


def vision_norm(config, *, dtype, rngs):
    """Layer norm of a tower's width."""
    return layer_norm(config.hidden_size, config.layer_norm_eps, dtype=dtype, rngs=rngs)
