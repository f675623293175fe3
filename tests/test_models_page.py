"""docs/models.md is what the script makes of the classes and the goldens that are there."""

import json

import make_models_page
import pytest
from golden_files import golden_names

from aphrodite_jax.architectures import built_in_architectures, resolve_architecture


def test_the_page_is_current():
    measured = json.loads(make_models_page.MEASURED.read_text())
    assert sorted(measured) == golden_names(), "run scripts/make_models_page.py --measure"
    assert make_models_page.PAGE.read_text() == make_models_page.page(measured), "run scripts/make_models_page.py"
    assert max(measured.values()) <= 2e-4


@pytest.mark.parametrize("name", built_in_architectures())
def test_every_class_says_what_sets_it_apart(name):
    architecture, _, tower = name.partition("/")
    model_cls = resolve_architecture([architecture], tower=tower or None)
    assert model_cls.traits
    assert all(isinstance(trait, str) for trait in model_cls.traits)


def test_what_is_measured_is_measured_here_too():
    stored = json.loads(make_models_page.MEASURED.read_text())["llava_clip_llama"]
    assert make_models_page.measure("llava_clip_llama") == pytest.approx(stored, abs=5e-5)
