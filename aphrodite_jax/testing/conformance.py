"""`check_multimodal_model`: whether a model class keeps to all that its registration promises."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import transformers
from hypothesis.strategies import SearchStrategy

from aphrodite_jax.errors import ConfigError
from aphrodite_jax.inputs import INPUT_REGISTRY
from aphrodite_jax.modeling.models.interfaces import SupportsMultiModal, supports_multimodal
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY
from aphrodite_jax.testing.clauses import GROUPS, Clause
from aphrodite_jax.testing.search import Broken
from aphrodite_jax.testing.subject import Subject, open_subject

__all__ = ["CLAUSES", "Broken", "ConformanceError", "Reference", "check_multimodal_model"]

COMPLETE = "the registration is complete"


def _sentence(clause: Clause) -> str:
    return (clause.__doc__ or "").partition("\n")[0]


CLAUSES: Mapping[str, str] = MappingProxyType(
    {clause.__name__: _sentence(clause) for clauses in GROUPS for clause in clauses}
)
"""Names of the clauses, in the order in which they are asked, and what they say."""
Reference = Callable[[str, np.ndarray, dict[str, Any]], np.ndarray]
"""Another implementation: checkpoint directory, token ids ``[T]`` and mappers' arrays to logits ``[T, V]``."""


class ConformanceError(AssertionError):
    """Clauses that a model class breaks; ``broken`` has what each says, with what was found."""

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
    clauses: Iterable[str] | None = None,
) -> None:
    """Ask every clause of `CLAUSES`, with random weights and two items of each modality in a prompt at most.

    The clauses come in groups: input functions, model, engine. Of the groups the first that a clause is broken in is
    told, and those behind it are not asked. Numbers that must be equal are so within what float32 allows on CPU.

    Args:
      model_cls: decorated as for use; its name need not be registered as an architecture.
      hf_config: a tiny config that `transformers.AutoConfig` can read again. Two of the largest items of each modality
        and some twenty tokens of text must fit in its length.
      strategies: modality to a hypothesis strategy of items, as a user gives them; `images` and `videos` are the usual.
      placeholders: modality to the token that stands for an item in a prompt, where the config does not tell it as
        ``image_token_id`` or ``image_token_index``.
      files: JSON files of the checkpoint by name, ``preprocessor_config.json`` for one.
      tokenizer: of the checkpoint; one of bytes is the usual.
      reference: another implementation, whose logits must be equal: ``(directory, token_ids [T], arrays)`` to float32
        ``[T, V]``, with the checkpoint's directory, the processed tokens and the mapper's arrays of all items.
      max_examples: that a clause tries at most; one that needs a program for each shape tries fewer.
      clauses: names of those to ask, to come back to one that is broken; None asks all.

    Raises:
      ConformanceError: names every clause of a group that is broken, each with the smallest example.
      ConfigError: a clause that there is not, or what stands for an item is nowhere told.
    """
    asked = set(CLAUSES if clauses is None else clauses)
    if unknown := sorted(asked - set(CLAUSES)):
        raise ConfigError(f"there is no clause {', '.join(unknown)}; there are {', '.join(CLAUSES)}")
    if missing := _missing_registrations(model_cls):
        raise ConformanceError(model_cls, {COMPLETE: "; ".join(missing)})
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
        groups = ([clause for clause in group if clause.__name__ in asked] for group in GROUPS)
        broken = next(filter(None, (_ask(subject, group) for group in groups)), None)
    if broken:
        raise ConformanceError(model_cls, broken)


def _ask(subject: Subject, clauses: Sequence[Clause]) -> dict[str, str]:
    broken = {}
    for clause in clauses:
        try:
            clause(subject)
        except Broken as error:
            broken[_sentence(clause)] = str(error)
        except Exception as error:  # the model's own functions may fail in any way
            broken[_sentence(clause)] = f"{type(error).__name__}: {error}"
    return broken


def _missing_registrations(model_cls: Any) -> list[str]:
    """What a class lacks of a registration, in words."""
    missing = []
    if not supports_multimodal(model_cls):
        missing.append("it is no SupportsMultiModal")
    elif model_cls.embed_multimodal is SupportsMultiModal.embed_multimodal:
        missing.append("it has no embed_multimodal")
    modalities = MULTIMODAL_REGISTRY.modalities(model_cls)
    if not modalities:
        missing.append("it has no input mapper: decorate it with MULTIMODAL_REGISTRY.register_image_input_mapper()")
    for modality in modalities:
        if not MULTIMODAL_REGISTRY.has_bound(model_cls, modality):
            missing.append(f"it has no bound of {modality} tokens: register_max_{modality}_tokens(...)")
    if not INPUT_REGISTRY.has_input_processor(model_cls):
        missing.append("it has no input processor: INPUT_REGISTRY.register_input_processor(...)")
    if not INPUT_REGISTRY.has_dummy_data(model_cls):
        missing.append("it has no dummy data: INPUT_REGISTRY.register_dummy_data(...)")
    return missing
