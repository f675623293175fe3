"""Gemma 3: a SigLIP tower, pooled; a language model with five layers of a window to one without.

https://arxiv.org/abs/2503.19786

How an image becomes tokens: it is resized to a square; the tower gives a row per patch, after its last norm; squares of
neighbours are averaged, normed and projected; the rows replace one soft token each. In the prompt stands one
``<start_of_image>``, which becomes

    newlines, start of image, a soft token per row, end of image, newlines

With ``do_pan_and_scan`` (an option of the image processor) a long image is seen whole and in crops, with words between:
then it has several runs of soft tokens.

Masks: the rows of a run of soft tokens see all of their run. In layers with a window they look back no further than
that; ahead to the end of their run. All else is causal.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx
from jaxtyping import Array, Float
from PIL import Image

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError, PlaceholderError
from aphrodite_jax.inputs import (
    INPUT_REGISTRY,
    DummyData,
    InputContext,
    LLMInputs,
    PlaceholderRange,
    dummy_prompt,
    text_tokens,
)
from aphrodite_jax.modeling.models.gemma import Gemma2DecoderLayer, GemmaForCausalLM, GemmaRMSNorm
from aphrodite_jax.modeling.models.interfaces import MaskSpec
from aphrodite_jax.modeling.models.llama import masks_of_layer_types
from aphrodite_jax.modeling.models.llava import LlavaForConditionalGeneration
from aphrodite_jax.modeling.models.qwen3 import NormedAttention
from aphrodite_jax.modeling.models.siglip import SiglipVisionModel
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, MultiModalInputs, embedding_rows
from aphrodite_jax.multimodal.hf_processors import OncePerConfig, image_processor

__all__ = ["Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"]

# The language model.


class Gemma3Attention(NormedAttention):
    """Attention with Gemma's norm on each head of queries and keys."""

    norm_class = GemmaRMSNorm


class Gemma3DecoderLayer(Gemma2DecoderLayer):
    """Gemma 2's, with normed heads in the place of capped scores; the two kinds of layers turn at their own pace."""

    attention_class = Gemma3Attention

    @staticmethod
    def attention_scaling(config):
        """As the config says."""
        if config.attn_logit_softcapping is not None:
            raise ConfigError(f"attn_logit_softcapping={config.attn_logit_softcapping} of Gemma 3 is not supported")
        return {"scale": config.query_pre_attn_scalar**-0.5}

    @staticmethod
    def rope_parameters(config, mask: str) -> dict:
        """Those of full or of sliding attention."""
        return config.rope_parameters[f"{mask}_attention"]


