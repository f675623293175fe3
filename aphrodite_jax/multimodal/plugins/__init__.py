"""What each modality knows of its items: telling them apart, opening them, default mapper and token bound."""

from aphrodite_jax.multimodal.plugins.audio import AudioPlugin
from aphrodite_jax.multimodal.plugins.base import MultiModalPlugin, embedding_rows
from aphrodite_jax.multimodal.plugins.image import ImagePlugin
from aphrodite_jax.multimodal.plugins.video import VideoPlugin

__all__ = ["AudioPlugin", "ImagePlugin", "MultiModalPlugin", "VideoPlugin", "embedding_rows"]
