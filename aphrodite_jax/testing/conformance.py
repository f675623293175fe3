"""`check_multimodal_model`: whether a model class keeps to all that its registration promises."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import transformers
from hypothesis.strategies import SearchStrategy

from aphrodite_jax.testing.clauses import GROUPS, Broken, missing_registrations
from aphrodite_jax.testing.subject import open_subject

__all__ = ["Broken", "ConformanceError", "check_multimodal_model"]


Reference = Callable[[str, np.ndarray, dict[str, Any]], np.ndarray]


class ConformanceError(AssertionError):
    """Clauses that a model class breaks; ``broken`` has the name of each with what was found."""

    def __init__(self, model_cls: type, broken: Mapping[str, str]):
        self.broken = dict(broken)
        lines = "\n".join(f"  - {clause}\n    {found}" for clause, found in self.broken.items())
        super().__init__(f"{model_cls.__name__} breaks {len(self.broken)} of what its registration promises:\n{lines}")


def check_multimodal_model(
    model_cls: type,
    hf_config: transformers.PretrainedConfig,
    *,
    strategies: Mapping[str, SearchStrategy] | None = None,
    placeholders: Mapping[str, int] | None = None,
    files: Mapping[str, Any] | None = None,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    reference: Reference | None = None,
    max_examples: int = 20,
) -> None:
    """Ask every clause of `aphrodite_jax.testing.clauses`, on CPU, with random weights.

    Args:
      model_cls: decorated as for use; its name need not be registered as an architecture.
      hf_config: a tiny config that `transformers.AutoConfig` can read again.
      strategies: modality to a hypothesis strategy of items, as a user gives them; `images` and `videos` are the usual.
      placeholders: modality to the token that stands for an item in a prompt, where the config does not tell it as
        ``image_token_id`` or ``image_token_index``.
      files: JSON files of the checkpoint by name, ``preprocessor_config.json`` for one.
      tokenizer: of the checkpoint; one of bytes is the usual.
      reference: another implementation, whose logits must be equal: ``(directory, token_ids [T], arrays)`` to float32
        ``[T, V]``, with the checkpoint's directory, the processed tokens and the mapper's arrays of all items.
      max_examples: that a clause tries at most.

    Raises:
      ConformanceError: names every clause that is broken, each with the smallest example.
    """
    missing = missing_registrations(model_cls)
    if missing:
        raise ConformanceError(model_cls, {"the registration is complete": "; ".join(missing)})
    with open_subject(
        model_cls,
        hf_config,
        strategies=strategies,
        placeholders=placeholders,
        files=files or {},
        tokenizer=tokenizer,
        max_examples=max_examples,
        reference=reference,
    ) as subject:
        broken = next(filter(None, (_ask(subject, clauses) for clauses in GROUPS)), None)
    if broken:
        raise ConformanceError(model_cls, broken)


def _ask(subject: Any, clauses: Sequence) -> dict[str, str]:
    broken = {}
    for clause in clauses:
        try:
            clause(subject)
        except Broken as error:
            broken[clause.__doc__] = str(error)
        except Exception as error:  # the model's own functions may fail in any way
            broken[clause.__doc__] = f"{type(error).__name__}: {error}"
    return broken
