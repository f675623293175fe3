"""Clauses about mapper, processor, bound and dummy data: the host's side, in which no program runs."""

import inspect
import pickle
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from aphrodite_jax.inputs import LLMInputs
from aphrodite_jax.multimodal import content_hash
from aphrodite_jax.testing.plain_model import shape_key, shapes_of
from aphrodite_jax.testing.search import Broken, search
from aphrodite_jax.testing.subject import Subject

__all__ = [
    "any_item",
    "arrays_fit_the_call",
    "bound_is_a_bound",
    "dummy_arrays",
    "dummy_data_are_the_largest",
    "mapper_is_pure",
    "placeholders_are_rows",
    "processor_is_pure",
    "shapes_are_declared",
    "text_alone_works",
]

DTYPES = ("float32", "int32", "bool", "uint8")
"""Of arrays that mappers may give."""


def any_item(subject: Subject) -> st.SearchStrategy[tuple[str, Any]]:
    """A modality and an item of it."""
    return st.one_of(*(st.tuples(st.just(modality), strategy) for modality, strategy in subject.items.items()))


def dummy_arrays(subject: Subject) -> list[dict[str, np.ndarray]]:
    """Padded arrays of one dummy item of each modality."""
    return [
        subject.pad(subject.map(modality, item))
        for modality, items in subject.dummy.multi_modal_data.items()
        for item in items[:1]
    ]


def mapper_is_pure(subject: Subject) -> None:
    """the mapper is pure: same item, same arrays; the item and the global state of random numbers are left alone"""

    def check_mapper(example):
        modality, item = example
        opened = subject.open(modality, item)
        before, state = content_hash(opened), _random_state()
        first = subject.map(modality, opened)
        if content_hash(opened) != before:
            raise Broken("the mapper changes its item in place")
        if _random_state() != state:
            raise Broken("the mapper draws from the global state of random numbers")
        second = subject.map(modality, opened)
        if first.keys() != second.keys() or any(not _same(first[name], second[name]) for name in first):
            raise Broken("the mapper gives other arrays for the same item when it is called again")

    search(any_item(subject), check_mapper, most=subject.max_examples)


def arrays_fit_the_call(subject: Subject) -> None:
    """the mapper's arrays fit __call__ and embed_multimodal: their keywords, one item on axis 0, plain dtypes"""
    parameters = {
        name: inspect.signature(getattr(subject.model_cls, name)).parameters
        for name in ("__call__", "embed_multimodal")
    }

    def check_arrays(example):
        modality, item = example
        for keyword, array in subject.map(modality, subject.open(modality, item)).items():
            for name, known in parameters.items():
                takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
                if keyword not in known and not takes_any:
                    raise Broken(f"the mapper gives {keyword!r}, which {name} does not take")
            if array.dtype.name not in DTYPES:
                raise Broken(f"{keyword} is {array.dtype}; expected one of {', '.join(DTYPES)}")
            if array.ndim == 0 or len(array) != 1:
                raise Broken(f"{keyword} of one item has the shape {list(array.shape)}: axis 0 is the items")

    search(any_item(subject), check_arrays, most=subject.max_examples)


def processor_is_pure(subject: Subject) -> None:
    """the input processor is pure: same request, same result; what it is given is left alone"""

    def check_processor(request):
        tokens, media = request
        before = content_hash(_plain(media))
        first, second = subject.process(request), subject.process((tokens, media))
        if content_hash(_plain(media)) != before:
            raise Broken("the input processor changes its items in place")
        if first.prompt_token_ids != second.prompt_token_ids or first.placeholders != second.placeholders:
            raise Broken("the input processor gives another result for the same request when it is called again")

    search(subject.requests, check_processor, most=subject.max_examples)


