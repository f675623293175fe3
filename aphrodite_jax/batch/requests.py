"""One line of an OpenAI batch file to a request.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
     "body": {"messages": [...], "max_tokens": 20, "temperature": 0}}

``/v1/completions`` with a ``prompt`` (a string or a list of token ids) is served too.
"""

import dataclasses
import json
from typing import Any, NoReturn

from aphrodite_jax.batch.body import derive_seed, sampling_params
from aphrodite_jax.batch.lines import Line
from aphrodite_jax.batch.refusal import Refusal, shorten
from aphrodite_jax.sampling_params import SamplingParams

__all__ = ["BatchRequest", "Defaults", "custom_id_of", "decode_line", "parse_request", "prompt_of"]

_KINDS = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
_INPUT_KEY = {"chat": "messages", "completion": "prompt"}
_ENVELOPE = ("custom_id", "method", "url", "body")
_COMPLETION_MAX_TOKENS = 16
"""What the OpenAI API takes for a completion that gives none; a chat goes on to the model's limit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """What the job says where a line says nothing.

    Attributes:
      model_names: names under which lines may ask for the model; the first stands in the answers.
      context_length: tokens of prompt and answer together, at most.
      max_tokens: generated tokens; None is the context length for a chat and 16 for a completion.
      seed: base of the seeds of lines that give none.
    """

    model_names: tuple[str, ...]
    context_length: int
    max_tokens: int | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """A request that is ready to be given to the engine.

    ``kind`` is "chat" or "completion"; ``source`` is a chat's messages, or a completion's prompt, or a function that
    gives them where that takes a while; ``model`` the name by which it asks for the model.
    """

    custom_id: str
    model: str
    kind: str
    source: Any
    sampling_params: SamplingParams


def decode_line(line: Line) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
      Refusal: it is too long, not UTF-8, not JSON (RFC 8259: no NaN), no object, or names a key twice.
    """
    if line.data is None:
        raise Refusal("the line is longer than the limit of 256 MiB", code="invalid_json")
    try:
        value = json.loads(line.data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except Refusal:
        raise
    except RecursionError as error:
        raise Refusal("the JSON of the line is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        raise Refusal(f"the line is not JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise Refusal(f"a line must hold a JSON object, this one holds {type(value).__name__}", code="invalid_json")
    return value


def custom_id_of(value: dict[str, Any]) -> str:
    """The line's own name.

    Raises:
      Refusal: it has none.
    """
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise Refusal("custom_id must be a non-empty string", code="missing_custom_id", param="custom_id")
    return custom_id


def parse_request(value: dict[str, Any], defaults: Defaults) -> BatchRequest:
    """The request in a line's JSON object.

    Raises:
      Refusal: a key that is missing, unknown, or has a value that can't be served.
    """
    custom_id = custom_id_of(value)
    unknown = [key for key in value if key not in _ENVELOPE]
    if unknown:
        raise Refusal(
            f"unknown key {shorten(unknown[0])}; a line has {', '.join(_ENVELOPE)}",
            code="unknown_key",
            param=unknown[0],
        )
    if value.get("method") != "POST":
        raise Refusal(
            f"method must be 'POST', got {shorten(value.get('method'))}",
            code="invalid_method",
            param="method",
        )
    url = value.get("url")
    kind = _KINDS.get(url) if isinstance(url, str) else None
    if kind is None:
        raise Refusal(
            f"url must be {' or '.join(map(repr, _KINDS))}, got {shorten(url)}",
            code="invalid_url",
            param="url",
            status=404,
        )
    body = value.get("body")
    if not isinstance(body, dict):
        raise Refusal("body must be an object with the request", param="body")
    options = dict(body)
    model = _model(options.pop("model", None), defaults.model_names)
    source = _CHECKS[kind](options.pop(_INPUT_KEY[kind], None))
    limit = defaults.max_tokens or (defaults.context_length if kind == "chat" else _COMPLETION_MAX_TOKENS)
    seed = derive_seed(defaults.seed, custom_id)
    params = sampling_params(kind, options, seed=seed, default_max_tokens=limit)
    return BatchRequest(custom_id=custom_id, model=model, kind=kind, source=source, sampling_params=params)


def prompt_of(source: str | list[int]) -> dict[str, Any]:
    """The engine's form of a completion's prompt."""
    return {"prompt": source} if isinstance(source, str) else {"prompt_token_ids": source}


def _model(name: Any, names: tuple[str, ...]) -> str:
    if name is not None and name not in names:
        raise Refusal(
            f"model {shorten(name)} is not the one that runs, {names[0]!r}; leave 'model' out, or start the job "
            "with --served-model-name",
            code="model_not_found",
            param="model",
            status=404,
        )
    return name or names[0]


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise Refusal("messages must be a list of at least one message", param="messages")
    for index, message in enumerate(value):
        for key, content in message.items():
            if key not in ("role", "content") and content is not None:
                raise Refusal(
                    f"messages[{index}] has {shorten(key)}, which is not supported; role and content are",
                    code="unsupported_option",
                    param=f"messages[{index}]",
                )
    return [{key: message[key] for key in ("role", "content") if key in message} for message in value]


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value):
        return value
    raise Refusal("prompt must be one non-empty string or one list of token ids", param="prompt")


_CHECKS = {"chat": _messages, "completion": _prompt}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Refusal(f"the key {shorten(twice)} is given twice", code="invalid_json", param=twice)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise Refusal(f"the line is not JSON: {name} is not a JSON number", code="invalid_json")
