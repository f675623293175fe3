"""Clauses about what the model makes of arrays, called without an engine."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageOps

from aphrodite_jax.engine.admission import prompt_intervals
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, Video, content_hash
from aphrodite_jax.testing.clauses.inputs import any_item, dummy_arrays
from aphrodite_jax.testing.plain_model import shape_key
from aphrodite_jax.testing.search import Broken, describe, search
from aphrodite_jax.testing.subject import Subject
from kernels_pallas.intervals import to_mask

__all__ = [
    "dummy_data_need_the_most_memory",
    "equals_the_reference",
    "items_are_encoded_apart",
    "padding_changes_no_row",
    "pixels_reach_the_logits",
    "rows_see_what_is_declared",
    "the_call_encodes_as_the_encoder",
]

TOLERANCE = 1e-4
"""Of float32 rows and logits that must be equal but for the order of sums."""
MOVED = 1e-6
"""What a logit that moves moves at least."""
MOST_SHAPES = 2
"""In which a clause encodes items of a modality at most where it needs programs for each."""


class _FewShapes:
    """Keeps the first shapes of each modality, and turns others away."""

    def __init__(self):
        self._kept: dict[str, set[tuple]] = {}

    def has(self, modality: str, key: tuple) -> bool:
        kept = self._kept.setdefault(modality, set())
        if len(kept) < MOST_SHAPES:
            kept.add(key)
        return key in kept


def dummy_data_need_the_most_memory(subject: Subject) -> None:
    """no declared shape needs more memory to encode than the dummy data, by the compiler's own count

    Unless dummy items must be smaller than others, `dummy_data_are_the_largest`.
    """
    if not subject.has_room_for_largest:
        return
    most = max(map(subject.plain.encode_bytes, dummy_arrays(subject)))
    declared = sorted(subject.model_cls.media_shapes(subject.context), key=_num_values)
    for shapes in declared[-2:]:
        found = subject.plain.encode_bytes(shapes)
        if found > most:
            raise Broken(f"{shape_key(shapes)} needs {found} bytes to encode, the largest dummy item {most}")


def padding_changes_no_row(subject: Subject) -> None:
    """what pad_media adds changes none of an item's own rows, whatever numbers stand there

    The numbers are large and finite: pad_media decides what stands in the padding, so that NaN never does, and a model
    may well take it out of a sum by a factor of zero, which a NaN survives.
    """
    shapes = _FewShapes()

    def check_padding(example):
        modality, item = example
        arrays = subject.map(modality, subject.open(modality, item))
        padded = subject.pad(arrays)
        both = [name for name in padded if name in arrays]  # one may be for positions alone, or for padding
        key = shape_key({name: arrays[name] for name in both})
        if key == shape_key({name: padded[name] for name in both}) or not shapes.has(modality, key):
            return
        (own,), (rows,) = subject.plain.encode(arrays)[modality], subject.plain.encode(padded)[modality]
        if not np.allclose(rows[: len(own)], own, atol=TOLERANCE):
            raise Broken("with padding behind it an item has other rows than without")
        # The largest array is the pixels; smaller ones may tell what is padding.
        name = max(both, key=lambda name: (padded[name].dtype.kind == "f", padded[name].size))
        foreign = np.random.default_rng(0).normal(size=padded[name].shape).astype(padded[name].dtype) * 100
        foreign[tuple(map(slice, arrays[name].shape))] = arrays[name]
        (rows,) = subject.plain.encode({**padded, name: foreign})[modality]
        if not np.allclose(rows[: len(own)], own, atol=TOLERANCE):
            raise Broken("what stands in the padding leaks into an item's rows")

    search(any_item(subject), check_padding, most=subject.max_examples)


def items_are_encoded_apart(subject: Subject) -> None:
    """an item's rows depend on it alone: not on the others that are encoded with it, nor on their order"""
    shapes = _FewShapes()

    def check_items(example):
        (modality, item), seed = example
        arrays = subject.pad(subject.map(modality, subject.open(modality, item)))
        if not shapes.has(modality, shape_key(arrays)):
            return
        rng = np.random.default_rng(seed)
        other = {
            name: rng.permutation(array.reshape(-1)).reshape(array.shape) if array.dtype.kind == "f" else array
            for name, array in arrays.items()
        }
        alone = subject.plain.encode(arrays)[modality][0]
        for order in ((arrays, other), (other, arrays)):
            both = {name: np.concatenate([one[name] for one in order]) for name in arrays}
            together = subject.plain.encode(both)[modality]
            if len(together) != 2:
                raise Broken(f"two items are encoded as {len(together)}")
            if not np.allclose(together[0 if order[0] is arrays else 1], alone, atol=TOLERANCE):
                raise Broken("an item has other rows in a batch than alone")

    search(st.tuples(any_item(subject), st.integers(0, 9)), check_items, most=min(subject.max_examples, 8))


