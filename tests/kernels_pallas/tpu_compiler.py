"""Tests that compile for TPUs need `libtpu`, which installs on Linux x86-64 and takes no TPU."""

from importlib.util import find_spec

import pytest

needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'aphrodite-jax[compile]'"
)
