"""What a right registration keeps to: one function a clause, which raises `Broken` with the smallest example it finds.

A clause is tried on items and prompts that hypothesis makes up. They come in groups: a later one is asked where all of
those before hold, without which it would fail for their reasons.
"""

import inspect
import pickle
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageOps

from aphrodite_jax.config import EngineConfig
from aphrodite_jax.engine import AphroditeEngine
from aphrodite_jax.engine.admission import prompt_intervals
from aphrodite_jax.inputs import INPUT_REGISTRY
from aphrodite_jax.modeling.models.interfaces import SupportsMultiModal, supports_multimodal
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, Video, content_hash
from aphrodite_jax.sampling_params import SamplingParams
from aphrodite_jax.testing.subject import Subject
from kernels_pallas.intervals import RowIntervals, to_mask

__all__ = ["GROUPS", "Broken", "missing_registrations"]

TOLERANCE = 1e-4
"""Of float32 rows and logits that must be equal but for the order of sums."""
SECONDS_TO_SHRINK = 5.0
"""After which the smallest example so far is told; programs are compiled for each length that is tried."""
SLOW_IS_FINE = (hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large)
DTYPES = ("float32", "int32", "bool", "uint8")
"""Of arrays that mappers may give."""


class Broken(AssertionError):
    """A clause does not hold."""


def missing_registrations(model_cls: Any) -> list[str]:
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


def search(subject: Subject, strategy: st.SearchStrategy, check: Callable[[Any], None], *, most: int = 1000) -> None:
    """Raise `Broken` with the smallest example for which ``check`` fails."""
    found: dict[str, Any] = {}
    begin = 0.0

    @hypothesis.settings(
        max_examples=min(subject.max_examples, most),
        deadline=None,
        database=None,
        derandomize=True,
        report_multiple_bugs=False,
        suppress_health_check=SLOW_IS_FINE,
    )
    @hypothesis.given(strategy)
    def test(example):
        nonlocal begin
        if found and time.monotonic() - begin > SECONDS_TO_SHRINK:
            if describe(example) == describe(found["example"]):
                raise found["error"]
            return
        try:
            check(example)
        except Exception as error:
            begin = begin or time.monotonic()
            found.update(example=example, error=error)
            raise

    try:
        test()
    except Exception as error:
        if "error" not in found:
            raise
        reason = found["error"]
        kind = "" if isinstance(reason, Broken) else f"{type(reason).__name__}: "
        raise Broken(f"{kind}{reason}; the smallest example: {describe(found['example'])}") from error


def describe(example: Any) -> str:
    """An example in a few words."""
    if isinstance(example, Mapping):
        return "{" + ", ".join(f"{name}: {describe(value)}" for name, value in example.items()) + "}"
    if isinstance(example, tuple):
        return "(" + ", ".join(map(describe, example)) + ")"
    if isinstance(example, list) and example and not isinstance(example[0], int):
        return "[" + ", ".join(map(describe, example)) + "]"
    if isinstance(example, Image.Image):
        return f"{example.mode} image of {example.width} x {example.height}"
    if isinstance(example, Video):
        frames, height, width, _ = example.frames.shape
        return f"video of {frames} frames of {width} x {height}"
    if isinstance(example, np.ndarray):
        return f"{example.dtype}{list(example.shape)}"
    return repr(example)


def any_item(subject: Subject) -> st.SearchStrategy[tuple[str, Any]]:
    """A modality and an item of it."""
    return st.one_of(*(st.tuples(st.just(modality), strategy) for modality, strategy in subject.items.items()))


# Mapper, processor, bound.


def mapper_is_pure(subject: Subject) -> None:
    """the mapper is pure: same item, same arrays; the item and the global state of random numbers are left alone"""

    def check(example):
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

    search(subject, any_item(subject), check)


def arrays_fit_the_call(subject: Subject) -> None:
    """the mapper's arrays fit __call__ and embed_multimodal: their keywords, one item on axis 0, plain dtypes"""
    parameters = {
        name: inspect.signature(getattr(subject.model_cls, name)).parameters
        for name in ("__call__", "embed_multimodal")
    }

    def check(example):
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

    search(subject, any_item(subject), check)


def processor_is_pure(subject: Subject) -> None:
    """the input processor is pure: same request, same result; what it is given is left alone"""

    def check(request):
        tokens, media = request
        before = content_hash(_plain(media))
        first, second = subject.process(request), subject.process((tokens, media))
        if content_hash(_plain(media)) != before:
            raise Broken("the input processor changes its items in place")
        if first.prompt_token_ids != second.prompt_token_ids or first.placeholders != second.placeholders:
            raise Broken("the input processor gives another result for the same request when it is called again")

    search(subject, subject.requests, check)


