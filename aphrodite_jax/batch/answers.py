"""A finished request to its output line, in the OpenAI batch output format.

A line is a function of the input and the job's options alone: ids count lines, ``created`` is 0, keys have
one order. So a run that was interrupted ends with the same bytes as one that was not.
"""

import dataclasses
import json
import math
from typing import Any

from aphrodite_jax.batch.refusal import Refusal, refusal_of
from aphrodite_jax.batch.requests import BatchRequest
from aphrodite_jax.outputs import CompletionOutput, Logprob, RequestOutput

__all__ = ["OutputLine", "answer_line", "answer_value", "json_line", "line_id", "refusal_line", "refusal_of_output"]

_LOWEST_LOGPROB = -9999.0
"""What the OpenAI API writes for a token of probability zero, since JSON has no infinity."""


@dataclasses.dataclass(frozen=True)
class OutputLine:
    """One line of the output, its end included, and whether it is an answer or an error."""

    data: bytes
    answered: bool


def line_id(number: int) -> str:
    """The id of the answer to line ``number`` of the input, counted from 1."""
    return f"batch_req_{number:09d}"


def answer_line(number: int, request: BatchRequest, output: RequestOutput) -> OutputLine:
    """The output line of a request that was answered."""
    return OutputLine(json_line(answer_value(number, request, output)), answered=True)


def answer_value(number: int, request: BatchRequest, output: RequestOutput) -> dict[str, Any]:
    """What the line of a request that was answered holds, as JSON values."""
    chat, num_logprobs = request.kind == "chat", request.sampling_params.logprobs
    num_completion = sum(len(answer.token_ids) for answer in output.outputs)
    num_prompt = len(output.prompt_token_ids)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{number:09d}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": request.model,
        "choices": [
            _chat_choice(answer, num_logprobs) if chat else _completion_choice(answer) for answer in output.outputs
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
        },
    }
    return _value(number, request.custom_id, 200, body, None)


def refusal_of_output(output: RequestOutput) -> Refusal | None:
    """Why a finished request has no answer; None if it has one that can be written.

    Log-probabilities that are no numbers, which come of a model that overflows, have no form in JSON.
    """
    if output.error is not None:
        return refusal_of(output.error)
    for answer in output.outputs:
        for candidates in answer.logprobs or ():
            if not all(candidate.logprob < math.inf for candidate in candidates.values()):
                return Refusal(
                    "the model gave log-probabilities that are no numbers, as one does that overflows in float16: "
                    "load it with dtype='bfloat16' or 'float32' (--dtype)",
                    code="invalid_output",
                    status=500,
                )
    return None


def refusal_line(number: int, custom_id: str | None, refusal: Refusal) -> OutputLine:
    """The line for a request that was not answered: the error in the response, and beside it."""
    error = {"code": refusal.code, "message": str(refusal)}
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    body = {"error": {"message": str(refusal), "type": kind, "param": refusal.param, "code": refusal.code}}
    return OutputLine(json_line(_value(number, custom_id, refusal.status, body, error)), answered=False)


def json_line(value: Any) -> bytes:
    """One line of JSON, in ASCII: no reader splits it at U+2028, and lone surrogates of the input survive."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def _value(number: int, custom_id: str | None, status: int, body: Any, error: Any) -> dict[str, Any]:
    return {
        "id": line_id(number),
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{number:09d}", "body": body},
        "error": error,
    }


def _chat_choice(answer: CompletionOutput, num_logprobs: int | None) -> dict[str, Any]:
    return {
        "index": answer.index,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": None if num_logprobs is None else {"content": _logprobs(answer, num_logprobs), "refusal": None},
        "finish_reason": answer.finish_reason,
    }


def _completion_choice(answer: CompletionOutput) -> dict[str, Any]:
    return {
        "index": answer.index,
        "text": answer.text,
        "logprobs": None,
        "finish_reason": answer.finish_reason,
    }


def _logprobs(answer: CompletionOutput, num_logprobs: int) -> list[dict[str, Any]]:
    """The chosen token at each position, with the ``num_logprobs`` most likely ones beside it."""
    content = []
    for token_id, candidates in zip(answer.token_ids, answer.logprobs or (), strict=True):
        best = sorted((c for c in candidates.values() if c.rank <= num_logprobs), key=lambda c: c.rank)
        content.append({**_candidate(candidates[token_id]), "top_logprobs": [_candidate(c) for c in best]})
    return content


def _candidate(candidate: Logprob) -> dict[str, Any]:
    text = candidate.decoded_token
    return {
        "token": text,
        "logprob": max(candidate.logprob, _LOWEST_LOGPROB),
        # A token that is part of a character has no text of its own to take the bytes from.
        "bytes": None if "\ufffd" in text else list(text.encode("utf-8", "surrogatepass")),
    }
