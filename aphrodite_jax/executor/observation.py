"""A model on one sequence, whole and without caches, with what stands between its layers: for looking, not for serving.

The programs are compiled when they are asked for, and are not among those of the engine.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from aphrodite_jax.modeling.layers.attention import AttentionMetadata
from aphrodite_jax.modeling.layers.observer import Observer, observing
from kernels_pallas.intervals import RowIntervals

__all__ = ["Observation", "ObservedLayers", "ObservedModel", "ObservedRows", "PlacedRows"]

LENGTH_STEP = 64
"""Rows are padded to a multiple of it, so that sequences of about one length are one program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObservedLayers:
    """What to keep of a run.

    Attributes:
      hidden_states: 0 for what goes into the first decoder layer, ``n`` for what comes out of layer ``n - 1``.
      attention: decoder layers, from 0.
      logit_lens: as ``hidden_states``; these are read as tokens.
      top_k: likeliest tokens of each.
    """

    hidden_states: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    logit_lens: tuple[int, ...] = ()
    top_k: int = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacedRows:
    """One media item: its arrays or embeddings ``[rows, D]``, and the tokens ``[rows]`` that stand for its rows."""

    tokens: np.ndarray
    mm_kwargs: Mapping[str, np.ndarray] | None = None
    embeds: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObservedRows:
    """One sequence of ``T`` tokens.

    Attributes:
      token_ids: ``[T]``.
      positions: ``[T]`` or ``[axes, T]``.
      intervals: mask kind to intervals ``[T]``.
      lengths: ``[T]``, as `AttentionMetadata.lengths`.
      media: in the order of their places.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    intervals: Mapping[str, RowIntervals]
    lengths: np.ndarray
    media: Sequence[PlacedRows] = ()


class Observation(NamedTuple):
    """What was kept, on the host.

    ``hidden_states``: ``[T, D]`` by layer. ``attention``: ``[N, rows, T]`` by layer, float32. ``logit_lens``: token ids
    and probabilities ``[T, top_k]`` by layer.
    """

    hidden_states: dict[int, np.ndarray]
    attention: dict[int, np.ndarray]
    logit_lens: dict[int, tuple[np.ndarray, np.ndarray]]


class ObservedModel:
    """A model with its weights, to be looked into.

    Args:
      graphdef, params: its two parts (`nnx.split`).
      mesh: the devices that the parameters are divided over; None for one device.
    """

    def __init__(self, graphdef: Any, params: Any, mesh: Mesh | None = None):
        self._graphdef, self._params, self._mesh = graphdef, params, mesh
        self.has_final_norm = hasattr(nnx.merge(graphdef, params), "final_norm")
        self._jitted_encode = jax.jit(self._encode)
        self._jitted_run = jax.jit(self._run, static_argnums=0)

    def observe(self, rows: ObservedRows, layers: ObservedLayers, attention_rows: np.ndarray) -> Observation:
        """Run one sequence; ``attention_rows [rows]`` are those whose attention is kept."""
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            return self._observe(rows, layers, attention_rows)

    def _observe(self, rows: ObservedRows, layers: ObservedLayers, attention_rows: np.ndarray) -> Observation:
        length = len(rows.token_ids)
        padding = -length % LENGTH_STEP
        media_rows = np.full(length, -1, np.int32)
        encoded = []
        for item in rows.media:
            media_rows[item.tokens] = np.arange(len(item.tokens), dtype=np.int32) + sum(map(len, encoded))
            made = item.embeds if item.mm_kwargs is None else self._jitted_encode(self._params, dict(item.mm_kwargs))
            encoded.append(np.asarray(made)[: len(item.tokens)])

        def pad(x, fill=0):
            return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)], constant_values=fill)

        metadata = AttentionMetadata(
            intervals={kind: RowIntervals(*map(pad, found)) for kind, found in rows.intervals.items()},
            lengths=jnp.asarray(pad(rows.lengths, 1)),
        )
        seen = self._jitted_run(
            layers,
            self._params,
            pad(rows.token_ids),
            pad(rows.positions),
            metadata,
            pad(media_rows, -1),
            np.concatenate(encoded) if encoded else None,
            np.asarray(attention_rows, np.int32),
        )
        hidden_states, attention, lens = jax.device_get(seen)
        return Observation(
            {layer: x[:length] for layer, x in hidden_states.items()},
            {layer: x[..., :length] for layer, x in attention.items()},
            {layer: (ids[:length], shares[:length]) for layer, (ids, shares) in lens.items()},
        )

    def _encode(self, params, arrays):
        embeds = nnx.merge(self._graphdef, params).embed_multimodal(**arrays)
        return jnp.concatenate([item for items in embeds.values() for item in items])

    def _run(
        self,
        layers: ObservedLayers,
        params,
        token_ids,
        positions,
        metadata: AttentionMetadata,
        media_rows,
        encoded,
        attention_rows,
    ):
        model = nnx.merge(self._graphdef, params)
        embeds = model.embed_input_ids(token_ids)
        if encoded is not None:
            media = encoded[jnp.maximum(media_rows, 0)].astype(embeds.dtype)
            embeds = jnp.where((media_rows >= 0)[:, None], media, embeds)
        observer = Observer(attention_layers=layers.attention, attention_rows=attention_rows)
        with observing(observer):
            model(token_ids, positions, None, metadata, inputs_embeds=embeds)
        observer.check()
        states = [x[:, : observer.hidden_states[-1].shape[1]] for x in observer.hidden_states]
        lens = {}
        for layer in layers.logit_lens:
            shares = jax.nn.softmax(model.compute_logits(model.final_norm(states[layer])), axis=-1)
            top, ids = jax.lax.top_k(shares, layers.top_k)
            lens[layer] = (ids, top)
        return {layer: states[layer] for layer in layers.hidden_states}, observer.attention, lens
