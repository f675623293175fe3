"""Every multimodal architecture that ships keeps to what the kit asks of others, as small as it gets."""

import pytest

from aphrodite_jax.architectures import built_in_architectures, resolve_architecture
from aphrodite_jax.modeling.models.interfaces import supports_multimodal
from aphrodite_jax.testing import check_multimodal_model, tiny_models


def class_of(architecture):
    name, _, tower = architecture.partition("/")
    return resolve_architecture([name], tower=tower or None)


@pytest.mark.once
@pytest.mark.parametrize("name", tiny_models())
def test_a_family_passes(name):
    tiny = tiny_models()[name]
    check_multimodal_model(tiny.model_cls, tiny.config, max_examples=8, **tiny.options)


def test_every_multimodal_architecture_has_a_tiny_model():
    tiny = {model.architecture: model.model_cls for model in tiny_models().values()}
    assert tiny == {name: class_of(name) for name in built_in_architectures() if supports_multimodal(class_of(name))}


def test_tiny_models_are_tiny_and_told_apart_by_their_traits():
    for name, tiny in tiny_models().items():
        text, vision = tiny.config.text_config, tiny.config.vision_config
        assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (32, 2, 272), name
        assert getattr(vision, "embed_dim", vision.hidden_size) == 16, name
    traits = {tiny.traits for tiny in tiny_models().values()}
    assert len(traits) >= len(tiny_models()) - 1  # Idefics3 and SmolVLM differ in nothing but names
