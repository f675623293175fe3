"""The sampler in plain NumPy and float64, one row at a time, written to be obviously right."""

import jax
import numpy as np

from aphrodite_jax.sampling import SamplingRow
from aphrodite_jax.sampling_params import SamplingParams


def row(prompt=(), output=(), end=(), seed=0, **params) -> SamplingRow:
    """A row of a batch; ``params`` are those of `SamplingParams`."""
    return SamplingRow(
        params=SamplingParams(**params),
        seed=seed,
        prompt_token_ids=prompt,
        output_token_ids=output,
        end_token_ids=end,
    )


def processed_logits(logits: np.ndarray, row: SamplingRow) -> np.ndarray:
    """Bias and bans, then penalties."""
    params, logits = row.params, logits.astype(np.float64)
    for token, value in dict(params.logit_bias or ()).items():
        logits[token] += value
    if len(row.output_token_ids) < params.min_tokens:
        for token in (*row.end_token_ids, *params.stop_token_ids):
            logits[token] = -np.inf
    output, seen = list(row.output_token_ids), {*row.prompt_token_ids, *row.output_token_ids}
    for token in seen:
        if logits[token] > 0:
            logits[token] /= params.repetition_penalty
        else:
            logits[token] *= params.repetition_penalty
    for token in set(output):
        logits[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return logits


def order(logits: np.ndarray) -> list[int]:
    """Token ids, the likeliest first, of equals the lowest id."""
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def kept_tokens(logits: np.ndarray, *, temperature, top_k, top_p, min_p) -> set[int]:
    """Tokens that may be drawn."""
    p = probabilities(logits / temperature)
    ordered = order(logits)
    if top_k > 0:
        ordered = ordered[:top_k]
    if top_p < 1:
        mass = sum(p[token] for token in ordered)
        reached = np.cumsum([p[token] for token in ordered])
        ordered = ordered[: 1 + int((reached < top_p * mass).sum())]
    return {token for token in ordered if p[token] >= min_p * p.max()}


def gumbel(seed: int, step: int, vocab_size: int) -> np.ndarray:
    """The noise that the contract names: of ``fold_in(key(seed), step)``."""
    key = jax.random.fold_in(jax.random.key(np.uint32(seed)), step)
    return np.asarray(jax.random.gumbel(key, (vocab_size,)), np.float64)


def logprobs(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    largest = logits.max()
    return logits - largest - np.log(np.exp(logits - largest).sum())
