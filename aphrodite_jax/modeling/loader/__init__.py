"""Hugging Face checkpoints to nnx parameters and back."""

from aphrodite_jax.modeling.loader.load import load_model, resolve_dtype
from aphrodite_jax.modeling.loader.save import save_pretrained
from aphrodite_jax.modeling.loader.weight_rules import WeightRule

__all__ = ["WeightRule", "load_model", "resolve_dtype", "save_pretrained"]
