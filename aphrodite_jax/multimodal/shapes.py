"""Few sizes for many: what numbers of patches or rows are padded to."""

__all__ = ["next_step"]


def next_step(count: int) -> int:
    """The first of 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on that holds ``count``: less than half of it is added."""
    power = 2 ** (count - 1).bit_length()
    return power * 3 // 4 if power > 2 and count <= power * 3 // 4 else power
