"""The order in which prompts of a window go to the engine: those of one shape together, those of one image too."""

from collections.abc import Sequence
from typing import Any, TypeVar

from aphrodite_jax.engine.sequence import PreparedPrompt

__all__ = ["num_bytes", "sorted_by_shape"]

T = TypeVar("T")


def sorted_by_shape(entries: Sequence[tuple[PreparedPrompt, T]]) -> list[tuple[PreparedPrompt, T]]:
    """Prompts, each with what comes with it, by the shapes of their media and their length in tokens.

    Media of one shape are encoded in one program, and prompts of about one length fill a step better. Prompts with the
    same media are kept together, so that their media are encoded once and their common pages are found.
    """
    hashes = [tuple(item.content_hash for item in prompt.media) for prompt, _ in entries]
    longest: dict[Any, int] = {}
    for media, (prompt, _) in zip(hashes, entries, strict=True):
        longest[media] = max(longest.get(media, 0), len(prompt.token_ids))
    keys = []
    for number, (media, (prompt, _)) in enumerate(zip(hashes, entries, strict=True)):
        length = len(prompt.token_ids)
        keys.append((_shapes(prompt), longest[media] if media else length, media, length, number))
    return [entries[number] for *_, number in sorted(keys)]


def num_bytes(prompt: PreparedPrompt) -> int:
    """Bytes of a prompt's media."""
    arrays = [array for item in prompt.media for array in (item.mm_kwargs or {}).values()]
    return sum(array.nbytes for array in arrays) + sum(
        item.embeds.nbytes for item in prompt.media if item.embeds is not None
    )


def _shapes(prompt: PreparedPrompt) -> tuple:
    return tuple(
        (item.modality, tuple((name, array.shape) for name, array in sorted((item.mm_kwargs or {}).items())))
        for item in prompt.media
    )
