"""A small multimodal model that does everything right, in parts that mutants replace one by one.

**Strips** sees a picture as up to six strips of 20 pixels of its height: a strip is the mean colours of its four
quarters, and a row is a strip beside the mean of all of them. So the number of tokens depends on the picture's size,
items are padded to 2, 4 or 6 strips, and padding must be told from strips.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx
from PIL import Image

from aphrodite_jax.inputs import INPUT_REGISTRY, dummy_prompt, expand_items
from aphrodite_jax.modeling.layers.embedding import merge_multimodal_embeddings
from aphrodite_jax.modeling.loader import WeightRule
from aphrodite_jax.modeling.models.interfaces import SupportsMultiModal
from aphrodite_jax.modeling.models.llama import LlamaForCausalLM
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, MultiModalInputs

IMAGE_TOKEN, STRIP, MOST, QUARTERS = 70, 20, 6, 4
PADDED = (2, 4, 6)


def tiny_config():
    """As small as it gets."""
    return transformers.LlamaConfig(
        image_token_index=IMAGE_TOKEN,
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )


def num_strips(image):
    return min(max(image.height // STRIP, 1), MOST)


def strips_of(image):
    """Mean colours of the quarters of each strip, float32 ``[strips, 12]``."""
    small = image.resize((QUARTERS, num_strips(image)), Image.Resampling.BOX)
    return (np.asarray(small, np.float32) / 255).reshape(-1, 3 * QUARTERS)


def map_images(ctx, images):
    return MultiModalInputs.batch(
        [
            MultiModalInputs({"pixel_values": strips_of(image), "is_strip": np.ones(num_strips(image), np.float32)})
            for image in images
        ]
    )


def pad_media(config, mm_kwargs):
    strips = mm_kwargs["pixel_values"].shape[1]
    more = next(count for count in PADDED if count >= strips) - strips
    return {name: np.pad(array, [(0, 0), (0, more), *[(0, 0)] * (array.ndim - 2)]) for name, array in mm_kwargs.items()}


def media_shapes(ctx):
    shapes = {"pixel_values": (3 * QUARTERS,), "is_strip": ()}
    return [
        {name: jax.ShapeDtypeStruct((1, count, *shape), np.float32) for name, shape in shapes.items()}
        for count in PADDED
    ]


def max_image_tokens(ctx):
    return MOST


def dummy_data(ctx, seq_len, mm_counts):
    images = [Image.new("RGB", (QUARTERS, STRIP * MOST))] * mm_counts["image"]
    return dummy_prompt(seq_len, "image", IMAGE_TOKEN, images, MOST)


def expand_images(ctx, inputs):
    lengths = [num_strips(image) for image in inputs.multi_modal_data.get("image", ())]
    return expand_items(inputs, "image", IMAGE_TOKEN, lengths)


def rows_of(projector, pixel_values, is_strip):
    """``[items, strips, D]``; the mean is of strips alone."""
    weights = is_strip[..., None]
    mean = (pixel_values * weights).sum(1, keepdims=True) / weights.sum(1, keepdims=True)
    return projector(jnp.concatenate([pixel_values, jnp.broadcast_to(mean, pixel_values.shape)], axis=-1))


def build(
    *,
    mapper: Any = map_images,
    bound: Any = max_image_tokens,
    dummy: Any = dummy_data,
    processor: Any = expand_images,
    rows: Callable = rows_of,
    padding: Callable = pad_media,
    shapes: Callable = media_shapes,
    masks: Callable = LlamaForCausalLM.mask_specs,
    after: Callable = lambda model, input_ids, hidden: hidden,
    place: Callable = lambda positions: positions,
    before: Callable = lambda model, input_ids, embeds: embeds,
    in_call: Callable = lambda rows: rows,
    beside: Callable = lambda hidden, kv_caches: hidden,
    mix_in: type = SupportsMultiModal,
) -> type:
    """The model with some parts replaced; a part that is None is not registered."""

    class Strips(nnx.Module, mix_in):
        weight_rules = (WeightRule(r"((?:projector|language_model)\..*)", r"\1"),)
        mask_specs = staticmethod(masks)
        kv_cache_shapes = staticmethod(LlamaForCausalLM.kv_cache_shapes)
        pad_media = staticmethod(padding)
        media_shapes = staticmethod(shapes)

        def __init__(self, config, *, dtype, rngs):
            self.config = config
            kw = {"dtype": dtype, "rngs": rngs}
            self.projector = nnx.Linear(6 * QUARTERS, config.hidden_size, param_dtype=dtype, **kw)
            self.language_model = LlamaForCausalLM(config, **kw)

        def embed_multimodal(self, pixel_values, is_strip):
            if isinstance(pixel_values, tuple | list):
                pairs = zip(pixel_values, is_strip, strict=True)
                return {"image": [rows(self.projector, x[None], flags[None])[0] for x, flags in pairs]}
            return {"image": list(rows(self.projector, pixel_values, is_strip))}

        def embed_input_ids(self, input_ids):
            return self.language_model.embed_input_ids(input_ids)

        def __call__(
            self,
            input_ids,
            positions,
            kv_caches,
            attn_metadata,
            pixel_values=None,
            is_strip=None,
            *,
            inputs_embeds=None,
        ):
            if inputs_embeds is None:
                inputs_embeds = self.embed_input_ids(input_ids)
                if pixel_values is not None:
                    images = jnp.concatenate(
                        [in_call(x) for x in self.embed_multimodal(pixel_values, is_strip)["image"]]
                    )
                    inputs_embeds = merge_multimodal_embeddings(inputs_embeds, input_ids == IMAGE_TOKEN, images)
            inputs_embeds = before(self, input_ids, inputs_embeds)
            hidden, kv_caches = self.language_model(
                input_ids, place(positions), kv_caches, attn_metadata, inputs_embeds=inputs_embeds
            )
            return after(self, input_ids, beside(hidden, kv_caches)), kv_caches

        def compute_logits(self, hidden_states):
            return self.language_model.compute_logits(hidden_states)

    for register, part in (
        (MULTIMODAL_REGISTRY.register_image_input_mapper, mapper),
        (MULTIMODAL_REGISTRY.register_max_image_tokens, bound),
        (INPUT_REGISTRY.register_dummy_data, dummy),
        (INPUT_REGISTRY.register_input_processor, processor),
    ):
        if part is not None:
            register(part)(Strips)
    return Strips


Strips = build()
