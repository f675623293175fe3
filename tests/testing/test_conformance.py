"""The conformance kit: it lets a right model pass and catches each that is broken on purpose."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from right_model import Strips, tiny_config

from aphrodite_jax.testing import ConformanceError, check_multimodal_model, images

MUTANTS = sorted(Path(__file__).with_name("mutants").glob("*.py"))
OPTIONS = {"strategies": {"image": images(most=150)}, "max_examples": 10}


@pytest.mark.once
def test_a_right_model_passes():
    check_multimodal_model(Strips, tiny_config(), **OPTIONS)


@pytest.mark.once
def test_another_reference_is_told():
    def other(directory, token_ids, arrays):
        return np.zeros((len(token_ids), 300), np.float32)

    with pytest.raises(ConformanceError, match=r"logits differ from the reference's by"):
        check_multimodal_model(Strips, tiny_config(), reference=other, **OPTIONS)


@pytest.mark.once
@pytest.mark.parametrize("file", MUTANTS, ids=lambda file: file.stem)
def test_every_mutant_is_caught(file):
    spec = importlib.util.spec_from_file_location(f"mutants.{file.stem}", file)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    with pytest.raises(ConformanceError) as caught:
        check_multimodal_model(mutant.Model, tiny_config(), **OPTIONS)
    names = list(caught.value.broken)
    assert any(name.startswith(mutant.CLAUSE) for name in names), names
    assert all(found in str(caught.value) for found in caught.value.broken.values())


def test_there_are_enough_mutants():
    assert len(MUTANTS) >= 27
