"""LLaVA-1.5: a CLIP or SigLIP tower, a two-layer projector, a language model (https://arxiv.org/abs/2310.03744).

How an image becomes tokens: the tower gives a row per patch (and, in CLIP, one for the class token, which the
strategy "default" drops, with the first patch of a SigLIP tower, as Hugging Face does); the projector makes
the rows as wide as the language model; they replace one ``<image>`` token each, under a plain causal mask.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import transformers
from flax import nnx
from jaxtyping import Array, Float, Int
from PIL import Image

from aphrodite_jax.errors import ConfigError
from aphrodite_jax.inputs import INPUT_REGISTRY, DummyData, InputContext, LLMInputs, dummy_prompt, expand_items
from aphrodite_jax.modeling.layers.activation import activation
from aphrodite_jax.modeling.layers.attention import AttentionMetadata, KVCache
from aphrodite_jax.modeling.loader.weight_rules import WeightRule
from aphrodite_jax.modeling.models.clip import CLIPVisionModel
from aphrodite_jax.modeling.models.over_language_model import OverLanguageModel
from aphrodite_jax.modeling.models.siglip import SiglipVisionModel
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, embedding_rows

__all__ = ["LlavaForConditionalGeneration", "LlavaMultiModalProjector", "feature_layers"]

VISION_TOWERS = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}


# Inputs: pure functions of the config and of one request.


def num_image_tokens(config) -> int:
    """Rows that the model makes of one image, and tokens that stand for it in the prompt."""
    vision = config.vision_config
    rows = (vision.image_size // vision.patch_size) ** 2 + _tower_class(config).has_class_token
    return rows - (config.vision_feature_select_strategy == "default")


def max_image_tokens(ctx: InputContext) -> int:
    """Tokens of one image: all images are resized to one size."""
    return num_image_tokens(ctx.get_hf_config(transformers.LlavaConfig))


def dummy_data(ctx: InputContext, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    """As many images as allowed, each behind its placeholder token, then padding up to ``seq_len`` tokens."""
    config: Any = ctx.get_hf_config(transformers.LlavaConfig)
    images = [Image.new("RGB", (config.vision_config.image_size,) * 2)] * mm_counts["image"]
    return dummy_prompt(seq_len, "image", config.image_token_index, images, num_image_tokens(config))


def expand_images(ctx: InputContext, inputs: LLMInputs) -> LLMInputs:
    """Each ``<image>`` token becomes one token per row of its image."""
    config = ctx.get_hf_config(transformers.LlavaConfig)
    images = inputs.multi_modal_data.get("image", ())
    lengths = [embedding_rows(image) or num_image_tokens(config) for image in images]
    return expand_items(inputs, "image", config.image_token_index, lengths)


# The model.


class LlavaMultiModalProjector(nnx.Module):
    """Rows of the tower to rows as wide as the language model."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        width = config.text_config.hidden_size
        kw = {"use_bias": config.multimodal_projector_bias, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.act = activation(config.projector_hidden_act)
        self.linear_1 = nnx.Linear(config.vision_config.hidden_size * len(feature_layers(config)), width, **kw)
        self.linear_2 = nnx.Linear(width, width, **kw)

    def __call__(self, x: Float[Array, "B T tower"]) -> Float[Array, "B T D"]:
        """Each row on its own."""
        return self.linear_2(self.act(self.linear_1(x)))


@MULTIMODAL_REGISTRY.register_image_input_mapper()
@MULTIMODAL_REGISTRY.register_max_image_tokens(max_image_tokens)
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(expand_images)
class LlavaForConditionalGeneration(OverLanguageModel):
    """LLaVA-1.5 over Llama, Mistral or Qwen2."""

    traits = ("one size of images", "CLIP or SigLIP at any of its layers")
    family = "LLaVA"
    language_models: ClassVar[Mapping[str, str]] = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
    }

    # Files have one of three layouts; ours is the oldest, which hub files have.
    weight_rules = (
        WeightRule(r".*\.rotary_emb\.inv_freq|.*\.position_ids", None),
        WeightRule(r".*vision_tower\.(?:vision_model\.)?head\..*", None),  # SigLIP's pooler
        WeightRule(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.*)", r"vision_tower.vision_model.\1"),
        WeightRule(r"(?:model\.)?multi_modal_projector\.(.*)", r"multi_modal_projector.\1"),
        WeightRule(r"(language_model\.(?:model|lm_head)\..*)", r"\1"),
        WeightRule(r"model\.language_model\.(.*)", r"language_model.model.\1"),
        WeightRule(r"lm_head\.(.*)", r"language_model.lm_head.\1"),
    )

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.config = config
        self._make_parts(config, dtype=dtype, rngs=rngs)
        # The outer config decides, as in Hugging Face.
        self.language_model = self.make_language_model(config, tied=config.tie_word_embeddings, dtype=dtype, rngs=rngs)

    def _make_parts(self, config, **kw):
        self.vision_tower = _tower_class(config)(config.vision_config, **kw)
        self.multi_modal_projector = LlavaMultiModalProjector(config, **kw)

    @staticmethod
    def placeholder_str(modality: str, index: int) -> str:
        """The text that stands for an item in a prompt."""
        return "<image>"

    def embed_multimodal(
        self,
        pixel_values: Float[Array, "items C height width"] | None = None,
        image_embeds: Float[Array, "items rows D"] | None = None,
    ) -> dict[str, Float[Array, "items rows D"]]:
        """Rows for each image, from its pixels, or as given where they were computed before."""
        if image_embeds is not None:
            return {"image": image_embeds}
        features = self.vision_tower(pixel_values, feature_layers(self.config))
        if self.config.vision_feature_select_strategy == "default":
            features = [x[:, 1:] for x in features]
        return {"image": self.multi_modal_projector(jnp.concatenate(features, axis=-1))}

    def __call__(
        self,
        input_ids: Int[Array, " T"],
        positions: Int[Array, " T"],
        kv_caches: tuple[KVCache, ...] | None,
        attn_metadata: AttentionMetadata,
        pixel_values: Float[Array, "items C height width"] | None = None,
        image_embeds: Float[Array, "items rows D"] | None = None,
        *,
        inputs_embeds: Float[Array, "T D"] | None = None,
    ) -> tuple[Float[Array, "T D"], tuple[KVCache, ...] | None]:
        """Hidden states after the last norm, and the caches.

        With pixels (or embeddings) the rows of the images replace the ``<image>`` tokens in order; there must be
        one token per row. ``inputs_embeds`` takes the place of both.
        """
        if inputs_embeds is None:
            given = pixel_values is not None or image_embeds is not None
            media = self.embed_multimodal(pixel_values=pixel_values, image_embeds=image_embeds) if given else {}
            inputs_embeds = self.embed_with_media(input_ids, media)
        return self.language_model(input_ids, positions, kv_caches, attn_metadata, inputs_embeds=inputs_embeds)


def feature_layers(config) -> tuple[int, ...]:
    """Layers of the tower whose hidden states go to the projector side by side."""
    layer = config.vision_feature_layer
    return (layer,) if isinstance(layer, int) else tuple(layer)


def _tower_class(config) -> type:
    kind = config.vision_config.model_type
    if kind not in VISION_TOWERS:
        raise ConfigError(f"LLaVA with a vision tower {kind!r} is not supported; there are {', '.join(VISION_TOWERS)}")
    return VISION_TOWERS[kind]
