"""Serves vLLM by `protocol`; runs in vLLM's own environment."""

import torch
import vllm
from llm_functions import llm_functions
from protocol import serve


def start(checkpoint: str, **options):
    """The engine with these options of `vllm.LLM`."""
    llm = vllm.LLM(checkpoint, dtype="float32", **options)
    versions = {"vllm": vllm.__version__, "torch": torch.__version__}
    return versions, llm_functions(llm, llm.llm_engine, vllm.SamplingParams)


if __name__ == "__main__":
    serve(start)
