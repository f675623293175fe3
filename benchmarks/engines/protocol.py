"""What a benchmark and an engine in a process of its own say to each other: lines of JSON on stdin and stdout.

The first line starts the engine, ``{"checkpoint": ..., ...}``. Each other asks for one of its functions,
``{"call": "generate", "requests": [...], ...}``. One line answers each, ``{"error": ...}`` where it failed.
A request is ``{"text", "images", "max_tokens"}``; its images are the seeds of `picture`. Needs numpy and Pillow alone,
since it runs in the environment of every peer.
"""

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image

Start = Callable[..., tuple[dict[str, str], Mapping[str, Callable[..., dict]]]]
"""Starts an engine: a checkpoint and options to versions and the functions that a line may call."""

IMAGE_SIZE = 112
"""Pixels; that of the checkpoints' towers, so that how an engine resizes does not change what the model sees."""


def picture(seed: int) -> Image.Image:
    """Blocks of random colors."""
    blocks = np.random.default_rng(seed).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST)


def serve(start: Start) -> None:
    """Answer the lines of stdin until it ends; what else is printed goes to stderr.

    The first line holds the arguments of ``start``; its answer tells the seconds that this took, and the versions.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    functions: Mapping[str, Callable[..., dict]] = {}
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            if functions:
                reply = functions[arguments.pop("call")](**arguments)
            else:
                begin = time.perf_counter()
                versions, functions = start(**arguments)
                reply = {"seconds": time.perf_counter() - begin, "versions": versions}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


def drive(
    requests: list[Any],
    in_flight: int,
    add: Callable[[str, Any], None],
    step: Callable[[], Iterable[tuple[str, int, bool]]],
) -> dict:
    """Keep ``in_flight`` requests running until all are answered, and say when their tokens came.

    Args:
      requests: what ``add`` takes; the next is added when one finishes.
      in_flight: the most that run at the same time.
      add: hands a request and its id to the engine.
      step: runs the engine once; for each request with news its id, its tokens so far, and whether that is all.
    """
    arrivals: dict[str, list[tuple[float, int]]] = {}  # id to (time, tokens so far), from (time added, 0) on
    waiting = list(enumerate(requests))[::-1]
    running: set[str] = set()
    begin = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < in_flight:
            number, request = waiting.pop()
            request_id = str(number)
            arrivals[request_id] = [(time.perf_counter(), 0)]
            add(request_id, request)
            running.add(request_id)
        for request_id, num_tokens, finished in step():
            if num_tokens > arrivals[request_id][-1][1]:
                arrivals[request_id].append((time.perf_counter(), num_tokens))
            if finished:
                running.discard(request_id)
    return {"seconds": time.perf_counter() - begin} | token_times(arrivals.values())


def token_times(arrivals: Iterable[list[tuple[float, int]]]) -> dict:
    """Milliseconds to the first token, and of the gaps between arrivals, over all requests.

    ``per_token`` is a request's time from the first token to the last over the tokens between; ``gap`` is what a
    reader waits for the next piece of text, which stands out where decoding stalls.
    """
    firsts, means, gaps = [], [], []
    for (added, _), (first, num_first), *rest in arrivals:
        firsts.append(first - added)
        if rest:
            last, num_last = rest[-1]
            means.append((last - first) / (num_last - num_first))
            gaps += np.diff([first, *(when for when, _ in rest)]).tolist()
    found = {"first_token_p50": statistics.median(firsts), "first_token_max": max(firsts)}
    if means:
        p99 = float(np.quantile(gaps, 0.99))
        found |= {"per_token_p50": statistics.median(means), "gap_p50": statistics.median(gaps), "gap_p99": p99}
    return {name: round(value * 1e3, 2) for name, value in found.items()}
