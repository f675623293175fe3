"""How long a program takes at least: from bytes, operations and what devices tell each other.

    memory      bytes that must come from a device's memory, over its bandwidth
    operations  those of matrix products, over the peak
    exchange    bytes that a device must send, over its links; nothing else goes on meanwhile

The floor is the longer of the first two, and the third.
"""

import dataclasses

from aphrodite_jax.planning.targets import Target

__all__ = ["Floor", "all_gather_bytes", "all_reduce_bytes", "all_to_all_bytes", "floor_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """Bytes, operations and bytes sent of one run on one device, and the seconds that each takes at least."""

    bytes: float
    flops: float
    sent: float
    memory_seconds: float
    flops_seconds: float
    exchange_seconds: float

    @property
    def seconds(self) -> float:
        """At least, all together."""
        return max(self.memory_seconds, self.flops_seconds) + self.exchange_seconds


def floor_of(target: Target, *, bytes: float, flops: float, sent: float) -> Floor:
    """The floor of a program that reads and writes ``bytes``, and sends ``sent``, on each device."""
    return Floor(
        bytes=bytes,
        flops=flops,
        sent=sent,
        memory_seconds=bytes / target.bandwidth,
        flops_seconds=flops / target.flops,
        exchange_seconds=0.0 if target.egress is None else sent / target.egress,
    )


def all_reduce_bytes(size: float, devices: int) -> float:
    """That each device sends so that all have the sum of their ``size`` bytes: each part goes round twice."""
    return 2 * size * (devices - 1) / devices


def all_gather_bytes(size: float, devices: int) -> float:
    """That each device sends so that all have the whole ``size`` bytes, of which each has its part."""
    return size * (devices - 1) / devices


def all_to_all_bytes(size: float, devices: int) -> float:
    """That each device sends of its part of ``size`` bytes, of which every device wants an equal share."""
    return size * (devices - 1) / devices**2