class Gemma3ForCausalLM(GemmaForCausalLM):
    """Gemma 3 as a language model."""

    traits = (
        "five layers with a window to one without",
        "normed heads of queries and keys",
    )

    layer_class = Gemma3DecoderLayer

    @staticmethod
    def layer_masks(config) -> tuple[str, ...]:
        """As the config's ``layer_types`` say."""
        return masks_of_layer_types(config)

    @staticmethod
    def mask_specs(config, bidirectional: tuple[str, ...] = ()) -> dict[str, MaskSpec]:
        """Full causal attention, and the window where a layer has one; spans of ``bidirectional`` see themselves."""
        GemmaForCausalLM.mask_specs(config)  # which refuses encoders
        specs = {
            "full": MaskSpec(bidirectional=bidirectional),
            "sliding": MaskSpec(window=config.sliding_window, bidirectional=bidirectional, clamp_start=True),
        }
        return {kind: specs[kind] for kind in dict.fromkeys(masks_of_layer_types(config))}

    def compute_logits(self, hidden_states: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """Next-token logits, in float32, softly capped where the config says so."""
        logits = super().compute_logits(hidden_states)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else jnp.tanh(logits / cap) * cap


# Inputs: pure functions of the config and of one request.


def num_crops(ctx: InputContext, size: tuple[int, int]) -> int:
    """Crops that pan-and-scan cuts out of an image of ``size`` (height, width); 0 without pan-and-scan."""
    processor = image_processor(ctx.model_config)
    if not processor.do_pan_and_scan:
        return 0
    short, long = sorted(size)
    if long / short < processor.pan_and_scan_min_ratio_to_activate:
        return 0
    least = processor.pan_and_scan_min_crop_size
    count = min(math.floor(long / short + 0.5), long // least)
    count = min(max(count, 2), processor.pan_and_scan_max_num_crops)
    return 0 if min(math.ceil(long / count), short) < least else count


def image_tokens(ctx: InputContext, crops: int) -> tuple[int, ...]:
    """The tokens that stand for an image with so many crops, without the newlines round them."""
    config, words = _config(ctx), words_of(ctx.model_config)
    one = (config.boi_token_index, *[config.image_token_index] * config.mm_tokens_per_image, config.eoi_token_index)
    if not crops:
        return one
    return (*words.before_whole, *one, *words.before_crops, *one, *(words.between_crops + one) * (crops - 1))


def max_image_tokens(ctx: InputContext) -> int:
    """Tokens of the image with the most crops."""
    return max(len(image_tokens(ctx, crops)) for crops in possible_crops(ctx))


def possible_crops(ctx: InputContext) -> Sequence[int]:
    """Numbers of crops that an image may have."""
    processor = image_processor(ctx.model_config)
    return (0, *range(2, processor.pan_and_scan_max_num_crops + 1)) if processor.do_pan_and_scan else (0,)


def map_images(ctx: InputContext, items: Sequence[Image.Image]) -> MultiModalInputs:
    """``pixel_values`` of each image, the whole first and its crops behind it."""
    processor = image_processor(ctx.model_config)
    pixels = [processor(images=[image], return_tensors="np")["pixel_values"].astype(np.float32) for image in items]
    return MultiModalInputs.batch([MultiModalInputs({"pixel_values": views}) for views in pixels])


def dummy_data(ctx: InputContext, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    """As many images with the most crops as allowed, each behind its placeholder, then padding to ``seq_len``."""
    image = _image_with(ctx, max(possible_crops(ctx)))
    tokens = max_image_tokens(ctx) + 2 * len(words_of(ctx.model_config).newlines(2))
    return dummy_prompt(seq_len, "image", _config(ctx).boi_token_index, [image] * mm_counts["image"], tokens)


def media_shapes(ctx: InputContext) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Arrays of an image of each number of crops."""
    vision = _config(ctx).vision_config
    shape = (vision.num_channels, vision.image_size, vision.image_size)
    return [{"pixel_values": jax.ShapeDtypeStruct((1, 1 + crops, *shape), np.float32)} for crops in possible_crops(ctx)]


def _image_with(ctx: InputContext, crops: int) -> Image.Image:
    """An image that has so many crops."""
    if not crops:
        return Image.new("RGB", (_config(ctx).vision_config.image_size,) * 2)
    side = image_processor(ctx.model_config).pan_and_scan_min_crop_size
    return Image.new("RGB", (max(crops, 2) * side, side))


def expand_images(ctx: InputContext, inputs: LLMInputs) -> LLMInputs:
    """Each ``<start_of_image>`` becomes the tokens of its image between newlines, joined with those of the text.

    Raises:
      PlaceholderError: there are not as many of them as images.
    """
    config, words = _config(ctx), words_of(ctx.model_config)
    images = inputs.multi_modal_data.get("image", ())
    count = inputs.prompt_token_ids.count(config.boi_token_index)
    if count != len(images):
        raise PlaceholderError(
            f"the prompt has {count} placeholders (<start_of_image>, token {config.boi_token_index}) for {len(images)} "
            "images: write one for each; it is expanded here"
        )
    written = _Writer(words)
    ranges = []
    for token in inputs.prompt_token_ids:
        if token != config.boi_token_index:
            written.add(token)
            continue
        tokens = _tokens_of(ctx, images[len(ranges)])
        if tokens[0] == config.boi_token_index:
            written.add_newlines(2)
        is_row = tuple(token == config.image_token_index for token in tokens)
        ranges.append(PlaceholderRange(len(written.settle()), len(tokens), is_row))
        written.tokens.extend(tokens)
        written.add_newlines(2)
    return LLMInputs(
        prompt_token_ids=tuple(written.settle()),
        prompt=inputs.prompt,
        multi_modal_data=inputs.multi_modal_data,
        placeholders={**inputs.placeholders, "image": tuple(ranges)} if ranges else inputs.placeholders,
    )


def _tokens_of(ctx: InputContext, image: Any) -> tuple[int, ...]:
    rows = embedding_rows(image)
    if rows:
        config = _config(ctx)
        return (config.boi_token_index, *[config.image_token_index] * rows, config.eoi_token_index)
    return image_tokens(ctx, num_crops(ctx, (image.height, image.width)))


def _config(ctx: InputContext) -> Any:
    return ctx.get_hf_config(transformers.Gemma3Config)


class _Words:
    """Tokens of the text that comes with an image, and of newlines, which a tokenizer joins with their neighbours."""

    LONGEST = 32

    def __init__(self, tokens: Callable[[str], tuple[int, ...]]):
        self.before_whole = tokens("Here is the original image \n\n")
        self.before_crops = tokens("\n\n and here are some crops to help you see better \n\n")
        self.between_crops = tokens("\n\n \n\n")
        self._runs = [tokens("\n" * count) for count in range(self.LONGEST + 1)]
        self.counts = {run[0]: count for count, run in enumerate(self._runs) if len(run) == 1}
        """Newlines that a token stands for, of those that are newlines alone."""

    def newlines(self, count: int) -> tuple[int, ...]:
        """The tokens of so many newlines."""
        longest, rest = divmod(count, self.LONGEST)
        return self._runs[self.LONGEST] * longest + self._runs[rest]


@OncePerConfig
def words_of(model_config: ModelConfig) -> _Words:
    """The checkpoint's tokens of the texts round an image."""
    return _Words(text_tokens(model_config))


class _Writer:
    """Tokens of a prompt in the making; newlines that are added join those of the text, as where all is one text."""

    def __init__(self, words: _Words):
        self.tokens: list[int] = []
        self._words = words
        self._open: list[int] = []  # newline tokens of the text at the end
        self._added = 0

    def add(self, token: int) -> None:
        """Add a token of the text."""
        if token in self._words.counts:
            self._open.append(token)
        else:
            self.settle().append(token)

    def add_newlines(self, count: int) -> None:
        """Add newlines, to be joined with those before and behind them."""
        self._added += count

    def settle(self) -> list[int]:
        """All tokens so far; newlines that come later begin anew."""
        if self._added:
            self.tokens.extend(self._words.newlines(self._added + sum(self._words.counts[t] for t in self._open)))
        else:
            self.tokens.extend(self._open)
        self._open, self._added = [], 0
        return self.tokens


# The model.


class Gemma3Projector(nnx.Module):
    """Rows of the tower to fewer rows as wide as the language model."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        vision, kw = config.vision_config, {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.side = vision.image_size // vision.patch_size
        rows = math.isqrt(config.mm_tokens_per_image)
        if rows**2 != config.mm_tokens_per_image or self.side % rows:
            raise ConfigError(
                f"mm_tokens_per_image={config.mm_tokens_per_image} is not supported: {self.side} x {self.side} patches "
                "are averaged in equal squares"
            )
        self.pool = self.side // rows
        shape = (vision.hidden_size, config.text_config.hidden_size)
        self.mm_input_projection_weight = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, dtype))
        self.mm_soft_emb_norm = GemmaRMSNorm(vision.hidden_size, epsilon=vision.layer_norm_eps, **kw)

    def __call__(self, x: Float[Array, "B patches tower"]) -> Float[Array, "B rows D"]:
        """Averages of squares of patches, normed and projected."""
        squares = x.reshape(len(x), self.side // self.pool, self.pool, self.side // self.pool, self.pool, -1)
        rows = squares.mean(axis=(2, 4)).reshape(len(x), -1, x.shape[-1])
        return self.mm_soft_emb_norm(rows) @ self.mm_input_projection_weight[...]


@MULTIMODAL_REGISTRY.register_image_input_mapper(map_images)
@MULTIMODAL_REGISTRY.register_max_image_tokens(max_image_tokens)
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(expand_images)
class Gemma3ForConditionalGeneration(LlavaForConditionalGeneration):
    """Gemma 3 with images."""

    traits = ("image spans that see themselves", "pooled tower", "pan and scan")
    family = "Gemma 3"
    language_models: ClassVar[Mapping[str, str]] = {"gemma3_text": "Gemma3ForCausalLM"}
    media_shapes = staticmethod(media_shapes)

    def _make_parts(self, config, **kw):
        self.vision_tower = SiglipVisionModel(config.vision_config, **kw)
        self.multi_modal_projector = Gemma3Projector(config, **kw)

    @classmethod
    def mask_specs(cls, config) -> dict[str, MaskSpec]:
        """Those of the language model; images see themselves whole."""
        return Gemma3ForCausalLM.mask_specs(config.text_config, bidirectional=("image",))

    @staticmethod
    def placeholder_str(modality: str, index: int) -> str:
        """The text that stands for an item in a prompt."""
        return "<start_of_image>"

    def embed_multimodal(
        self,
        pixel_values: Float[Array, "items views C height width"] | Sequence[Float[Array, "views C h w"]] | None = None,
        image_embeds: Float[Array, "items rows D"] | None = None,
    ) -> dict[str, Sequence[Float[Array, "rows D"]]]:
        """Rows for each image, those of the whole before those of its crops; of different numbers in a sequence."""
        if image_embeds is not None:
            return {"image": list(image_embeds)}
        assert pixel_values is not None, "pixels or embeddings"
        return {"image": [self._rows(views) for views in pixel_values]}

    def _rows(self, views):
        return self.multi_modal_projector(self.vision_tower.last_hidden_state(views)).reshape(
            -1, self.config.text_config.hidden_size
        )
