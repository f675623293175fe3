"""Norms that towers share."""

from flax import nnx

__all__ = ["layer_norm"]


def layer_norm(width: int, epsilon: float, *, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm; two passes for the variance, since one loses digits that parity needs."""
    kw = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, **kw)
