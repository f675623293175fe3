"""For authors of models: what proves a registration right, in a test of their own package.

    from aphrodite_jax.testing import check_multimodal_model

    def test_my_model():
        check_multimodal_model(MyModel, MyConfig(...))

Needs hypothesis, which the extra ``test`` installs.
"""

from aphrodite_jax.testing.assertions import assert_trees_all_close
from aphrodite_jax.testing.conformance import Broken, ConformanceError, check_multimodal_model
from aphrodite_jax.testing.strategies import images, videos
from aphrodite_jax.testing.tokenizers import byte_tokenizer

__all__ = [
    "Broken",
    "ConformanceError",
    "assert_trees_all_close",
    "byte_tokenizer",
    "check_multimodal_model",
    "images",
    "videos",
]
