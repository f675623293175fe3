"""What a request gives back."""

import dataclasses

__all__ = ["CompletionOutput", "Logprob", "MediaInfo", "RequestOutput"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprob:
    """Log-probability (natural log) of one candidate, its rank from 1, and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One answer.

    ``finish_reason`` is "stop" (end token, stop token or stop string), "length" (max_tokens or the model's
    limit), "abort", or None while it runs. ``stop_reason`` is the stop string or stop token id that ended it;
    None for the end token. ``logprobs`` has one dict per token, token id to `Logprob`, if asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    cumulative_logprob: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaInfo:
    """What became of one media item of a prompt.

    Attributes:
      modality: "image", say.
      offset, num_tokens: its place among ``prompt_token_ids``.
      num_rows: tokens of these that stand for rows of the encoded item.
      frame_indices: frames that were taken of a video file; None for anything else.
      timestamps: seconds of a video's frames from its start, as far as they are known.
    """

    modality: str
    offset: int
    num_tokens: int
    num_rows: int
    frame_indices: tuple[int, ...] | None = None
    timestamps: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A request's state: its prompt and its answers so far.

    ``error`` is the exception that refused the request; then ``outputs`` is empty and ``finished`` true.
    ``prompt_token_ids`` are those after the placeholders were expanded; ``media`` are the prompt's items in their
    order there. ``prompt_logprobs`` has None for the first token.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...] = ()
    outputs: tuple[CompletionOutput, ...] = ()
    finished: bool = False
    error: Exception | None = None
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    media: tuple[MediaInfo, ...] = ()