def the_call_encodes_as_the_encoder(subject: Subject) -> None:
    """called with the mappers' arrays the model gives the logits that it gives with the encoder's rows in their places

    It is called with two items of each modality, whose arrays have other shapes if hypothesis finds such.
    """
    for modality, strategy in subject.items.items():
        token, found = subject.placeholders[modality], {}

        def keep(item, modality=modality, found=found):
            found.setdefault(shape_key(subject.map(modality, subject.open(modality, item))), item)

        search(strategy, keep, most=min(subject.max_examples, 5))
        items = [*found.values()]
        request = ((5, token, 6, token, 7), {modality: [items[-1], items[0]]})
        distance = np.abs(subject.plain.logits_by_arrays(request) - subject.plain.logits(request)).max()
        if not distance < TOLERANCE:
            raise Broken(f"logits differ by {distance:.1e}; the example: {describe(request)}")


def pixels_reach_the_logits(subject: Subject) -> None:
    """other pixels in the same place give other logits behind them"""

    def check_pixels(example):
        modality, item = example
        opened = subject.open(modality, item)
        changed = _negative(opened)
        if content_hash(changed) == content_hash(opened):
            return
        tokens = (5, subject.placeholders[modality], 6)
        one, other = (subject.plain.logits((tokens, {modality: [x]})) for x in (opened, changed))
        if np.allclose(one[-1], other[-1], atol=MOVED):
            raise Broken(f"the negative of a {modality} gives the same logits behind it")

    search(any_item(subject), check_pixels, most=3)


def rows_see_what_is_declared(subject: Subject) -> None:
    """a row moves with what mask_specs let it see, through all layers, and with nothing else

    Behind the prompt stand rows of padding, as in a batch, which see nothing and which no row sees: they may be NaN.
    """
    num_layers = len(subject.model_cls.kv_cache_shapes(subject.hf_config))

    def check_rows(example):
        modality, item = example
        request = ((5, subject.placeholders[modality], 6, 7), {modality: [item]})
        inputs = subject.process(request)
        length = len(inputs.prompt_token_ids)
        seen = _visible(subject, length, inputs.placeholders)
        reached = np.linalg.matrix_power(seen.astype(int), num_layers) > 0
        before = subject.plain.logits(request)
        if not np.isfinite(before).all():
            raise Broken("logits are not finite")
        for place in range(length):
            change = np.zeros((length, subject.plain.width), np.float32)
            change[place] = np.random.default_rng(place).normal(size=subject.plain.width)
            moved = np.abs(subject.plain.logits(request, change=change) - before).max(axis=-1) > MOVED
            if leak := [row for row in range(length) if moved[row] and not reached[row, place]]:
                raise Broken(f"row {leak[0]} moves with token {place}, which no mask lets it see")
            if blind := [row for row in range(length) if seen[row, place] and not moved[row]]:
                raise Broken(f"row {blind[0]} does not move with token {place}, which the masks let it see")
        if not np.allclose(subject.plain.logits(request, padding=np.nan), before, atol=TOLERANCE):
            raise Broken("NaN in rows of padding behind the prompt reaches its own, which no mask lets see them")

    for modality, strategy in subject.items.items():
        search(st.tuples(st.just(modality), strategy), check_rows, most=2)


def equals_the_reference(subject: Subject) -> None:
    """logits are those of the reference that was given, within 2e-4"""
    reference = subject.reference
    if reference is None:
        return

    def check_logits(request):
        token_ids = np.asarray(subject.process(request).prompt_token_ids)
        arrays = MULTIMODAL_REGISTRY.map_input(subject.model_config, request[1])
        expected = np.asarray(reference(subject.checkpoint, token_ids, dict(arrays)))
        actual = subject.plain.logits(request)
        if expected.shape != actual.shape:
            raise Broken(f"the reference gives logits {list(expected.shape)}, the model {list(actual.shape)}")
        if not (distance := np.abs(actual - expected).max()) <= 2e-4:
            raise Broken(f"logits differ from the reference's by {distance:.1e}")

    search(subject.requests, check_logits, most=5)


def _negative(item: Any) -> Any:
    if isinstance(item, Image.Image):
        return ImageOps.invert(item)
    if isinstance(item, Video):
        return Video(frames=255 - item.frames, timestamps=item.timestamps)
    if isinstance(item, np.ndarray):
        return -item
    if isinstance(item, tuple):  # a waveform and its rate
        return (-item[0], *item[1:])
    raise Broken(f"no other item can be made of a {type(item).__name__} to compare with")


def _num_values(shapes: Mapping[str, Any]) -> int:
    return sum(int(np.prod(x.shape)) for x in shapes.values())


def _visible(subject: Subject, length: int, placeholders) -> np.ndarray:
    """Whether a row sees a key in some layer ``[T, T]``."""
    kinds = subject.model_cls.mask_specs(subject.hf_config)
    rows = prompt_intervals(kinds, length, placeholders)
    return np.logical_or.reduce([to_mask(intervals, length) for intervals in rows.values()])
