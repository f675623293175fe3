"""New keys and values into pages."""

from kernels_pallas.kv_write.api import kv_write

__all__ = ["kv_write"]
