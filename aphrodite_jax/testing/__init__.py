"""For authors of models: what proves a registration right, in a test of their own package.

    from aphrodite_jax.testing import check_multimodal_model

    def test_my_model():
        check_multimodal_model(MyModel, MyConfig(...))

Needs hypothesis, which the extra ``test`` installs.
"""

from aphrodite_jax.testing.assertions import assert_trees_all_close
from aphrodite_jax.testing.conformance import CLAUSES, Broken, ConformanceError, check_multimodal_model
from aphrodite_jax.testing.strategies import (
    IMAGE_MODES,
    arrivals,
    images,
    requests,
    row_intervals,
    spans,
    videos,
)
from aphrodite_jax.testing.tiny import TinyModel, tiny_models
from aphrodite_jax.testing.tokenizers import byte_tokenizer

__all__ = [
    "CLAUSES",
    "IMAGE_MODES",
    "Broken",
    "ConformanceError",
    "TinyModel",
    "arrivals",
    "assert_trees_all_close",
    "byte_tokenizer",
    "check_multimodal_model",
    "images",
    "requests",
    "row_intervals",
    "spans",
    "tiny_models",
    "videos",
]
