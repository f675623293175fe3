"""Logits to tokens: pure functions over a batch of requests that each have their own options."""

from aphrodite_jax.sampling.batch import (
    SamplingBatch,
    SamplingRow,
    build_sampling_batch,
    check_sampling_params,
    is_plain_greedy,
    uses_history,
)
from aphrodite_jax.sampling.logprobs import TokenLogprobs, prompt_logprobs
from aphrodite_jax.sampling.sampler import SampledTokens, sample, sample_greedy

__all__ = [
    "SampledTokens",
    "SamplingBatch",
    "SamplingRow",
    "TokenLogprobs",
    "build_sampling_batch",
    "check_sampling_params",
    "is_plain_greedy",
    "prompt_logprobs",
    "sample",
    "sample_greedy",
    "uses_history",
]
