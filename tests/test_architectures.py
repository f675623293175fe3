"""Architecture names to classes: the built-in ones, those of a user, and those of plugins."""

import importlib
import sys

import llava_files
import pytest

from aphrodite_jax import architectures, register_model
from aphrodite_jax.architectures import known_architectures, resolve_architecture
from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError, UnknownArchitectureError
from aphrodite_jax.multimodal.context import InputContext, model_class

BUILT_IN = {"LlamaForCausalLM", "LlavaForConditionalGeneration", "MistralForCausalLM", "Qwen2ForCausalLM"}


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(architectures, "_TABLE", dict(architectures._TABLE))
    monkeypatch.setattr(architectures, "_PLUGINS_LOADED", set(architectures._PLUGINS_LOADED))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a distribution with one entry point in the group of plugins on the path."""

    def install(name: str, target: str, source: str | None) -> None:
        site = tmp_path / f"site_{name}"
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[aphrodite_jax.plugins]\n{name} = {target}\n")
        if source is not None:
            (site / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()

    return install


WORKING = """
import aphrodite_jax

calls = []

def register():
    calls.append(1)

    @aphrodite_jax.register_model("GreenModel")
    class GreenModel:
        pass
"""


def test_built_in_architectures_resolve_to_classes_of_their_name():
    assert set(known_architectures()) >= BUILT_IN
    assert list(known_architectures()) == sorted(known_architectures())
    for name in BUILT_IN:
        assert resolve_architecture([name]).__name__ == name


def test_the_first_known_name_serves():
    assert resolve_architecture(("NoSuchModel", "LlamaForCausalLM", "Qwen2ForCausalLM")).__name__ == "LlamaForCausalLM"


def test_a_name_stands_for_another_class_over_another_tower():
    name = "LlavaForConditionalGeneration"
    assert resolve_architecture([name], tower="pixtral").__name__ == "PixtralForConditionalGeneration"
    assert resolve_architecture([name], tower="clip_vision_model").__name__ == name
    assert resolve_architecture(["NoSuchModel", name], tower="pixtral").__name__ == "PixtralForConditionalGeneration"


def test_an_unknown_architecture_names_the_known_ones():
    with pytest.raises(UnknownArchitectureError) as info:
        resolve_architecture(["NoSuchModel", "NorThis"], source="the config of 'here'")
    message = str(info.value)
    assert message.startswith("no model class for architecture 'NoSuchModel' or 'NorThis' of the config of 'here'")
    assert all(name in message for name in BUILT_IN)
    assert "@register_model('NoSuchModel')" in message
    assert isinstance(info.value, ConfigError)


@pytest.mark.parametrize("names", [None, [], ()])
def test_a_config_without_architectures(names):
    with pytest.raises(UnknownArchitectureError, match="the config names no architecture; add an 'architectures' list"):
        resolve_architecture(names)


def test_register_model_returns_the_class_and_a_second_one_replaces():
    class First:
        pass

    class Second:
        pass

    assert register_model("BlueModel")(First) is First
    assert resolve_architecture(["BlueModel"]) is First
    assert "BlueModel" in known_architectures()
    assert register_model("BlueModel")(Second) is Second
    assert resolve_architecture(["BlueModel"]) is Second


@pytest.mark.parametrize("name", ["", None, 3, ["A"]])
def test_a_name_that_is_none(name):
    with pytest.raises(ConfigError, match="an architecture name is a non-empty string"):
        register_model(name)


def test_register_model_without_parentheses():
    with pytest.raises(ConfigError, match="an architecture name is a non-empty string, got <class"):

        @register_model
        class BlueModel:
            pass


@pytest.mark.parametrize("thing", [None, "BlueModel", lambda: None])
def test_register_model_takes_classes_alone(thing):
    with pytest.raises(ConfigError, match="a model class is decorated"):
        register_model("BlueModel")(thing)
    assert "BlueModel" not in known_architectures()


def test_a_plugin_joins_when_its_architecture_is_asked_for(install):
    install("green_plugin", "green_plugin:register", WORKING)
    assert "green_plugin" not in sys.modules
    assert resolve_architecture(["LlamaForCausalLM"]).__name__ == "LlamaForCausalLM"
    assert "green_plugin" not in sys.modules  # known names load no plugin
    assert resolve_architecture(["GreenModel"]).__name__ == "GreenModel"
    assert "GreenModel" in known_architectures()
    assert resolve_architecture(["GreenModel"]) is resolve_architecture(["GreenModel"])
    with pytest.raises(UnknownArchitectureError):
        resolve_architecture(["NoSuchModel"])
    assert sys.modules["green_plugin"].calls == [1]


@pytest.mark.parametrize(
    ("target", "source", "reason"),
    [
        ("red_plugin:register", "import no_such_module_at_all", "No module named 'no_such_module_at_all'"),
        ("red_plugin:register", "def register(): raise RuntimeError('out of paint')", "RuntimeError: out of paint"),
        ("red_plugin:register", "other = 1", "has no attribute 'register'"),
        ("red_plugin:register", "register = 3", "'int' object is not callable"),
        ("red_plugin:register", "def (", "SyntaxError"),
        ("red_plugin:register", None, "No module named 'red_plugin'"),
    ],
)
def test_a_broken_plugin_is_named_when_its_architecture_is_asked_for(install, target, source, reason):
    install("red_plugin", target, source)
    assert resolve_architecture(["LlamaForCausalLM"]).__name__ == "LlamaForCausalLM"  # it is in nobody's way
    for _ in range(2):  # the second time as the first
        with pytest.raises(UnknownArchitectureError) as info:
            resolve_architecture(["RedModel"])
        assert f"plugin 'red_plugin' ({target}) failed to load" in str(info.value)
        assert reason in str(info.value)
        assert "no model class for architecture 'RedModel'" in str(info.value)
    with pytest.raises(ConfigError, match="plugin 'red_plugin'"):
        known_architectures()


def test_a_broken_plugin_does_not_hide_a_working_one(install):
    install("red_plugin", "red_plugin:register", "raise OSError('gone')")
    install("green_plugin", "green_plugin:register", WORKING)
    assert resolve_architecture(["GreenModel"]).__name__ == "GreenModel"
    with pytest.raises(UnknownArchitectureError, match="OSError: gone"):
        resolve_architecture(["RedModel"])


def test_the_class_of_a_checkpoint(tmp_path):
    @register_model("BlueModel")
    class BlueModel:
        pass

    directory = llava_files.write_llava(tmp_path, llava_files.llava_config(architectures=["BlueModel"]))
    model_config = ModelConfig(model=directory)
    assert model_class(model_config) is BlueModel
    no_name = ModelConfig(model=directory, hf_overrides={"architectures": []})
    with pytest.raises(UnknownArchitectureError, match=f"the config of '{directory}' names no architecture"):
        model_class(no_name)


def test_the_context_checks_the_type_of_the_config(tmp_path):
    import transformers

    ctx = InputContext(ModelConfig(model=llava_files.write_llava(tmp_path)))
    assert ctx.get_hf_config() is ctx.model_config.hf_config
    assert ctx.get_hf_config(transformers.LlavaConfig) is ctx.model_config.hf_config
    with pytest.raises(TypeError, match="expected a LlamaConfig, the model has a LlavaConfig"):
        ctx.get_hf_config(transformers.LlamaConfig)
