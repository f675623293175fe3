"""Why one line is not answered, in the OpenAI API's terms."""

import re
from typing import Any

from aphrodite_jax.errors import (
    MediaError,
    PlaceholderError,
    PromptTooLongError,
    RequestError,
    TooManyItemsError,
)

__all__ = ["Refusal", "refusal_of", "shorten"]

_CODES: tuple[tuple[type[Exception], str], ...] = (
    (PromptTooLongError, "context_length_exceeded"),
    (TooManyItemsError, "too_many_items"),
    (MediaError, "invalid_media"),
    (PlaceholderError, "placeholder_mismatch"),
    (ValueError, "invalid_request"),
)


class Refusal(RequestError):
    """One line's error: an HTTP status, a code, and the option to blame if there is one."""

    def __init__(self, message: str, *, code: str = "invalid_value", param: str | None = None, status: int = 400):
        super().__init__(message)
        self.code, self.param, self.status = code, param, status


def refusal_of(error: Exception) -> Refusal:
    """``error`` of a request as its line's error; what is not a mistake of the request has status 500."""
    if isinstance(error, Refusal):
        return error
    # An object's address differs from run to run; the line must not.
    message = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))
    for kind, code in _CODES:
        if isinstance(error, kind):
            return Refusal(message, code=code)
    return Refusal(f"{type(error).__name__}: {message}", code="internal_error", status=500)


def shorten(value: Any) -> str:
    """``value`` as it may stand in a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
