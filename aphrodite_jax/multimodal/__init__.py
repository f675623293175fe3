"""Media to arrays: opening, hashing, mapping, and the registry of what a model class takes."""

from aphrodite_jax.multimodal.context import InputContext
from aphrodite_jax.multimodal.hashing import content_hash
from aphrodite_jax.multimodal.inputs import MultiModalInputs
from aphrodite_jax.multimodal.media import open_image
from aphrodite_jax.multimodal.plugins import MultiModalPlugin, embedding_rows
from aphrodite_jax.multimodal.registry import MultiModalRegistry, default_registry
from aphrodite_jax.multimodal.video import Video

MULTIMODAL_REGISTRY = default_registry()

__all__ = [
    "MULTIMODAL_REGISTRY",
    "InputContext",
    "MultiModalInputs",
    "MultiModalPlugin",
    "MultiModalRegistry",
    "Video",
    "content_hash",
    "embedding_rows",
    "open_image",
]