def text_alone_works(subject: Subject) -> None:
    """a prompt of text alone is processed, and keeps its tokens"""

    def check(tokens):
        processed = subject.process((tuple(tokens), {}))
        if any(token not in processed.prompt_token_ids for token in tokens) or any(processed.placeholders.values()):
            raise Broken(f"of the tokens {tokens} the processor makes {list(processed.prompt_token_ids)}")

    texts = st.lists(st.integers(3, 40), min_size=1, max_size=6)
    search(subject, texts.filter(lambda x: not set(x) & set(subject.placeholders.values())), check)


def placeholders_are_rows(subject: Subject) -> None:
    """each item has as many placeholder tokens as the model makes rows of it, in the order of the items"""

    def check(request):
        processed = subject.process(request)
        for modality, items in processed.multi_modal_data.items():
            spans = processed.placeholders.get(modality, ())
            if list(spans) != sorted(spans, key=lambda span: span.offset):
                raise Broken(f"the ranges of {modality} items are not in the order of their places: {spans}")
            for index, (item, span) in enumerate(zip(items, spans, strict=True)):
                rows = subject.rows(subject.map(modality, item)).get(modality, ())
                if rows != (span.num_rows,):
                    raise Broken(
                        f"{modality} {index} has {span.num_rows} placeholder tokens, the model makes {rows} rows of it"
                    )

    search(subject, subject.requests, check)


def bound_is_a_bound(subject: Subject) -> None:
    """no item takes more tokens than the registered bound"""

    def check(processed):
        for modality, spans in processed.placeholders.items():
            for span in spans:
                if span.length > subject.bounds[modality]:
                    raise Broken(f"a {modality} takes {span.length} tokens, the bound is {subject.bounds[modality]}")

    check(subject.dummy)
    search(subject, subject.requests, lambda request: check(subject.process(request)))


def dummy_data_are_the_largest(subject: Subject) -> None:
    """the dummy data hold as many items as allowed, each of as many tokens as the bound, and fit the model's length"""
    dummy = subject.dummy
    if len(dummy.prompt_token_ids) > subject.model_config.context_length:
        raise Broken(
            f"processed, the dummy prompt has {len(dummy.prompt_token_ids)} tokens; the model takes "
            f"{subject.model_config.context_length}"
        )
    for modality, limit in MULTIMODAL_REGISTRY.get_mm_limits(subject.model_config).items():
        spans = dummy.placeholders.get(modality, ())
        if len(spans) != limit:
            raise Broken(f"the dummy data hold {len(spans)} {modality} items where a prompt may hold {limit}")
        lengths = {span.length for span in spans}
        if lengths != {subject.bounds[modality]}:
            raise Broken(
                f"dummy {modality} items take {sorted(lengths)} tokens, the bound is {subject.bounds[modality]}: it is "
                "never reached, or the dummy items are not the largest"
            )


def shapes_are_declared(subject: Subject) -> None:
    """every item is encoded in a shape of the dummy data or of media_shapes, so that nothing compiles late"""
    declared = {_shape_key(shapes) for shapes in _declared(subject)}

    def check(example):
        modality, item = example
        padded = subject.pad(subject.map(modality, subject.open(modality, item)))
        if _shape_key(padded) not in declared:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in padded.items())
            raise Broken(f"an item is encoded as {shapes}, which neither media_shapes nor the dummy data have")

    search(subject, any_item(subject), check)


# The model, and the engine.


def dummy_data_need_the_most_memory(subject: Subject) -> None:
    """no declared shape needs more memory to encode than the dummy data, by the compiler's own count"""
    of_dummy = [_shapes(padded) for padded in _dummy_arrays(subject)]
    most = max(map(subject.encode_bytes, of_dummy))
    declared = sorted(subject.model_cls.media_shapes(subject.context), key=_num_values)
    for shapes in declared[-2:]:
        found = subject.encode_bytes(shapes)
        if found > most:
            raise Broken(f"{_shape_key(shapes)} needs {found} bytes to encode, the largest dummy item {most}")


