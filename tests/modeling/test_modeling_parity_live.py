"""The stored goldens against Hugging Face's models, computed again here and now."""

import importlib.util
from pathlib import Path

import pytest
from golden_files import GOLDENS, golden_names

pytest.importorskip("torch", reason="the reference models of Hugging Face need torch")

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_goldens.py"


@pytest.fixture(scope="module")
def make_goldens():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", golden_names())
def test_the_stored_golden_is_what_the_reference_gives(make_goldens, name):
    assert make_goldens.check_golden(name) <= make_goldens.SAME


def test_every_case_is_stored_and_they_are_small(make_goldens):
    assert golden_names() == sorted(make_goldens.all_cases())
    assert sum(file.stat().st_size for file in GOLDENS.iterdir()) < 15e6
