"""`LLM.explain`: what becomes of a request before it runs, as values, as text, and as a page for notebooks."""

import dataclasses
from collections.abc import Mapping

from aphrodite_jax.engine import AphroditeEngine
from aphrodite_jax.engine.admission import Prompt
from aphrodite_jax.engine.sequence import MediaItem
from aphrodite_jax.inspection.tokens import token_texts
from aphrodite_jax.outputs import MediaInfo
from kernels_pallas.intervals import RowIntervals

__all__ = ["ExplainedItem", "Explanation", "explain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainedItem:
    """One media item of a prompt.

    Attributes:
      info: its place among the tokens, and what was taken of it.
      row_tokens: the tokens that stand for its rows.
      content_hash: names its content and the options of its processing; what is encoded is kept under it.
      arrays: keyword of ``embed_multimodal`` to dtype and shape, as they are encoded; empty for embeddings.
      is_encoded: whether the encoder cache holds it now.
    """

    info: MediaInfo
    row_tokens: tuple[int, ...]
    content_hash: str
    arrays: Mapping[str, str]
    is_encoded: bool


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Explanation:
    """What becomes of a request, as things stand; nothing was computed for it.

    Printed it is a text for terminals; a notebook shows it as coloured tokens with a picture of each mask.

    Attributes:
      prompt: its text, if it came as text.
      token_ids: after the placeholders were expanded.
      tokens: the text of each.
      items: media in the order of their places.
      intervals: mask kind of the model's layers to the keys that each row sees.
      chunks: tokens ``[begin, end)`` of the steps in which it would be prefilled if it came alone.
      page_size: tokens of a KV page.
    """

    prompt: str | None
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    items: tuple[ExplainedItem, ...]
    intervals: Mapping[str, RowIntervals]
    chunks: tuple[tuple[int, int], ...]
    page_size: int

    @property
    def num_cached(self) -> int:
        """Tokens at the beginning whose keys and values stand in pages already."""
        return self.chunks[0][0]

    def __repr__(self) -> str:
        from aphrodite_jax.inspection.text import explanation_text

        return explanation_text(self)

    def _repr_html_(self) -> str:
        from aphrodite_jax.inspection.html import explanation_html

        return explanation_html(self)


def explain(engine: AphroditeEngine, prompt: Prompt) -> Explanation:
    """See `aphrodite_jax.LLM.explain`."""
    prepared = engine.prepare(prompt)
    encoder_cache = engine.replica_for(prepared).scheduler.encoder_cache
    return Explanation(
        prompt=prepared.text,
        token_ids=prepared.token_tuple,
        tokens=token_texts(engine.tokenizer, prepared.token_ids, engine.runner.vocab_size),
        items=tuple(
            ExplainedItem(
                info=item.info,
                row_tokens=tuple(item.placeholder.row_tokens.tolist()),
                content_hash=item.content_hash,
                arrays=_arrays(item),
                is_encoded=item.content_hash in encoder_cache,
            )
            for item in prepared.media
        ),
        intervals=prepared.intervals,
        chunks=tuple(engine.preview(prepared)),
        page_size=engine.runner.page_size,
    )


def _arrays(item: MediaItem) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in (item.mm_kwargs or {}).items()}
