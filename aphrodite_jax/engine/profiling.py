"""The largest legal prompt, from a model's registered dummy data, through the same functions as any request."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import RegistrationError
from aphrodite_jax.inputs import INPUT_REGISTRY, InputContext, LLMInputs
from aphrodite_jax.modeling.item_rows import RowsPerItem
from aphrodite_jax.modeling.models.interfaces import supports_multimodal
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY
from aphrodite_jax.multimodal.context import model_class

__all__ = ["media_shapes", "media_tokens_per_prompt"]


def media_tokens_per_prompt(model_config: ModelConfig) -> int:
    """Rows that the media of one prompt at its limits take; 0 for a text model."""
    return MULTIMODAL_REGISTRY.get_max_multimodal_tokens(model_config)


def media_shapes(
    model_config: ModelConfig, rows_per_item: RowsPerItem
) -> tuple[Mapping[str, jax.ShapeDtypeStruct], ...]:
    """Shapes of the padded arrays of one item: of the dummy items, and those of the model's ``media_shapes``.

    Raises:
      RegistrationError: the dummy data, the input processor, the token bound and the model disagree, or the mappers
        of two modalities give one keyword.
    """
    model_cls: Any = model_class(model_config)
    if not supports_multimodal(model_cls):
        return ()

    dummy = INPUT_REGISTRY.dummy_data_for_profiling(model_config, model_config.context_length, MULTIMODAL_REGISTRY)
    processed = INPUT_REGISTRY.process_input(
        model_config, LLMInputs(prompt_token_ids=dummy.prompt_token_ids, multi_modal_data=dummy.multi_modal_data)
    )
    MULTIMODAL_REGISTRY.check_keywords(
        model_config,
        {
            modality: MULTIMODAL_REGISTRY.map_items(model_config, modality, parts[:1])
            for modality, parts in processed.multi_modal_data.items()
        },
    )
    bounds = MULTIMODAL_REGISTRY.max_tokens_per_item(model_config)
    found: dict[tuple, Mapping[str, jax.ShapeDtypeStruct]] = {}

    def keep(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        found[tuple((name, x.shape, str(x.dtype)) for name, x in sorted(shapes.items()))] = shapes

    for modality, parts in processed.multi_modal_data.items():
        for item, placeholder in zip(parts, processed.placeholders[modality], strict=True):
            mapped = MULTIMODAL_REGISTRY.map_items(model_config, modality, [item])
            mm_kwargs = {name: np.asarray(array) for name, array in mapped.items()}
            rows = sum(rows_per_item(mm_kwargs).get(modality, ()))
            if rows != placeholder.num_rows or placeholder.length > bounds[modality]:
                raise RegistrationError(
                    f"{model_cls.__name__}: a dummy {modality} has {placeholder.num_rows} placeholder tokens among "
                    f"{placeholder.length}, the model makes {rows} rows of it, and the registered bound is "
                    f"{bounds[modality]} tokens: they must agree"
                )
            padded = model_cls.pad_media(model_config.hf_config, mm_kwargs)
            keep({name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in padded.items()})
    for shapes in model_cls.media_shapes(InputContext(model_config)):
        keep(shapes)
    return tuple(found.values())
