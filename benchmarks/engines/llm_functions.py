"""The functions of `protocol` for an engine with vLLM's interface, which aphrodite_jax shares."""

import itertools
import time
from collections.abc import Callable
from typing import Any

from protocol import drive, picture


def llm_functions(
    llm: Any, engine: Any, sampling_params: Callable[..., Any], **generate_options
) -> dict[str, Callable]:
    """``generate`` and ``latency``.

    Args:
      llm: has ``generate(prompts, sampling_params, **generate_options)``.
      engine: has ``add_request(request_id, prompt, sampling_params)`` and ``step()``.
      sampling_params: the class of a request's options.
    """
    runs = itertools.count()

    def prompt(request: dict) -> tuple[dict, Any]:
        made: dict[str, Any] = {"prompt": request["text"]}
        if request["images"]:
            made["multi_modal_data"] = {"image": [picture(seed) for seed in request["images"]]}
        return made, sampling_params(temperature=0.0, ignore_eos=True, max_tokens=request["max_tokens"])

    def generate(requests: list[dict]) -> dict:
        """Answer all, greedily and to their full length."""
        prompts, params = map(list, zip(*map(prompt, requests), strict=True))
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False, **generate_options)
        seconds = time.perf_counter() - begin
        prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        return {"seconds": seconds, "tokens": tokens, "prompt_tokens": prompt_tokens}

    def latency(requests: list[dict], in_flight: int) -> dict:
        """When tokens come with so many requests in flight."""
        run = next(runs)

        def add(request_id, request):
            engine.add_request(f"{run}-{request_id}", *request)

        def step():
            for output in engine.step():
                yield output.request_id.split("-")[1], len(output.outputs[0].token_ids), output.finished

        return drive([prompt(request) for request in requests], in_flight, add, step)

    return {"generate": generate, "latency": latency}
