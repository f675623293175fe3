"""Prompts to token ids: tokenizer, chat template, placeholders, and the registry of input processors."""

from aphrodite_jax.inputs.chat import render_chat
from aphrodite_jax.inputs.data import DummyData, LLMInputs, PlacedItem, PlaceholderRange
from aphrodite_jax.inputs.end_tokens import end_token_ids
from aphrodite_jax.inputs.placeholders import dummy_prompt, dummy_prompt_of, expand_items, expand_placeholders
from aphrodite_jax.inputs.registry import INPUT_REGISTRY, InputRegistry
from aphrodite_jax.inputs.tokenizer import load_tokenizer, text_tokens
from aphrodite_jax.multimodal.context import InputContext

__all__ = [
    "INPUT_REGISTRY",
    "DummyData",
    "InputContext",
    "InputRegistry",
    "LLMInputs",
    "PlacedItem",
    "PlaceholderRange",
    "dummy_prompt",
    "dummy_prompt_of",
    "end_token_ids",
    "expand_items",
    "expand_placeholders",
    "load_tokenizer",
    "render_chat",
    "text_tokens",
]
