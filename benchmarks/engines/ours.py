"""Serves aphrodite_jax by `protocol`."""

import jax
from llm_functions import llm_functions
from protocol import serve

import aphrodite_jax
from aphrodite_jax import LLM, SamplingParams


def start(checkpoint: str, **options):
    """The engine with these options of `LLM`."""
    llm = LLM(checkpoint, dtype="float32", show_progress=False, **options)
    versions = {"aphrodite_jax": aphrodite_jax.__version__, "jax": jax.__version__}
    functions = llm_functions(llm, llm.engine, SamplingParams, on_error="raise")
    return versions, functions | {"stats": lambda: dict(llm.stats())}


if __name__ == "__main__":
    serve(start)
