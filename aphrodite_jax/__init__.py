"""aphrodite_jax: vision-language models in JAX, on TPU, GPU and CPU.

The names below are the public surface; each is imported when first used, so that ``import aphrodite_jax`` and
the command's ``--help`` stay quick.
"""

import importlib
import importlib.metadata
import os

# transformers advises to install torch when it is imported without it; nothing here needs torch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_HOMES = {
    "AphroditeEngine": "aphrodite_jax.engine",
    "CompletionOutput": "aphrodite_jax.outputs",
    "EngineConfig": "aphrodite_jax.config",
    "LLM": "aphrodite_jax.llm",
    "Logprob": "aphrodite_jax.outputs",
    "ModelConfig": "aphrodite_jax.config",
    "RequestOutput": "aphrodite_jax.outputs",
    "SamplingParams": "aphrodite_jax.sampling_params",
    "register_model": "aphrodite_jax.architectures",
}

__all__ = [  # noqa: RUF022 - in the order a reader meets them
    "LLM",
    "SamplingParams",
    "RequestOutput",
    "CompletionOutput",
    "Logprob",
    "AphroditeEngine",
    "ModelConfig",
    "EngineConfig",
    "register_model",
]

__version__ = importlib.metadata.version("aphrodite-jax")


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'aphrodite_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
