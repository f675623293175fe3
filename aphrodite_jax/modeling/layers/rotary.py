"""Rotary position embeddings and every scaling of them that Llama-like configs name.

RoPE: https://arxiv.org/abs/2104.09864. Scalings must equal ``transformers.modeling_rope_utils``: linear,
dynamic NTK, YaRN (https://arxiv.org/abs/2309.00071), LongRoPE (https://arxiv.org/abs/2402.13753), Llama 3's and
the proportional one, which turns a part of each head.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jaxtyping import Array, Float, Int

from aphrodite_jax.errors import ConfigError

__all__ = ["RotaryTable", "angles_depend_on_length", "apply_rotary", "axis_of_pairs", "rotary_table"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RotaryTable:
    """Cosine and sine of each row's angles, ``[T, rotary_dim / 2]``, or of a batch of such rows; float32."""

    cos: Float[Array, "*B T half"]
    sin: Float[Array, "*B T half"]


def angles_depend_on_length(config: transformers.PretrainedConfig) -> bool:
    """Whether a row's angles depend on its request's length too, so that equal prefixes have other keys."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(x for x in parameters.values() if isinstance(x, dict))]  # or one set for each kind of layer
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def apply_rotary(x: Float[Array, "*B T N H"], table: RotaryTable) -> Float[Array, "*B T N H"]:
    """Rotate the pairs ``(x[i], x[i + half])`` of each head; dimensions past the table stay as they are."""
    half = table.cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    cos, sin = table.cos[..., None, :], table.sin[..., None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def rotary_table(
    config: transformers.PretrainedConfig,
    positions: Int[Array, " T"] | Int[Array, "axes T"],
    lengths: Int[Array, " T"],
    *,
    parameters: Mapping[str, Any] | None = None,
) -> RotaryTable:
    """Angles for rows at ``positions`` of requests that are ``lengths`` tokens long when the row is computed.

    ``lengths`` is ``max(position + 1, tokens of the prompt)``: scalings that depend on the length (dynamic,
    longrope) must give a row the same angles however its prompt is cut into chunks. ``parameters`` are those of one
    kind of layers where kinds differ; else the config's ``rope_parameters``. Where rows have positions on several
    axes, each pair of a head turns by that of one of them (`axis_of_pairs`).

    Raises:
      ConfigError: the config names a scaling that is not supported, or does not tell the axes of the pairs.
    """
    parameters = config.rope_parameters if parameters is None else parameters
    kind = parameters.get("rope_type", "default")
    if kind not in _SCALINGS:
        raise ConfigError(f"rope_type {kind!r} is not supported; there are {', '.join(sorted(_SCALINGS))}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # The proportional kind spreads its frequencies over the whole head, though only a part of it turns.
    turning = 1.0 if kind == "proportional" else parameters.get("partial_rotary_factor", 1.0)
    dim = int(head_dim * turning)
    if positions.ndim == 1:
        turns = positions[:, None]
    else:
        if angles_depend_on_length(config):
            raise ConfigError(f"rope_type {kind!r} is not supported with positions on {len(positions)} axes")
        turns = positions[axis_of_pairs(parameters, len(positions), dim // 2)].T  # [T, pairs]
    frequencies, attention_factor = _SCALINGS[kind](config, parameters, dim, lengths)
    angles = turns.astype(jnp.float32) * jnp.atleast_2d(jnp.asarray(frequencies, jnp.float32))
    factor = jnp.float32(attention_factor)
    return RotaryTable(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def axis_of_pairs(parameters: Mapping[str, Any], axes: int, pairs: int) -> Int[np.ndarray, " pairs"]:
    """For each pair of a head the axis whose position turns it (M-RoPE, https://arxiv.org/abs/2409.12191).

    ``mrope_section`` tells how many pairs each axis has. They stand one axis after the other, or, with
    ``mrope_interleaved``, by turns while both last, and all others are the first axis'. Sections of 4, 2 and 2:

        one after the other   0 0 0 0 1 1 2 2
        interleaved           0 1 2 0 1 2 0 0

    Raises:
      ConfigError: there are no sections, or not of all pairs.
    """
    section = parameters.get("mrope_section")
    if section is None or len(section) != axes or sum(section) != pairs:
        raise ConfigError(
            f"mrope_section {section} is not supported: it tells for each of {axes} axes of positions how many of the "
            f"{pairs} pairs of a head turn by it"
        )
    if not parameters.get("mrope_interleaved", False):
        return np.repeat(np.arange(axes), section)
    axis_of_pair = np.zeros(pairs, int)
    for axis in range(1, axes):
        axis_of_pair[axis : axes * section[axis] : axes] = axis
    return axis_of_pair


# Each scaling: (config, rope parameters, dim, lengths [T]) -> (frequencies [half] or [T, half], attention factor).


def _default(config, parameters, dim, lengths):
    return _frequencies(parameters["rope_theta"], dim), 1.0


def _linear(config, parameters, dim, lengths):
    return _frequencies(parameters["rope_theta"], dim) / np.float32(parameters["factor"]), 1.0


def _dynamic(config, parameters, dim, lengths):
    """The base grows with the length once it is past the trained one."""
    trained, factor = config.max_position_embeddings, parameters["factor"]
    ratio = jnp.maximum(lengths, trained).astype(jnp.float32) / trained
    base = parameters["rope_theta"] * (factor * ratio - (factor - 1)) ** (dim / (dim - 2))
    exponents = jnp.asarray(np.arange(0, dim, 2, dtype=np.float32) / dim)
    return 1.0 / base[:, None] ** exponents[None], 1.0


def _yarn(config, parameters, dim, lengths):
    """Fast-turning pairs keep their frequency, slow ones are divided by the factor, a ramp stands between."""
    base, trained = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or config.max_position_embeddings / trained
    beta_fast, beta_slow = parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1

    def pair_that_turns(times):  # index of the pair that turns so often over the trained length
        return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - low) / ((high - low) or 0.001)
    kept = 1 - np.clip(ramp, 0, 1)
    frequencies = _frequencies(base, dim)
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        both = mscale and mscale_all
        attention_factor = (
            _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all) if both else _yarn_mscale(factor)
        )
    return frequencies / np.float32(factor) * (1 - kept) + frequencies * kept, attention_factor


def _yarn_mscale(factor, weight=1.0):
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(config, parameters, dim, lengths):
    """One divisor per pair, from a long list where the request is past the trained length, else a short one."""
    trained = parameters["original_max_position_embeddings"]
    frequencies = _frequencies(parameters["rope_theta"], dim)
    short, long = (
        jnp.asarray(frequencies / np.asarray(parameters[name], np.float32)) for name in ("short_factor", "long_factor")
    )
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        factor = parameters.get("factor") or config.max_position_embeddings / trained
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    return jnp.where((lengths > trained)[:, None], long[None], short[None]), attention_factor


def _llama3(config, parameters, dim, lengths):
    """Long waves are stretched by the factor, short ones kept, a linear ramp in frequency between."""
    frequencies = _frequencies(parameters["rope_theta"], dim)
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - kept) / parameters["factor"] + kept) * frequencies, 1.0


def _proportional(config, parameters, dim, lengths):
    """The first pairs turn as fast as in a whole head; the others stand still."""
    turning = int(parameters.get("partial_rotary_factor", 1.0) * dim // 2)
    frequencies = _frequencies(parameters["rope_theta"], dim)
    frequencies[turning:] = 0
    return frequencies / np.float32(parameters.get("factor", 1.0)), 1.0


def _frequencies(base: float, dim: int) -> np.ndarray:
    return (1.0 / base ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)


_SCALINGS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
