"""Names for full pages: equal names, equal keys and values.

A page's keys and values depend on its tokens, on the media that stand in it, on which keys its rows see, and on all
that stands before it. A key is a hash of just that, chained from page to page:

    key[i] = hash(key[i - 1], tokens, row intervals of every mask kind, positions, (hash, first row) of each item)

So two different images never share a page, and a system prompt always does. Row intervals count because a prefix-LM's
rows see the whole of their own prompt.
"""

import hashlib

import numpy as np

from aphrodite_jax.engine.sequence import PreparedPrompt, Sequence

__all__ = ["page_keys", "reusable_pages"]


def page_keys(sequence: Sequence, page_size: int, num_tokens: int) -> list[bytes]:
    """Keys of the full pages among the first ``num_tokens`` tokens, which must be known; they are kept."""
    keys = sequence.page_keys
    for index in range(len(keys), num_tokens // page_size):
        begin, end = index * page_size, (index + 1) * page_size
        digest = hashlib.blake2b(keys[-1] if keys else sequence.prompt.key_salt, digest_size=16)
        digest.update(np.ascontiguousarray(sequence.tokens(begin, end)).tobytes())
        for kind, rows in sorted(sequence.intervals(begin, end).items()):
            digest.update(kind.encode())
            digest.update(np.asarray(rows.start, np.int32).tobytes())
            digest.update(np.asarray(rows.stop, np.int32).tobytes())
        positions = sequence.positions(begin, end)
        if positions is not None:
            digest.update(np.ascontiguousarray(positions).tobytes())
        for item in sequence.prompt.media:
            if item.placeholder.offset < end and begin < item.placeholder.stop:
                digest.update(f"{item.content_hash} {begin - item.placeholder.offset}".encode())
        keys.append(digest.digest())
    return keys[: num_tokens // page_size]


def reusable_pages(prompt: PreparedPrompt, page_size: int, num_pages: int) -> int:
    """Of ``num_pages`` first pages that are known, those up to a place where no row before sees past it.

    At least one token is left to compute logits from. What follows the prompt may be cut anywhere.
    """
    while num_pages > 0:
        end = num_pages * page_size
        if end > len(prompt.token_ids) or prompt.may_end[end - 1]:
            break
        num_pages -= 1
    return num_pages