def padding_changes_no_row(subject: Subject) -> None:
    """what pad_media adds changes none of an item's own rows, whatever numbers stand there"""
    rng = np.random.default_rng(0)

    def check(example):
        modality, item = example
        arrays = subject.map(modality, subject.open(modality, item))
        padded = subject.pad(arrays)
        if _shape_key(padded) == _shape_key(arrays):
            return
        (own,), (rows,) = subject.encode(arrays)[modality], subject.encode(padded)[modality]
        if not np.allclose(rows[: len(own)], own, atol=TOLERANCE):
            raise Broken("with padding behind it an item has other rows than without")
        # The largest array is the pixels; smaller ones may tell what is padding.
        name = max(padded, key=lambda name: (padded[name].dtype.kind == "f", padded[name].size))
        foreign = rng.normal(size=padded[name].shape).astype(padded[name].dtype) * 100
        foreign[tuple(map(slice, arrays[name].shape))] = arrays[name]
        padded[name] = foreign
        (rows,) = subject.encode(padded)[modality]
        if not np.allclose(rows[: len(own)], own, atol=TOLERANCE):
            raise Broken("what stands in the padding leaks into an item's rows")

    search(subject, any_item(subject), check, most=8)


def items_are_encoded_apart(subject: Subject) -> None:
    """an item's rows depend on it alone: not on the others that are encoded with it, nor on their order"""

    def check(example):
        modality, item, seed = example
        opened = subject.open(modality, item)
        arrays = subject.pad(subject.map(modality, opened))
        rng = np.random.default_rng(seed)
        other = {
            name: rng.permutation(array.reshape(-1)).reshape(array.shape) if array.dtype.kind == "f" else array
            for name, array in arrays.items()
        }
        alone = subject.encode(arrays)[modality][0]
        for order in ((arrays, other), (other, arrays)):
            both = {name: np.concatenate([one[name] for one in order]) for name in arrays}
            together = subject.encode(both)[modality]
            if len(together) != 2:
                raise Broken(f"two items are encoded as {len(together)}")
            if not np.allclose(together[0 if order[0] is arrays else 1], alone, atol=TOLERANCE):
                raise Broken("an item has other rows in a batch than alone")

    items = st.one_of(
        *(st.tuples(st.just(modality), strategy, st.integers(0, 9)) for modality, strategy in subject.items.items())
    )
    search(subject, items, check, most=6)


def pixels_reach_the_logits(subject: Subject) -> None:
    """other pixels in the same place give other logits behind them"""

    def check(example):
        modality, item = example
        opened = subject.open(modality, item)
        changed = _negative(opened)
        if content_hash(changed) == content_hash(opened):
            return
        tokens = (5, subject.placeholders[modality], 6)
        one, other = (subject.logits((tokens, {modality: [x]})) for x in (opened, changed))
        if np.allclose(one[-1], other[-1], atol=1e-6):
            raise Broken(f"the negative of a {modality} gives the same logits behind it")

    search(subject, any_item(subject), check, most=3)


def rows_see_what_is_declared(subject: Subject) -> None:
    """a row moves with what mask_specs let it see, through all layers, and with nothing else"""
    modality, strategy = next(iter(subject.items.items()))
    token = subject.placeholders[modality]

    def check(item):
        request = ((5, token, 6, 7), {modality: [item]})
        inputs = subject.process(request)
        length = len(inputs.prompt_token_ids)
        embeds = np.asarray(subject.model.embed_input_ids(jnp.asarray(inputs.prompt_token_ids, jnp.int32)))
        seen = _visible(subject, length, inputs.placeholders)
        reached = (
            np.linalg.matrix_power(seen.astype(int), len(subject.model_cls.kv_cache_shapes(subject.hf_config))) > 0
        )
        before = subject.logits(request, embeds=embeds)
        for place in range(length):
            changed = embeds.copy()
            changed[place] += np.random.default_rng(place).normal(size=embeds.shape[1]).astype(np.float32)
            moved = np.abs(subject.logits(request, embeds=changed) - before).max(axis=-1) > 1e-6
            if leak := [row for row in range(length) if moved[row] and not reached[row, place]]:
                raise Broken(f"row {leak[0]} moves with token {place}, which no mask lets it see")
            if blind := [row for row in range(length) if seen[row, place] and not moved[row]]:
                raise Broken(f"row {blind[0]} does not move with token {place}, which the masks let it see")

    search(subject, strategy, check, most=2)


