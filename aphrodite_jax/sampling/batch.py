"""Sampling options of a step's requests as arrays of one static shape; built on the host with NumPy."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from aphrodite_jax.errors import RequestError
from aphrodite_jax.sampling_params import MAX_LOGIT_BIAS, SamplingParams

__all__ = [
    "BIAS_WIDTH",
    "MAX_BANNED_TOKENS",
    "MIN_TEMPERATURE",
    "AnyArray",
    "SamplingBatch",
    "SamplingRow",
    "build_sampling_batch",
    "check_sampling_params",
    "is_plain_greedy",
    "uses_history",
]

MIN_TEMPERATURE = 1e-5
"""Below this a request is greedy: the scaled logits would leave float32."""
MAX_BANNED_TOKENS = 84
"""Most end and stop tokens that ``min_tokens`` can hold off."""
BIAS_WIDTH = MAX_LOGIT_BIAS + MAX_BANNED_TOKENS

AnyArray = Array | np.ndarray
"""Of NumPy when built, of JAX inside a program."""

_TINY, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SamplingRow:
    """One request's place in a step.

    Attributes:
      seed: of this answer, 32 bits; the params' own seed may be None and is not looked at.
      prompt_token_ids, output_token_ids: history for the penalties, tuples or int arrays.
      num_pending: tokens of the answer behind these that only the device knows; 0 where there are penalties.
      end_token_ids: the model's end tokens, held off until ``min_tokens``.
    """

    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int] | np.ndarray
    output_token_ids: Sequence[int] | np.ndarray
    end_token_ids: Sequence[int] = ()
    num_pending: int = 0

    @property
    def step(self) -> int:
        """Index of the token that is generated now."""
        return len(self.output_token_ids) + self.num_pending


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingBatch:
    """Options of R requests. Token ids equal to V name no token: padding.

    Attributes:
      temperature: below `MIN_TEMPERATURE` is greedy.
      top_k: 1 to V; V keeps all.
      seed, step: the noise is that of ``fold_in(key(seed), step)``.
      prompt_tokens, output_tokens: history of rows with penalties; empty for the others.
      bias_ids, bias_values: added to the logits, each id once; -inf bans.
    """

    temperature: Float[AnyArray, " R"]
    top_p: Float[AnyArray, " R"]
    top_k: Int[AnyArray, " R"]
    min_p: Float[AnyArray, " R"]
    presence_penalty: Float[AnyArray, " R"]
    frequency_penalty: Float[AnyArray, " R"]
    repetition_penalty: Float[AnyArray, " R"]
    seed: UInt[AnyArray, " R"]
    step: Int[AnyArray, " R"]
    prompt_tokens: Int[AnyArray, "R history"]
    output_tokens: Int[AnyArray, "R history"]
    bias_ids: Int[AnyArray, "R bias"]
    bias_values: Float[AnyArray, "R bias"]


def is_plain_greedy(params: SamplingParams) -> bool:
    """Whether `sample_greedy` serves the request: it takes the most likely token and asks for nothing else.

    ``prompt_logprobs`` don't count here: they are of the prompt's rows.
    """
    return (
        params.temperature < MIN_TEMPERATURE
        and not uses_history(params)
        and not params.logit_bias
        and params.logprobs is None
        and params.min_tokens == 0
    )


def uses_history(params: SamplingParams) -> bool:
    """Whether the request has a penalty; where none of a batch has, ``history_width`` may be 0."""
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


def check_sampling_params(params: SamplingParams, *, vocab_size: int, end_token_ids: Sequence[int]) -> None:
    """Refuse, at admission, options that `SamplingParams` can't judge without the model.

    Raises:
      RequestError: a token id outside the vocabulary, or more tokens than ``min_tokens`` can hold off.
    """
    for name, ids in (
        ("logit_bias", dict(params.logit_bias or ()).keys()),
        ("stop_token_ids", params.stop_token_ids or ()),
    ):
        unknown = sorted(token for token in ids if not 0 <= token < vocab_size)
        if unknown:
            raise RequestError(
                f"{name} names the token ids {unknown[:5]}, but the model's ids are 0 to {vocab_size - 1}"
            )
    banned = len({*end_token_ids, *(params.stop_token_ids or ())})
    if params.min_tokens and banned > MAX_BANNED_TOKENS:
        raise RequestError(
            f"min_tokens holds off at most {MAX_BANNED_TOKENS} end and stop tokens, here are {banned}: "
            "give fewer stop_token_ids"
        )


def build_sampling_batch(
    rows: Sequence[SamplingRow], *, num_rows: int, vocab_size: int, history_width: int
) -> SamplingBatch:
    """The rows' options, padded to ``num_rows`` with greedy rows.

    Args:
      history_width: columns of each history array; at least the longest history of a row with penalties.

    Raises:
      ValueError: more rows than ``num_rows``, or a history longer than ``history_width``.
    """
    if len(rows) > num_rows:
        raise ValueError(f"{len(rows)} requests do not fit in {num_rows} rows")

    def column(value: Callable[[SamplingRow], float], padding: float, dtype: type = np.float32) -> np.ndarray:
        out = np.full(num_rows, padding, dtype)
        out[: len(rows)] = [value(row) for row in rows]
        return out

    def history(tokens: Callable[[SamplingRow], Sequence[int] | np.ndarray]) -> np.ndarray:
        penalised = [tokens(row) if uses_history(row.params) else () for row in rows]
        return _padded_ids(penalised, (num_rows, history_width), vocab_size, "history_width")

    biases = [_bias(row) for row in rows]
    bias_values = np.zeros((num_rows, BIAS_WIDTH), np.float32)
    for out, bias in zip(bias_values, biases, strict=False):
        out[: len(bias)] = list(bias.values())
    return SamplingBatch(
        temperature=column(lambda row: _temperature(row.params), 0.0),
        top_p=column(lambda row: max(row.params.top_p, _TINY), 1.0),
        top_k=column(lambda row: _top_k(row.params, vocab_size), vocab_size, np.int32),
        min_p=column(lambda row: row.params.min_p, 0.0),
        presence_penalty=column(lambda row: row.params.presence_penalty, 0.0),
        frequency_penalty=column(lambda row: row.params.frequency_penalty, 0.0),
        repetition_penalty=column(lambda row: min(max(row.params.repetition_penalty, _TINY), _LARGEST), 1.0),
        seed=column(lambda row: row.seed, 0, np.uint32),
        step=column(lambda row: row.step, 0, np.int32),
        prompt_tokens=history(lambda row: row.prompt_token_ids),
        output_tokens=history(lambda row: row.output_token_ids),
        bias_ids=_padded_ids(biases, (num_rows, BIAS_WIDTH), vocab_size, "BIAS_WIDTH"),
        bias_values=bias_values,
    )


def _temperature(params: SamplingParams) -> float:
    return min(params.temperature, _LARGEST) if params.temperature >= MIN_TEMPERATURE else 0.0


def _top_k(params: SamplingParams, vocab_size: int) -> int:
    return min(params.top_k, vocab_size) if params.top_k > 0 else vocab_size


def _bias(row: SamplingRow) -> dict[int, float]:
    """Token id to what is added to its logit: the request's bias, and -inf for tokens that can't come yet."""
    bias = dict(row.params.logit_bias or ())
    if row.step < row.params.min_tokens:
        bias.update(dict.fromkeys((*row.end_token_ids, *(row.params.stop_token_ids or ())), -np.inf))
    return bias


def _padded_ids(lists: Sequence, shape: tuple[int, int], vocab_size: int, width_name: str) -> np.ndarray:
    """Rows of token ids, padded with V; ids that are no tokens become V, since negative ones would wrap."""
    ids = np.full(shape, vocab_size, np.int32)
    for out, tokens in zip(ids, lists, strict=False):
        if len(tokens) > shape[1]:
            raise ValueError(f"{len(tokens)} token ids do not fit in {width_name} {shape[1]}")
        out[: len(tokens)] = tokens if isinstance(tokens, np.ndarray) else tuple(tokens)
    ids[(ids < 0) | (ids > vocab_size)] = vocab_size
    return ids
