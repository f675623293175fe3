"""Which class serves which architecture name of a checkpoint's ``config.json``.

The table holds import paths, so that looking a name up imports one family and no other. Where one name is that of
models with different vision towers and classes, ``name/tower`` stands beside ``name``; the tower is the ``model_type``
of its config. Classes that stand elsewhere (a notebook cell, another package) join by ``register_model`` or by an entry
point in the group ``aphrodite_jax.plugins``, whose target is a function of no arguments that registers its classes.
"""

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeVar

from aphrodite_jax.errors import ConfigError, UnknownArchitectureError

__all__ = ["built_in_architectures", "known_architectures", "register_model", "resolve_architecture"]

PLUGIN_GROUP = "aphrodite_jax.plugins"

_BUILT_IN = "aphrodite_jax.modeling.models"
_TABLE: dict[str, str | type] = {
    "LlamaForCausalLM": f"{_BUILT_IN}.llama:LlamaForCausalLM",
    "MistralForCausalLM": f"{_BUILT_IN}.mistral:MistralForCausalLM",
    "Qwen2ForCausalLM": f"{_BUILT_IN}.qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": f"{_BUILT_IN}.qwen3:Qwen3ForCausalLM",
    "Phi3ForCausalLM": f"{_BUILT_IN}.phi3:Phi3ForCausalLM",
    "GemmaForCausalLM": f"{_BUILT_IN}.gemma:GemmaForCausalLM",
    "Gemma2ForCausalLM": f"{_BUILT_IN}.gemma:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": f"{_BUILT_IN}.gemma3:Gemma3ForCausalLM",
    "PaliGemmaForConditionalGeneration": f"{_BUILT_IN}.paligemma:PaliGemmaForConditionalGeneration",
    "Gemma3ForConditionalGeneration": f"{_BUILT_IN}.gemma3:Gemma3ForConditionalGeneration",
    "Qwen2VLForConditionalGeneration": f"{_BUILT_IN}.qwen2_vl:Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration": f"{_BUILT_IN}.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration": f"{_BUILT_IN}.qwen3_vl:Qwen3VLForConditionalGeneration",
    "LlavaForConditionalGeneration": f"{_BUILT_IN}.llava:LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration": f"{_BUILT_IN}.llava_next:LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration": f"{_BUILT_IN}.llava_onevision:LlavaOnevisionForConditionalGeneration",
    "InternVLForConditionalGeneration": f"{_BUILT_IN}.internvl:InternVLForConditionalGeneration",
    "Idefics3ForConditionalGeneration": f"{_BUILT_IN}.idefics3:Idefics3ForConditionalGeneration",
    "SmolVLMForConditionalGeneration": f"{_BUILT_IN}.idefics3:SmolVLMForConditionalGeneration",
    "LlavaForConditionalGeneration/pixtral": f"{_BUILT_IN}.pixtral:PixtralForConditionalGeneration",
    "Mistral3ForConditionalGeneration": f"{_BUILT_IN}.mistral3:Mistral3ForConditionalGeneration",
}
_PLUGINS_LOADED: set[str] = set()

ModelT = TypeVar("ModelT", bound=type)


def register_model(architecture: str) -> Callable[[ModelT], ModelT]:
    """Class decorator: serve checkpoints whose config names ``architecture`` with this class.

    The class is returned unchanged. A second registration of a name replaces the first, so that a notebook
    cell can be run again.
    """
    if not isinstance(architecture, str) or not architecture:
        raise ConfigError(f"an architecture name is a non-empty string, got {architecture!r}")

    def wrapper(model_cls: ModelT) -> ModelT:
        if not isinstance(model_cls, type):
            raise ConfigError(f"register_model({architecture!r}): a model class is decorated, got {model_cls!r}")
        _TABLE[architecture] = model_cls
        return model_cls

    return wrapper


def built_in_architectures() -> tuple[str, ...]:
    """Names that this package serves itself, in the order of the table, whatever plugins there are."""
    return tuple(name for name, target in _TABLE.items() if isinstance(target, str) and target.startswith(_BUILT_IN))


def known_architectures() -> tuple[str, ...]:
    """Names that can be served now, sorted; plugins are loaded first and a broken one raises."""
    for name in sorted({point.name for point in entry_points(group=PLUGIN_GROUP)}):
        _load_plugin(name)
    return tuple(sorted(_TABLE))


def resolve_architecture(
    names: list[str] | tuple[str, ...] | None, *, tower: str | None = None, source: str = "the config"
) -> type:
    """The class for the first of ``names`` that is known, over the vision ``tower`` if there is one for it.

    Raises:
      UnknownArchitectureError: no name is known; the message lists those that are, and names each plugin
        that could not be loaded with its reason.
    """
    if not names:
        raise UnknownArchitectureError(
            f"{source} names no architecture; add an 'architectures' list with one of {', '.join(sorted(_TABLE))}"
        )
    keys = [key for name in names for key in ((f"{name}/{tower}", name) if tower else (name,))]
    for key in keys:
        if key in _TABLE:
            return _import(_TABLE[key])
    broken = []
    for plugin in sorted({point.name for point in entry_points(group=PLUGIN_GROUP)}):
        try:
            _load_plugin(plugin)
        except ConfigError as error:
            broken.append(str(error))
    for key in keys:
        if key in _TABLE:
            return _import(_TABLE[key])
    message = (
        f"no model class for architecture {' or '.join(map(repr, names))} of {source}; known: "
        f"{', '.join(sorted(_TABLE))}. Register a class with @register_model({names[0]!r})"
    )
    raise UnknownArchitectureError("; ".join([message, *broken]))


def _import(target: str | type) -> type:
    if isinstance(target, type):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _load_plugin(name: str) -> None:
    if name in _PLUGINS_LOADED:
        return
    for point in entry_points(group=PLUGIN_GROUP, name=name):
        try:
            point.load()()
        except Exception as error:
            raise ConfigError(
                f"plugin {name!r} ({point.value}) failed to load: {type(error).__name__}: {error}"
            ) from error
    _PLUGINS_LOADED.add(name)
