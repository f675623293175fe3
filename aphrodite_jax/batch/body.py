"""A request body's options: which there are, of which types, and what they become for the engine.

No option is ignored. One that the engine has becomes part of `SamplingParams`; one of the OpenAI API that it
has not is accepted only with a value that asks for nothing; any other name is an error. null counts as
absent.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from aphrodite_jax.batch.refusal import Refusal, shorten
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.sampling_params import SamplingParams

__all__ = ["MAX_ANSWERS", "derive_seed", "sampling_params"]

MAX_ANSWERS = 128
"""Most answers (``n``) of one line, as in the OpenAI API."""

Check = Callable[[Any], str | None]
"""Says what a value must be if it is not; None if it is."""


def _whole(value: Any) -> str | None:
    ok = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**32
    return None if ok else "a whole number of at most 32 bits"


def _number(value: Any) -> str | None:
    if _whole(value) is None or (isinstance(value, float) and math.isfinite(value)):
        return None
    return "a number"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _answers(value: Any) -> str | None:
    ok = _whole(value) is None and 1 <= value <= MAX_ANSWERS
    return None if ok else f"a whole number from 1 to {MAX_ANSWERS}"


def _strings(value: Any) -> str | None:
    ok = isinstance(value, str) or (isinstance(value, list) and all(isinstance(s, str) for s in value))
    return None if ok else "a string or a list of strings"


def _token_ids(value: Any) -> str | None:
    ok = isinstance(value, list) and all(_whole(token) is None for token in value)
    return None if ok else "a list of token ids"


def _bias(value: Any) -> str | None:
    ok = isinstance(value, dict) and all(
        token.isascii() and token.isdigit() and len(token) < 10 and _number(weight) is None
        for token, weight in value.items()
    )
    return None if ok else "an object from token ids to numbers"


_SAMPLING: dict[str, Check] = {
    "n": _answers,
    "temperature": _number,
    "top_p": _number,
    "top_k": _whole,
    "min_p": _number,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "repetition_penalty": _number,
    "seed": _whole,
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "ignore_eos": _flag,
    "max_tokens": _whole,
    "min_tokens": _whole,
    "logit_bias": _bias,
    "skip_special_tokens": _flag,
}
_CHAT: dict[str, Check] = {
    **_SAMPLING,
    "max_completion_tokens": _whole,
    "logprobs": _flag,
    "top_logprobs": _whole,
}
_OPTIONS = {"chat": _CHAT, "completion": _SAMPLING}

# Options of the OpenAI API that the engine has not, with the values (beside null) that ask for nothing.
_NOTHING_ASKED: dict[str, dict[str, tuple[Any, ...]]] = {
    "chat": {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "metadata": (),
        "modalities": (["text"],),
        "parallel_tool_calls": (),
        "prediction": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "service_tier": (),
        "store": (False,),
        "stream": (False,),
        "stream_options": (),
        "tool_choice": ("none",),
        "tools": ([],),
        "user": (),
        "verbosity": (),
        "web_search_options": (),
    },
    "completion": {
        "best_of": (1,),
        "echo": (False,),
        "logprobs": (),
        "stream": (False,),
        "stream_options": (),
        "suffix": ("",),
        "user": (),
    },
}


def derive_seed(base: int, custom_id: str) -> int:
    """A seed of 32 bits for a request that gives none: the same at every run, whatever stands around it."""
    text = f"{base}:{custom_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:4])


def sampling_params(kind: str, options: Mapping[str, Any], *, seed: int, default_max_tokens: int) -> SamplingParams:
    """The engine's form of ``options``: a body without its model, messages and prompt.

    Args:
      kind: "chat" or "completion".
      seed: for a body that gives none.
      default_max_tokens: likewise.

    Raises:
      Refusal: an option that is unknown, not supported, of a wrong type or out of range.
    """
    given = {name: value for name, value in options.items() if _checked(kind, name, value)}
    if "max_completion_tokens" in given:
        if "max_tokens" in given:
            raise Refusal("give max_completion_tokens or max_tokens, not both", param="max_tokens")
        given["max_tokens"] = given.pop("max_completion_tokens")
    top = given.pop("top_logprobs", None)
    if given.pop("logprobs", False):
        given["logprobs"] = top or 0
    elif top is not None:
        raise Refusal("top_logprobs needs logprobs to be true", param="top_logprobs")
    try:
        return SamplingParams(**{"seed": seed, "max_tokens": default_max_tokens, **given})
    except ConfigError as error:
        raise Refusal(str(error).removeprefix("SamplingParams: ")) from error


def _checked(kind: str, name: str, value: Any) -> bool:
    """Whether the option is given and the engine has it; raises where it must not be there."""
    check = _OPTIONS[kind].get(name)
    if check is None:
        _refuse_unless_nothing_asked(kind, name, value)
        return False
    if value is None:
        return False
    if expected := check(value):
        raise Refusal(f"{name} must be {expected}, got {shorten(value)}", param=name)
    return True


def _refuse_unless_nothing_asked(kind: str, name: str, value: Any) -> None:
    harmless = _NOTHING_ASKED[kind].get(name)
    if harmless is None:
        known = ", ".join(sorted({"model", *_OPTIONS[kind]}))
        raise Refusal(f"unknown option {shorten(name)}; known: {known}", code="unknown_option", param=name)
    # Compared with the type, since False == 0 and 1 == True.
    if value is not None and not any(type(value) is type(ok) and value == ok for ok in harmless):
        raise Refusal(
            f"option {name!r} is not supported here (got {shorten(value)}); leave it out",
            code="unsupported_option",
            param=name,
        )
