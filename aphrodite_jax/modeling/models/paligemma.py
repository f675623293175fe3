"""PaliGemma and PaliGemma 2: a SigLIP tower, one linear projection, Gemma or Gemma 2.

https://arxiv.org/abs/2407.07726 and https://arxiv.org/abs/2412.03555

How an image becomes tokens: the tower gives a row per patch, after its last norm; the projection makes them as wide as
the language model; they replace one ``<image>`` token each. The whole prompt, images and text, sees itself whole
(prefix-LM); the answer is causal. In Gemma 2's layers with a window the prompt sees itself whole all the same, and the
answer looks back no further than its window.

A prompt is the images, the beginning-of-sequence token, the text and a newline, which the input processor sees to.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import transformers
from flax import nnx
from jaxtyping import Array, Float
from PIL import Image

from aphrodite_jax.errors import ConfigError
from aphrodite_jax.inputs import (
    INPUT_REGISTRY,
    DummyData,
    InputContext,
    LLMInputs,
    dummy_prompt,
    expand_items,
    text_tokens,
)
from aphrodite_jax.modeling.models.interfaces import MaskSpec
from aphrodite_jax.modeling.models.llava import LlavaForConditionalGeneration
from aphrodite_jax.modeling.models.siglip import SiglipVisionModel
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, embedding_rows

__all__ = ["PaliGemmaForConditionalGeneration"]


# Inputs: pure functions of the config and of one request.


def num_image_tokens(config) -> int:
    """Rows that the model makes of one image: one a patch."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def max_image_tokens(ctx: InputContext) -> int:
    """Tokens of one image: all images are resized to one size."""
    return num_image_tokens(_config(ctx))


def dummy_data(ctx: InputContext, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    """As many images as allowed, each behind its placeholder token, then padding up to ``seq_len`` tokens."""
    config = _config(ctx)
    images = [Image.new("RGB", (config.vision_config.image_size,) * 2)] * mm_counts["image"]
    added = 1 + len(text_tokens(ctx.model_config)("\n"))  # by `lay_out`
    return dummy_prompt(seq_len - added, "image", config.image_token_index, images, num_image_tokens(config))


def lay_out(ctx: InputContext, inputs: LLMInputs) -> LLMInputs:
    """The beginning-of-sequence token behind the last image, a newline at the end, and a token per row of each image.

    A prompt without images stays as it is.
    """
    config = _config(ctx)
    images = inputs.multi_modal_data.get("image", ())
    if not images:
        return expand_items(inputs, "image", config.image_token_index, ())
    tokens, bos = list(inputs.prompt_token_ids), config.text_config.bos_token_id
    if tokens[:1] == [bos]:
        tokens = tokens[1:]
    last = max((place for place, token in enumerate(tokens) if token == config.image_token_index), default=-1)
    tokens[last + 1 : last + 1] = [bos]
    laid_out = LLMInputs(
        prompt_token_ids=(*tokens, *text_tokens(ctx.model_config)("\n")),
        prompt=inputs.prompt,
        multi_modal_data=inputs.multi_modal_data,
    )
    lengths = [embedding_rows(image) or num_image_tokens(config) for image in images]
    return expand_items(laid_out, "image", config.image_token_index, lengths)


def _config(ctx: InputContext) -> Any:
    return ctx.get_hf_config(transformers.PaliGemmaConfig)


# The model.


class PaliGemmaProjector(nnx.Module):
    """Rows of the tower to rows as wide as the language model."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        width, kw = config.text_config.hidden_size, {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.linear = nnx.Linear(config.vision_config.hidden_size, width, **kw)

    def __call__(self, x: Float[Array, "B T tower"]) -> Float[Array, "B T D"]:
        """Each row on its own."""
        return self.linear(x)


@MULTIMODAL_REGISTRY.register_image_input_mapper()
@MULTIMODAL_REGISTRY.register_max_image_tokens(max_image_tokens)
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(lay_out)
class PaliGemmaForConditionalGeneration(LlavaForConditionalGeneration):
    """PaliGemma over Gemma, PaliGemma 2 over Gemma 2."""

    traits = ("prefix-LM prompts", "soft caps and windows (PaliGemma 2)")
    family = "PaliGemma"
    language_models: ClassVar[Mapping[str, str]] = {"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM"}

    def _make_parts(self, config, **kw):
        if config.projection_dim != config.text_config.hidden_size:
            raise ConfigError(
                f"projection_dim {config.projection_dim} is not the language model's width "
                f"{config.text_config.hidden_size}"
            )
        self.vision_tower = SiglipVisionModel(config.vision_config, **kw)
        self.multi_modal_projector = PaliGemmaProjector(config, **kw)

    @classmethod
    def mask_specs(cls, config) -> dict[str, MaskSpec]:
        """The prompt sees itself whole, in layers with a window too."""
        text = config.text_config
        if not text.use_bidirectional_attention:
            raise ConfigError("use_bidirectional_attention=False of PaliGemma's text_config is not supported")
        specs = {
            "full": MaskSpec(prefix=True),
            "sliding": MaskSpec(window=getattr(text, "sliding_window", None), prefix=True),
        }
        return {kind: specs[kind] for kind in dict.fromkeys(cls.language_model_class(config).layer_masks(text))}

    def embed_multimodal(
        self,
        pixel_values: Float[Array, "items C height width"] | None = None,
        image_embeds: Float[Array, "items rows D"] | None = None,
    ) -> dict[str, Float[Array, "items rows D"]]:
        """Rows for each image, from its pixels, or as given where they were computed before."""
        if image_embeds is not None:
            return {"image": image_embeds}
        assert pixel_values is not None, "pixels or embeddings"
        return {"image": self.multi_modal_projector(self.vision_tower.last_hidden_state(pixel_values))}
