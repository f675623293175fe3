"""How one request's tokens are chosen, and when it stops."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from aphrodite_jax.errors import ConfigError

__all__ = ["MAX_LOGIT_BIAS", "MAX_LOGPROBS", "SamplingParams"]

MAX_LOGPROBS = 20
"""Most alternatives a request may ask for in ``logprobs`` and ``prompt_logprobs``."""
MAX_LOGIT_BIAS = 300
"""Most tokens that ``logit_bias`` may name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's sampling options; checked when built.

    Attributes:
      n: answers per prompt.
      temperature: 0 is greedy.
      top_p: nucleus mass in (0, 1]; top_k: candidates kept, -1 or 0 is all; min_p: floor relative to the
        most likely token, in [0, 1].
      presence_penalty, frequency_penalty: in [-2, 2], over generated tokens; repetition_penalty: > 0, over
        prompt and generated tokens (CTRL, https://arxiv.org/abs/1909.05858).
      seed: 32 bits; the same seed gives the same tokens whatever else is in the batch. None draws one from
        the engine's seed and the request's number.
      stop: strings that end the answer and are cut from it; stop_token_ids: tokens that end it.
      ignore_eos: go on after the end-of-text token.
      max_tokens, min_tokens: generated tokens; no end or stop token is chosen before ``min_tokens``.
      logprobs, prompt_logprobs: alternatives to return per token, 0 to 20; None returns none.
      logit_bias: token id to a number in [-100, 100] added to its logit; a mapping, or pairs as they are kept.
      skip_special_tokens: leave special tokens out of the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Any = None  # pairs sorted by token once built
    skip_special_tokens: bool = True

    def __post_init__(self):
        def put(name, value):
            object.__setattr__(self, name, value)

        put("stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        put("stop_token_ids", tuple(int(token) for token in self.stop_token_ids or ()))
        bias = _pairs(self.logit_bias)
        put("logit_bias", self.logit_bias if bias is None else bias)
        for name, ok, rule in (
            ("n", _whole(self.n) and self.n >= 1, "a whole number of at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", _whole(self.top_k) and self.top_k >= -1, "-1 or 0 (all) or at least 1"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("seed", self.seed is None or (_whole(self.seed) and 0 <= self.seed < 2**32), "in [0, 2**32)"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "non-empty strings"),
            ("max_tokens", _whole(self.max_tokens) and self.max_tokens >= 1, "at least 1"),
            (
                "min_tokens",
                _whole(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens,
                "between 0 and max_tokens",
            ),
            ("logprobs", _count(self.logprobs), f"None or 0 to {MAX_LOGPROBS}"),
            ("prompt_logprobs", _count(self.prompt_logprobs), f"None or 0 to {MAX_LOGPROBS}"),
            (
                "logit_bias",
                bias is not None and len(bias) <= MAX_LOGIT_BIAS and all(-100 <= value <= 100 for _, value in bias),
                f"token ids to values in [-100, 100], at most {MAX_LOGIT_BIAS}, each once",
            ),
        ):
            if not ok:
                raise ConfigError(f"SamplingParams: {name} must be {rule}, got {getattr(self, name)!r}")


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(value) -> bool:
    return value is None or (_whole(value) and 0 <= value <= MAX_LOGPROBS)


def _pairs(bias: Any) -> tuple[tuple[int, float], ...] | None:
    """Pairs of token and value, sorted by token; None for what is no mapping and no pairs, or names a token twice."""
    given = () if bias is None else bias.items() if isinstance(bias, Mapping) else bias
    try:
        pairs = sorted((int(token), float(value)) for token, value in given)
    except (TypeError, ValueError, OverflowError):
        return None
    return tuple(pairs) if len(dict(pairs)) == len(pairs) else None