def equals_the_reference(subject: Subject) -> None:
    """logits are those of the reference that was given, within 2e-4"""
    reference = subject.reference
    if reference is None:
        return

    def check(request):
        token_ids = np.asarray(subject.process(request).prompt_token_ids)
        arrays = MULTIMODAL_REGISTRY.map_input(subject.model_config, request[1])
        expected = np.asarray(reference(subject.model_config.model, token_ids, dict(arrays)))
        actual = subject.logits(request)
        if expected.shape != actual.shape:
            raise Broken(f"the reference gives logits {list(expected.shape)}, the model {list(actual.shape)}")
        if (distance := np.abs(actual - expected).max()) > 2e-4:
            raise Broken(f"logits differ from the reference's by {distance:.1e}")

    search(subject, subject.requests, check, most=5)


def the_engine_agrees(subject: Subject) -> None:
    """answers are the same in chunks, in batches and in any order, and nothing compiles after the start"""

    longest = max(subject.bounds.values()) * 2 + 32
    sees_ahead = any(
        spec.prefix or spec.bidirectional for spec in subject.model_cls.mask_specs(subject.hf_config).values()
    )
    engine = AphroditeEngine(
        subject.model_config,
        EngineConfig(
            max_num_seqs=2,
            max_num_batched_tokens=longest if sees_ahead else 16,
            max_encode_items=2,
            page_size=8,
            on_recompile="raise",
            show_progress=False,
        ),
    )
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=0)
    numbers = iter(range(10**6))

    def answers(requests):
        names = [str(next(numbers)) for _ in requests]
        for name, (tokens, media) in zip(names, requests, strict=True):
            engine.add_request(name, {"prompt_token_ids": list(tokens), "multi_modal_data": media}, params)
        outputs = {}
        while engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in engine.step()}
        return [outputs[name] for name in names]

    def told(output):
        return np.array([next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]])

    def check(example):
        requests = [request for request in example if len(subject.process(request).prompt_token_ids) > 1]
        alone = [answers([request])[0] for request in requests]
        for request, output in zip(requests, alone, strict=True):
            logits = subject.logits(request)
            targets = np.asarray(output.prompt_token_ids[1:])
            whole = np.asarray(jax.nn.log_softmax(logits, axis=-1))[np.arange(len(targets)), targets]
            if not np.allclose(told(output), whole, atol=1e-3):
                raise Broken("in chunks a prompt has other logits than whole")
        for order in (requests, requests[::-1]):
            for output, request in zip(answers(order), order, strict=True):
                expected = alone[requests.index(request)]
                if not np.allclose(told(output), told(expected), atol=1e-3):
                    raise Broken("in a batch a prompt has other logits than alone")

    dummy = {modality: list(items) for modality, items in subject.dummy.multi_modal_data.items()}
    largest = tuple(subject.placeholders[modality] for modality, items in dummy.items() for _ in items)
    check([((5, *largest, 6, 7), dummy), ((5, 6, 7), {})])  # in several chunks, beside a short one
    search(subject, st.lists(subject.requests, min_size=1, max_size=2), check, most=3)


GROUPS: Sequence[Sequence[Callable[[Subject], None]]] = (
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
        pixels_reach_the_logits,
        rows_see_what_is_declared,
        equals_the_reference,
    ),
    (the_engine_agrees,),
)
"""What mapper, processor and bound make of items; what the model makes of their arrays; what the engine makes of it."""


# Helpers.


def _random_state() -> bytes:
    """The state of the global generators."""
    return pickle.dumps((random.getstate(), np.random.get_state()))


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _plain(media: Mapping[str, list]) -> dict[str, list]:
    return {modality: list(items) for modality, items in media.items()}


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


def _dummy_arrays(subject: Subject) -> list[dict[str, np.ndarray]]:
    return [
        subject.pad(subject.map(modality, item))
        for modality, items in subject.dummy.multi_modal_data.items()
        for item in items[:1]
    ]


def _declared(subject: Subject) -> list[Mapping[str, Any]]:
    return [*map(_shapes, _dummy_arrays(subject)), *subject.model_cls.media_shapes(subject.context)]


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}


def _shape_key(arrays: Mapping[str, Any]) -> tuple:
    return tuple((name, tuple(x.shape), str(x.dtype)) for name, x in sorted(arrays.items()))


def _num_values(shapes: Mapping[str, Any]) -> int:
    return sum(int(np.prod(x.shape)) for x in shapes.values())


def _visible(subject: Subject, length: int, placeholders) -> np.ndarray:
    """Whether a row sees a key in some layer ``[T, T]``."""
    kinds = subject.model_cls.mask_specs(subject.hf_config)
    rows: Mapping[str, RowIntervals] = prompt_intervals(kinds, length, placeholders)
    return np.logical_or.reduce([to_mask(intervals, length) for intervals in rows.values()])
