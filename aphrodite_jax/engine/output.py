"""What a request gives back, from what its sequences hold."""

from collections.abc import Sequence as SequenceOf

from aphrodite_jax.engine.sequence import PreparedPrompt, Sequence, SequenceStatus
from aphrodite_jax.outputs import CompletionOutput, Logprob, RequestOutput
from aphrodite_jax.sampling import SampledTokens

__all__ = ["LogprobReader", "request_output"]


class LogprobReader:
    """Turns rows of sampled arrays into dicts of `Logprob`, with each token's text."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def read(self, sampled: SampledTokens, row: int, token: int, count: int) -> dict[int, Logprob]:
        """The ``count`` likeliest tokens of a row, and ``token`` itself."""
        result = {
            int(candidate): Logprob(logprob=float(logprob), rank=rank, decoded_token=self._text(int(candidate)))
            for rank, (candidate, logprob) in enumerate(
                zip(sampled.top_ids[row][:count], sampled.top_logprobs[row][:count], strict=True), start=1
            )
        }
        if token not in result:
            result[token] = Logprob(
                logprob=float(sampled.logprobs[row]),
                rank=int(sampled.ranks[row]),
                decoded_token=self._text(token),
            )
        return result

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]


def request_output(
    request_id: str, prompt: PreparedPrompt, sequences: SequenceOf[Sequence], prompt_logprobs: list | None
) -> RequestOutput:
    """A request's state now; the text of a running answer is what is sure not to change."""
    return RequestOutput(
        request_id=request_id,
        prompt=prompt.text,
        prompt_token_ids=prompt.token_tuple,
        outputs=tuple(_completion(index, sequence) for index, sequence in enumerate(sequences)),
        finished=all(sequence.status is SequenceStatus.FINISHED for sequence in sequences),
        prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
        media=tuple(item.info for item in prompt.media),
    )


def _completion(index: int, sequence: Sequence) -> CompletionOutput:
    finished = sequence.status is SequenceStatus.FINISHED
    asked = sequence.params.logprobs is not None
    return CompletionOutput(
        index=index,
        text=sequence.detokenizer.finish() if finished else sequence.detokenizer.text,
        token_ids=tuple(sequence.output_ids),
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        logprobs=tuple(sequence.logprobs) if asked else None,
        cumulative_logprob=sequence.cumulative_logprob if asked else None,
    )
