"""Media through a family's input functions, and the shapes that come of it."""

import numpy as np
from PIL import Image

from aphrodite_jax.inputs import INPUT_REGISTRY, LLMInputs
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, InputContext
from aphrodite_jax.multimodal.context import model_class


def picture(size):
    """A black image of ``size`` (height, width)."""
    height, width = size
    return Image.new("RGB", (width, height))


def video(frames, height=20, width=30):
    """Black frames."""
    return np.zeros((frames, height, width, 3), np.uint8)


def processed(model_config, placeholders, text, images=(), videos=()):
    """A prompt through the input processor; its letters are tokens of ``placeholders``, or others."""
    media = {"image": list(images), "video": list(videos)}
    return INPUT_REGISTRY.process_input(
        model_config,
        LLMInputs(
            prompt_token_ids=[placeholders.get(letter, 5) for letter in text],
            multi_modal_data={modality: items for modality, items in media.items() if items},
        ),
    )


def mapped(model_config, modality, item):
    """The mapper's arrays of one item."""
    [item] = MULTIMODAL_REGISTRY.open_items(model_config, modality, [item])
    return dict(MULTIMODAL_REGISTRY.map_items(model_config, modality, [item]))


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
