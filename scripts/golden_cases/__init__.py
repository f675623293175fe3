"""The models whose answers are stored as goldens: a module for each family, with its ``CASES``.

A family is added by a module here; `scripts/make_goldens.py` does the rest. Needs torch.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

__all__ = ["Case", "all_cases", "load_image_processor"]

ReferenceInputs = Callable[
    [Path, list[int], list[np.ndarray], list[np.ndarray]], tuple[list[int], dict[str, "torch.Tensor"]]  # noqa: F821
]


def _text_alone(directory: Path, prompt: list[int], pictures, videos) -> tuple[list[int], dict]:
    return prompt, {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One model by its config, and prompts to it.

    Attributes:
      config: ``config.json``, with ``architectures``; its ``image_token_id`` is ``checkpoints.IMAGE_TOKEN``.
      prompts: (tokens of text, images) or (tokens of text, images, videos) each. Images are a number of them at the
        usual size, or a list of (height, width); videos a list of (frames, height, width).
      unlike: a config that must give other logits with the same weights: else the case would show nothing.
      reference_inputs: ``(directory, prompt, images, videos)`` to the expanded token ids and the other keywords of
        Hugging Face's model, as tensors. Images and videos are uint8 ``[height, width, 3]`` and ``[frames, ...]``.
      files: JSON files of the directory by name, ``preprocessor_config.json`` for one.
      special_tokens: text to id of placeholders and the like, beside ``<image>``; all at the end of the vocabulary.
      placeholders: modality to the token that stands for an item in a prompt, where it is not that of its rows.
      around: modality to token ids that a prompt has before and behind the placeholder of an item.
      hub_names: (pattern, replacement) from the names that transformers holds in memory to those of hub files, where
        they differ; for families whose tensors are listed from the reference (`checkpoints.weights`).
    """

    config: dict
    prompts: tuple[tuple, ...]
    unlike: dict | None = None
    reference_inputs: ReferenceInputs = _text_alone
    files: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    special_tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    placeholders: Mapping[str, int] = dataclasses.field(default_factory=dict)
    around: Mapping[str, tuple[Sequence[int], Sequence[int]]] = dataclasses.field(default_factory=dict)
    hub_names: tuple[tuple[str, str], ...] = ()


@functools.cache
def all_cases() -> dict[str, Case]:
    """Every case of every module here, by name."""
    cases: dict[str, Case] = {}
    for module in pkgutil.iter_modules(__path__):
        found = importlib.import_module(f"{__name__}.{module.name}").CASES
        if twice := set(found) & set(cases):
            raise ValueError(f"two modules have a case {', '.join(sorted(twice))}")
        cases |= found
    return cases


def load_image_processor(directory: Path):
    """Hugging Face's image processor of a checkpoint, without torchvision."""
    return transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
