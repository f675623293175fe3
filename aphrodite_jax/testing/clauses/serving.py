"""Clauses about the model in an engine: one is started for all of them."""

from collections.abc import Sequence

import numpy as np
import scipy.special
from hypothesis import strategies as st

from aphrodite_jax.testing.clauses.inputs import any_item
from aphrodite_jax.testing.search import Broken, search
from aphrodite_jax.testing.served import ANSWER_TOKENS, Answer
from aphrodite_jax.testing.strategies import Arrival, Request, arrivals
from aphrodite_jax.testing.subject import LONGEST_TEXT, Subject

__all__ = ["nothing_compiles_late", "nothing_unwritten_is_read", "the_engine_agrees"]

TOLERANCE = 1e-3
"""Of log-probabilities that must be equal but for the order of sums."""


def the_engine_agrees(subject: Subject) -> None:
    """answers are the same in chunks, in batches and in any order"""

    def check_answers(schedule):
        schedule = _fitting(subject, schedule)
        requests = [request for _, request in schedule]
        alone = [subject.served.answers([(0, request)])[0] for request in requests]
        for request, answer in zip(requests, alone, strict=True):
            _compare_with_whole(subject, request, answer)
        for order in (schedule, schedule[::-1]):
            expected = alone if order is schedule else alone[::-1]
            for found, one in zip(subject.served.answers(order), expected, strict=True):
                if not found.equals(one, TOLERANCE):
                    raise Broken("in a batch a prompt has other logits than alone")

    # In several chunks, while a short one is answered.
    check_answers([(0, ((5, 6, 7), {})), (1, _largest(subject))])
    search(_schedules(subject), check_answers, most=min(subject.max_examples, 3))


def nothing_compiles_late(subject: Subject) -> None:
    """nothing compiles after the start: no program of the engine's, and nothing that the input functions call

    Items are encoded in every declared shape. Prompts have items of every shape that hypothesis finds, and lengths on
    both sides of a tile and of a page.
    """
    programs = subject.served.programs
    tokens = subject.text_tokens

    def check_programs(schedule):
        with programs.compiled_beside() as names:
            subject.served.run(_fitting(subject, schedule))
        _check_none(programs.late, names)

    with programs.compiled_beside() as names:
        for shapes in subject.model_cls.media_shapes(subject.context):
            subject.served.encode_shape(shapes)
    _check_none(programs.late, names)
    for length in (1, 2, 8, 9, 16, 17, LONGEST_TEXT):
        check_programs([(0, (tuple(tokens[index % len(tokens)] for index in range(length)), {}))])
    search(_one_item(subject), check_programs, most=subject.max_examples)
    search(_schedules(subject), check_programs, most=min(subject.max_examples, 3))


def nothing_unwritten_is_read(subject: Subject) -> None:
    """answers do not depend on what stands in pages and rows of the caches that a request has not written

    NaN stands there: attention reads no slot that no row sees, whatever is in it, and the caches' rows are selected.
    """

    def check_caches(schedule):
        schedule = _fitting(subject, schedule)
        clean = subject.served.answers(schedule)
        subject.served.spoil_caches(np.nan)
        try:
            spoilt = subject.served.answers(schedule)
        finally:
            subject.served.spoil_caches(0.0)
        for before, after in zip(clean, spoilt, strict=True):
            if not after.equals(before, TOLERANCE) or after.token_ids != before.token_ids:
                raise Broken("with NaN in unwritten pages and rows a prompt has other logits")

    check_caches([(0, ((5, 6, 7), {})), (1, _largest(subject))])
    search(_schedules(subject), check_caches, most=min(subject.max_examples, 2))


def _check_none(late: list[str], beside: list[str]) -> None:
    if late:
        raise Broken(f"the engine compiled late: {', '.join(dict.fromkeys(late))}")
    if beside:
        raise Broken(
            f"{', '.join(dict.fromkeys(beside))} compiled beside the engine's programs: what mappers, processors, "
            "pad_media and prompt_positions compute is NumPy's"
        )


def _compare_with_whole(subject: Subject, request: Request, answer: Answer) -> None:
    """Raise `Broken` unless one call over prompt and answer says the same."""
    logits = subject.plain.logits(request, answer=answer.token_ids[:-1])
    length = len(answer.prompt_logprobs)  # of all tokens of the prompt but the first
    targets = np.asarray(subject.process(request).prompt_token_ids[1:], int)
    whole = logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    if not np.allclose(answer.prompt_logprobs, whole[np.arange(length), targets], atol=TOLERANCE):
        raise Broken("in chunks a prompt has other logits than whole")
    chosen = whole[length + np.arange(ANSWER_TOKENS), np.asarray(answer.token_ids)]
    if not np.all(chosen >= whole[length:].max(axis=-1) - TOLERANCE):
        raise Broken(f"{list(answer.token_ids)} is not the greedy answer of one call over prompt and answer")


def _schedules(subject: Subject) -> st.SearchStrategy[list[Arrival]]:
    return arrivals(subject.requests, most=2)


def _one_item(subject: Subject) -> st.SearchStrategy[list[Arrival]]:
    """A request with one item."""

    def schedule(example) -> list[Arrival]:
        modality, item = example
        return [(0, ((5, subject.placeholders[modality], 6), {modality: [item]}))]

    return any_item(subject).map(schedule)


def _largest(subject: Subject) -> Request:
    """A prompt with as many of the dummy data's items as leave room for text and an answer."""
    tokens, media = [5], {}
    for modality, items in subject.dummy.multi_modal_data.items():
        for item in items:
            more = {**media, modality: [*media.get(modality, ()), item]}
            if _fits(subject, ((*tokens, subject.placeholders[modality], 6, 7), more)):
                tokens, media = [*tokens, subject.placeholders[modality]], more
    return (*tokens, 6, 7), media


def _fitting(subject: Subject, schedule: Sequence[Arrival]) -> list[Arrival]:
    """Those that the model's length has room for."""
    return [arrival for arrival in schedule if _fits(subject, arrival[1])]


def _fits(subject: Subject, request: Request) -> bool:
    return len(subject.process(request).prompt_token_ids) + ANSWER_TOKENS < subject.model_config.context_length
