"""Audio: mono waveforms with their sampling rate, mapped by the checkpoint's Hugging Face feature extractor."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import MediaError
from aphrodite_jax.multimodal.context import InputContext
from aphrodite_jax.multimodal.hf_processors import audio_processor, items_of
from aphrodite_jax.multimodal.inputs import MultiModalInputs, as_array
from aphrodite_jax.multimodal.plugins.base import (
    MultiModalPlugin,
    check_embeddings,
    is_floating,
    is_stack_of_embeddings,
)

__all__ = ["AudioPlugin"]


class AudioPlugin(MultiModalPlugin):
    """An item is ``(waveform, sampling rate)``, or embeddings ``[rows, D]``."""

    modality = "audio"

    def split(self, data: Any, model_config: ModelConfig) -> tuple[Any, ...]:
        """As the base, but that one ``(waveform, sampling rate)`` is one item."""
        array = as_array(data)
        if array is not None and is_stack_of_embeddings(array, model_config):
            return tuple(array)
        return (data,) if _is_waveform(data) else super().split(data, model_config)

    def open(self, item: Any, model_config: ModelConfig) -> Any:
        """A float32 waveform ``[samples]`` in [-1, 1] with its rate in hertz; or float32 embeddings."""
        array = as_array(item)
        if array is not None and array.ndim == 2 and is_floating(array):
            return check_embeddings(array, model_config, self.modality, "a recording is (waveform, sampling rate)")
        if not _is_waveform(item):
            raise MediaError(
                "an audio item is (waveform, sampling rate): an array [samples] and a number of hertz; "
                f"got {type(item).__name__}"
            )
        waveform, rate = np.asarray(item[0]), item[1]
        if not 1 <= rate < np.inf or rate != int(rate):
            raise MediaError(f"a sampling rate is a whole number of hertz above 0, got {rate}")
        if waveform.dtype.kind == "i":
            waveform = waveform.astype(np.float32) / -float(np.iinfo(waveform.dtype).min)
        if waveform.ndim != 1 or not is_floating(waveform) or not waveform.size or not np.isfinite(waveform).all():
            raise MediaError(
                f"a waveform is mono [samples], float in [-1, 1] or signed integers, got {waveform.dtype}"
                f"{list(waveform.shape)} (average the channels of a stereo recording)"
            )
        return waveform.astype(np.float32), int(rate)

    def default_mapper(self, ctx: InputContext, items: Sequence[tuple[np.ndarray, int]]) -> MultiModalInputs:
        """``input_features`` or what the feature extractor calls them."""
        processor = audio_processor(ctx.model_config)
        rates = {rate for _, rate in items}
        if rates - {processor.sampling_rate}:
            raise MediaError(f"the model hears {processor.sampling_rate} Hz, got {sorted(rates)}: resample beforehand")
        features = processor(
            [waveform for waveform, _ in items], sampling_rate=processor.sampling_rate, return_tensors="np"
        )
        return items_of(features, len(items), "the audio feature extractor")

    def default_max_tokens(self, ctx: InputContext) -> int:
        """``audio_seq_length`` of the config."""
        length = getattr(ctx.get_hf_config(), "audio_seq_length", None)
        return length if isinstance(length, int) else super().default_max_tokens(ctx)


def _is_waveform(data: Any) -> bool:
    return (
        isinstance(data, list | tuple)
        and len(data) == 2
        and as_array(data[0]) is not None
        and isinstance(data[1], int | float | np.integer)
        and not isinstance(data[1], bool)
    )
