"""Loading holds the weights in their target dtype and no second copy of them."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "measure_loading_memory.py"


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
@pytest.mark.once
def test_peak_memory_stays_under_the_weights_and_one_tensor():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    measured = script.measure("llava", megabytes=150)
    assert measured["peak"] <= script.limit(measured), measured
    assert measured["file"] + measured["weights"] > script.limit(measured)  # a second copy would show
