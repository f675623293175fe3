"""`LLM.capture`: hidden states, attention and the logit lens of one prompt and what follows it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from aphrodite_jax.engine import AphroditeEngine
from aphrodite_jax.engine.admission import Prompt
from aphrodite_jax.engine.sequence import PreparedPrompt
from aphrodite_jax.errors import RequestError
from aphrodite_jax.executor.observation import ObservedLayers, ObservedRows, PlacedRows
from aphrodite_jax.inspection.tokens import token_texts
from aphrodite_jax.outputs import MediaInfo

__all__ = ["Capture", "TopTokens", "capture"]


@dataclasses.dataclass(frozen=True)
class TopTokens:
    """The likeliest next tokens of each row, the first one first.

    Attributes:
      token_ids: ``[T, k]``.
      probabilities: ``[T, k]``.
      texts: of each.
    """

    token_ids: Int[np.ndarray, "T k"]
    probabilities: Float[np.ndarray, "T k"]
    texts: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capture:
    """What a model computed for ``T`` tokens: a prompt, its placeholders expanded, and what follows.

    Attributes:
      token_ids: ``[T]``.
      tokens: the text of each.
      num_prompt_tokens: the first of them are the prompt.
      media: the prompt's items in the order of their places.
      item_tokens: of each item, the tokens ``[rows]`` that stand for its rows.
      hidden_states: ``[T, D]`` by layer, as asked for: 0 is what goes into the first decoder layer, ``n`` what comes
        out of layer ``n - 1``, -1 what comes out of the last, before the last norm.
      attention: ``[N, rows, T]`` by decoder layer, as asked for: what each of ``attention_rows`` gives to each token,
        by head, float32; a row sums to 1.
      attention_rows: ``[rows]`` tokens.
      logit_lens: `TopTokens` by layer, numbered as hidden states: what the model would say next if it ended there.
    """

    token_ids: Int[np.ndarray, " T"]
    tokens: tuple[str, ...]
    num_prompt_tokens: int
    media: tuple[MediaInfo, ...]
    item_tokens: tuple[Int[np.ndarray, " rows"], ...]
    hidden_states: Mapping[int, Float[np.ndarray, "T D"]]
    attention: Mapping[int, Float[np.ndarray, "N rows T"]]
    attention_rows: Int[np.ndarray, " rows"]
    logit_lens: Mapping[int, TopTokens]

    def attention_map(
        self, item: int = 0, *, layer: int = -1, row: int = -1, grid: tuple[int, int] | None = None
    ) -> Float[np.ndarray, "lines columns"]:
        """What one row gives to each patch of an item, the mean over heads.

        Args:
          item: index into ``media``.
          layer: one that was captured.
          row: index into ``attention_rows``.
          grid: (lines, columns) of the item's rows; a square by default.

        Raises:
          RequestError: a layer that was not captured, or rows that don't fill the grid.
        """
        if layer not in self.attention:
            raise RequestError(f"the attention of layer {layer} was not captured; there are {sorted(self.attention)}")
        weights = self.attention[layer][:, row].mean(axis=0)[self.item_tokens[item]]
        lines, columns = grid or (math.isqrt(len(weights)),) * 2
        if lines * columns != len(weights):
            raise RequestError(
                f"item {item} has {len(weights)} rows, which do not fill {lines} x {columns}: give its grid"
            )
        return weights.reshape(lines, columns)


def capture(
    engine: AphroditeEngine,
    prompt: Prompt,
    continuation: Sequence[int] = (),
    *,
    hidden_states: Sequence[int] = (),
    attention: Sequence[int] = (),
    attention_rows: Sequence[int] | None = None,
    logit_lens: Sequence[int] = (),
    top_k: int = 5,
) -> Capture:
    """See `aphrodite_jax.LLM.capture`."""
    prepared = engine.prepare(prompt)
    tokenizer, vocab_size = engine.tokenizer, engine.runner.vocab_size
    if not all(0 <= token < vocab_size for token in continuation):
        raise RequestError(f"the continuation has tokens outside the model's vocabulary of {vocab_size}")
    length = len(prepared.token_ids) + len(continuation)
    if length > engine.runner.context_length:
        raise RequestError(
            f"prompt and continuation have {length} tokens; the model takes {engine.runner.context_length}"
        )
    if not (hidden_states or attention or logit_lens):
        raise RequestError("nothing to capture: name layers as hidden_states, attention or logit_lens")
    if not 1 <= top_k <= vocab_size:
        raise RequestError(f"top_k must be from 1 to {vocab_size}, got {top_k}")
    model, num_layers = engine.runner.observed_model, engine.runner.num_layers
    if logit_lens and not model.has_final_norm:
        raise RequestError("the logit lens needs a final_norm(hidden_states) method, which the model's class lacks")
    states = {layer: _index(layer, num_layers + 1, "hidden_states") for layer in hidden_states}
    attended = {layer: _index(layer, num_layers, "attention") for layer in attention}
    read = {layer: _index(layer, num_layers + 1, "logit_lens") for layer in logit_lens}
    rows = [length - 1] if attention_rows is None else attention_rows
    rows = np.array([_index(row, length, "attention_rows") for row in rows], np.int32)
    token_ids = np.concatenate([prepared.token_ids, np.array(continuation, np.int32)])
    seen = model.observe(
        _observed_rows(engine, prepared, token_ids),
        ObservedLayers(
            hidden_states=tuple(states.values()),
            attention=tuple(attended.values()),
            logit_lens=tuple(read.values()),
            top_k=top_k,
        ),
        rows,
    )
    return Capture(
        token_ids=token_ids,
        tokens=token_texts(tokenizer, token_ids, vocab_size),
        num_prompt_tokens=len(prepared.token_ids),
        media=tuple(item.info for item in prepared.media),
        item_tokens=tuple(item.placeholder.row_tokens for item in prepared.media),
        hidden_states={layer: seen.hidden_states[index] for layer, index in states.items()},
        attention={layer: seen.attention[index] for layer, index in attended.items()},
        attention_rows=rows,
        logit_lens={
            layer: TopTokens(ids, shares, tuple(token_texts(tokenizer, row, vocab_size) for row in ids))
            for layer, (ids, shares) in ((layer, seen.logit_lens[index]) for layer, index in read.items())
        },
    )


def _observed_rows(engine: AphroditeEngine, prepared: PreparedPrompt, token_ids: np.ndarray) -> ObservedRows:
    length = len(token_ids)
    places = np.arange(length, dtype=np.int32)
    positions = prepared.positions_of(0, length)
    return ObservedRows(
        token_ids=token_ids,
        positions=places if positions is None else positions,
        intervals=prepared.intervals_of(engine.runner.mask_specs, 0, length),
        lengths=np.maximum(places + 1, np.int32(len(prepared.token_ids))),
        media=[
            PlacedRows(tokens=item.placeholder.row_tokens, mm_kwargs=item.mm_kwargs, embeds=item.embeds)
            for item in prepared.media
        ],
    )


def _index(given: int, count: int, name: str) -> int:
    if not -count <= given < count:
        raise RequestError(f"{name} are from {-count} to {count - 1} here, got {given}")
    return given % count