def text_alone_works(subject: Subject) -> None:
    """a prompt of text alone is processed, and keeps its tokens"""

    def check_text(tokens):
        processed = subject.process((tuple(tokens), {}))
        if any(token not in processed.prompt_token_ids for token in tokens) or any(processed.placeholders.values()):
            raise Broken(f"of the tokens {tokens} the processor makes {list(processed.prompt_token_ids)}")

    texts = st.lists(st.sampled_from(subject.text_tokens), min_size=1, max_size=6)
    search(texts, check_text, most=subject.max_examples)


def placeholders_are_rows(subject: Subject) -> None:
    """each item has as many placeholder tokens as the model makes rows of it, in the order of the items"""

    def check_placeholders(request):
        processed = subject.process(request)
        for modality, items in processed.multi_modal_data.items():
            spans = processed.placeholders.get(modality, ())
            if list(spans) != sorted(spans, key=lambda span: span.offset):
                raise Broken(f"the ranges of {modality} items are not in the order of their places: {spans}")
            for index, (item, span) in enumerate(zip(items, spans, strict=True)):
                rows = subject.plain.rows(subject.map(modality, item)).get(modality, ())
                if rows != (span.num_rows,):
                    raise Broken(
                        f"{modality} {index} has {span.num_rows} placeholder tokens, the model makes {rows} rows of it"
                    )

    search(subject.requests, check_placeholders, most=subject.max_examples)


def bound_is_a_bound(subject: Subject) -> None:
    """no item takes more tokens than the registered bound"""

    def check_bound(processed: LLMInputs):
        for modality, spans in processed.placeholders.items():
            for span in spans:
                if span.length > subject.bounds[modality]:
                    raise Broken(f"a {modality} takes {span.length} tokens, the bound is {subject.bounds[modality]}")

    def check_request(request):
        check_bound(subject.process(request))

    check_bound(subject.dummy)
    search(subject.requests, check_request, most=subject.max_examples)


def dummy_data_are_the_largest(subject: Subject) -> None:
    """the dummy data hold as many items as allowed, each of as many tokens as the bound, and fit the model's length

    Where the model's length has no room for so many of the largest items, they may be smaller: a bound is that of an
    item which is alone in its prompt.
    """
    dummy = subject.dummy
    if len(dummy.prompt_token_ids) > subject.model_config.context_length:
        raise Broken(
            f"processed, the dummy prompt has {len(dummy.prompt_token_ids)} tokens; the model takes "
            f"{subject.model_config.context_length}"
        )
    for modality, limit in subject.limits.items():
        spans = dummy.placeholders.get(modality, ())
        if len(spans) != limit:
            raise Broken(f"the dummy data hold {len(spans)} {modality} items where a prompt may hold {limit}")
        lengths = {span.length for span in spans}
        if lengths != {subject.bounds[modality]} and subject.has_room_for_largest:
            raise Broken(
                f"dummy {modality} items take {sorted(lengths)} tokens, the bound is {subject.bounds[modality]}: it is "
                "never reached, or the dummy items are not the largest"
            )


def shapes_are_declared(subject: Subject) -> None:
    """every item is encoded in a shape of the dummy data or of media_shapes, so that nothing compiles late"""
    shapes = [*map(shapes_of, dummy_arrays(subject)), *subject.model_cls.media_shapes(subject.context)]
    declared = set(map(shape_key, shapes))

    def check_shapes(example):
        modality, item = example
        padded = subject.pad(subject.map(modality, subject.open(modality, item)))
        if shape_key(padded) not in declared:
            found = ", ".join(f"{name} {list(array.shape)}" for name, array in padded.items())
            raise Broken(f"an item is encoded as {found}, which neither media_shapes nor the dummy data have")

    search(any_item(subject), check_shapes, most=subject.max_examples)


def _random_state() -> bytes:
    """The state of the global generators."""
    return pickle.dumps((random.getstate(), np.random.get_state()))


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _plain(media: Mapping[str, list]) -> dict[str, list]:
    return {modality: list(items) for modality, items in media.items()}
