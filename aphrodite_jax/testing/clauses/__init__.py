"""What a right registration keeps to: one function a clause, which raises `Broken` with the smallest example it finds.

A clause is tried on items and prompts that hypothesis makes up. They come in groups: a later one is asked where all of
those before hold, without which it would fail for their reasons. The sentence that a clause begins with is its name in
reports.
"""

from collections.abc import Callable, Sequence

from aphrodite_jax.testing.clauses.inputs import (
    arrays_fit_the_call,
    bound_is_a_bound,
    dummy_data_are_the_largest,
    mapper_is_pure,
    placeholders_are_rows,
    processor_is_pure,
    shapes_are_declared,
    text_alone_works,
)
from aphrodite_jax.testing.clauses.model import (
    dummy_data_need_the_most_memory,
    equals_the_reference,
    items_are_encoded_apart,
    padding_changes_no_row,
    pixels_reach_the_logits,
    rows_see_what_is_declared,
    the_call_encodes_as_the_encoder,
)
from aphrodite_jax.testing.clauses.serving import (
    nothing_compiles_late,
    nothing_unwritten_is_read,
    the_engine_agrees,
)
from aphrodite_jax.testing.subject import Subject

__all__ = ["GROUPS", "Clause"]

Clause = Callable[[Subject], None]

GROUPS: Sequence[Sequence[Clause]] = (
    (
        mapper_is_pure,
        arrays_fit_the_call,
        processor_is_pure,
        text_alone_works,
        placeholders_are_rows,
        bound_is_a_bound,
        dummy_data_are_the_largest,
        shapes_are_declared,
    ),
    (
        dummy_data_need_the_most_memory,
        padding_changes_no_row,
        items_are_encoded_apart,
        the_call_encodes_as_the_encoder,
        pixels_reach_the_logits,
        rows_see_what_is_declared,
        equals_the_reference,
    ),
    (
        the_engine_agrees,
        nothing_compiles_late,
        nothing_unwritten_is_read,
    ),
)
"""What mapper, processor and bound make of items; what the model makes of their arrays; what the engine makes of it."""
