"""A step's draw under top-k and top-p beside one that sorts the vocabulary, as ratios of time.

    python benchmarks/sampling.py                                  # about two minutes on an idle machine
    python benchmarks/sampling.py --requests 64 --vocab 152064     # one batch of one size

The peer sorts each row, as Hugging Face's ``TopPLogitsWarper`` does, and draws with the same noise. Both take turns;
below 1 is faster than the peer. Each request has options of its own, so that top-k is data and not a shape. The last
line is the table as JSON.
"""

import argparse
import json
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from aphrodite_jax.sampling import SamplingRow, build_sampling_batch, sample
from aphrodite_jax.sampling_params import SamplingParams
from kernels_pallas.benchmark.cpu import measure

OPTIONS: dict[str, dict[str, float]] = {
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
}
SIZES = ((1, 49_152), (8, 49_152), (64, 49_152), (8, 152_064))
"""Requests, and tokens of the vocabulary."""


def ours(logits, batch):
    """A token of each row."""
    return sample(logits, batch, num_logprobs=0).token_ids


def by_sorting(logits, batch):
    """A token of each row, from a sorted copy of its logits."""
    scaled = logits / batch.temperature[:, None]
    ordered = jnp.sort(scaled, axis=1, descending=True)
    in_top_k = jnp.arange(logits.shape[1])[None] < batch.top_k[:, None]
    p = jax.nn.softmax(jnp.where(in_top_k, ordered, -jnp.inf), axis=1)
    kept = in_top_k & (jnp.cumsum(p, axis=1) - p < batch.top_p[:, None])
    least = jnp.where(kept, ordered, jnp.inf).min(axis=1)
    scaled = jnp.where(scaled >= least[:, None], scaled, -jnp.inf)

    def draw(seed, step, row):
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), row)

    return jax.vmap(draw)(batch.seed, batch.step, scaled)


def problem(requests: int, vocab_size: int, options: dict):
    """Logits whose likeliest tokens have most of the weight, as a model's, and a batch of equal options."""
    rng = np.random.default_rng(0)
    logits = rng.gumbel(size=(requests, vocab_size)).astype(np.float32) * 1.5
    rows = [
        SamplingRow(params=SamplingParams(**options), seed=i, prompt_token_ids=(), output_token_ids=())
        for i in range(requests)
    ]
    batch = build_sampling_batch(rows, num_rows=requests, vocab_size=vocab_size, history_width=0)
    return jax.device_put((logits, batch))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, help="of one batch in the place of several")
    parser.add_argument("--vocab", type=int, default=49_152, help="its vocabulary")
    parser.add_argument("--seconds", type=float, default=5, help="time for each case")
    given = parser.parse_args()
    sizes = SIZES if given.requests is None else ((given.requests, given.vocab),)
    print(f"{'requests':>8} {'vocabulary':>10}  {'options':20} {'ours ms':>9} {'peer ms':>9} {'ratio':>6}")
    table = {}
    for requests, vocab_size in sizes:
        for name, options in OPTIONS.items():
            arguments = problem(requests, vocab_size, options)
            (wall, _), (peer_wall, _) = measure([ours, by_sorting], arguments, given.seconds)  # their tokens are equal
            table[f"{requests} x {vocab_size}, {name}"] = round(wall / peer_wall, 3)
            times = f"{wall * 1e3:9.2f} {peer_wall * 1e3:9.2f} {wall / peer_wall:6.2f}"
            print(f"{requests:8} {vocab_size:10}  {name:20} {times}", flush=True)
    print(json.dumps({"benchmark": "sampling", "jax": jax.__version__, "ours_over_sorting": table}))


if __name__ == "__main__":
    main()
