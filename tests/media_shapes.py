"""Shapes of a mapped item's arrays, and those that a family says are all there are."""

import numpy as np

from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, InputContext
from aphrodite_jax.multimodal.context import model_class


def padded_shapes(model_config, modality, items):
    """Shapes and dtypes of the arrays of each item, as `pad_media` leaves them; each once."""
    model_cls, found = model_class(model_config), set()
    for item in MULTIMODAL_REGISTRY.open_items(model_config, modality, items):
        mapped = MULTIMODAL_REGISTRY.map_items(model_config, modality, [item])
        found.add(_key(model_cls.pad_media(model_config.hf_config, {k: np.asarray(x) for k, x in mapped.items()})))
    return found


def declared_shapes(model_config):
    """What the model's ``media_shapes`` has, in the same form."""
    return {_key(shapes) for shapes in model_class(model_config).media_shapes(InputContext(model_config))}


def _key(arrays):
    return tuple((name, tuple(x.shape), str(x.dtype)) for name, x in sorted(arrays.items()))
