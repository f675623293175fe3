"""Imports point one way, as docs/architecture.md draws it; the syntax tree of every module is read."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PLAIN = {"errors", "config", "sampling_params", "outputs", "architectures"}
INPUTS = PLAIN | {"multimodal", "inputs"}
MODELING = INPUTS | {"modeling", "kernels_pallas"}
EXECUTOR = MODELING | {"sampling", "executor"}
ENGINE = EXECUTOR | {"engine"}
INSPECTION = ENGINE | {"inspection"}
LLM = INSPECTION | {"llm"}
BATCH = LLM | {"batch"}
PLANNING = ENGINE | {"planning"}
CLI = BATCH | PLANNING | {"cli", "aphrodite_jax"}
TESTING = ENGINE | {"testing"}

MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "sampling_params": {"errors"},
    "outputs": {"errors"},
    "architectures": {"errors"},
    "aphrodite_jax": set(),  # the package itself: its names are looked up when they are first used
    "kernels_pallas": {"kernels_pallas"},
    "multimodal": PLAIN | {"multimodal"},
    "inputs": INPUTS,
    "sampling": PLAIN | {"sampling"},
    "modeling": MODELING,
    "executor": EXECUTOR,
    "engine": ENGINE,
    "inspection": INSPECTION,
    "llm": LLM,
    "batch": BATCH,
    "planning": PLANNING,
    "tuning": MODELING | {"engine", "tuning"},
    "cli": CLI,
    "testing": TESTING,
    "pytest_plugin": TESTING,
    "__main__": CLI,
}
"""Room to the rooms that its modules may import."""

KERNEL_LIBRARIES = {"jax", "numpy", "jaxtyping"}
ALSO_IMPORTS = {"kernels_pallas.mask_picture": {"matplotlib"}}
"""Libraries of one module alone, which imports them when it is used."""
MASKS = "kernels_pallas.intervals"
"""What a model may import of the kernels: the ops are called in `aphrodite_jax.modeling.layers.attention` alone."""
FORBIDDEN_LIBRARIES = {"torch", "torchvision", "tensorflow"}


def room(module: str) -> str | None:
    """The room of a dotted name; None for a module of another package."""
    package, _, rest = module.partition(".")
    if package == "kernels_pallas":
        return "kernels_pallas"
    if package == "aphrodite_jax":
        return rest.partition(".")[0] or "aphrodite_jax"
    return None


def imports(source: str, module: str, *, is_package: bool) -> set[str]:
    """Dotted names that a module imports anywhere; ``from aphrodite_jax import b`` counts as ``aphrodite_jax.b``."""
    found = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            # `from aphrodite_jax import llm` imports a room, `from aphrodite_jax.llm import LLM` a name of one.
            found |= {f"{origin}.{alias.name}" for alias in node.names} if origin == "aphrodite_jax" else {origin}
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name | ast.Attribute)
            and (node.func.id if isinstance(node.func, ast.Name) else node.func.attr) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(node.args[0].value)
    return found


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a module imports against the direction."""
    own = room(module)
    is_model = module.startswith("aphrodite_jax.modeling.models.")
    found = []
    for imported in sorted(imports(source, module, is_package=is_package)):
        library, target = imported.partition(".")[0], room(imported)
        if target is not None and target not in MAY_IMPORT:
            target = "aphrodite_jax"  # a public name of the package
        if (
            library in FORBIDDEN_LIBRARIES
            or (target is not None and target not in MAY_IMPORT[own])
            or (is_model and target == "kernels_pallas" and imported != MASKS)
            or (
                own == "kernels_pallas"
                and target is None
                and library not in KERNEL_LIBRARIES | sys.stdlib_module_names | ALSO_IMPORTS.get(module, set())
            )
        ):
            found.append(f"{module} imports {imported}")
    return found


def modules() -> dict[str, Path]:
    paths = [path for package in ("aphrodite_jax", "kernels_pallas") for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def test_every_module_is_in_a_room():
    assert {room(module) for module in modules()} <= set(MAY_IMPORT)
    assert len(modules()) > 50


def test_imports_point_one_way():
    found = [
        violation
        for module, path in modules().items()
        for violation in violations(path.read_text("utf-8"), module, is_package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_rooms_form_an_order():
    """No two rooms may import each other, so that the table itself is a direction."""
    for a, allowed in MAY_IMPORT.items():
        for b in allowed - {a, "aphrodite_jax"}:
            assert a not in MAY_IMPORT[b] or {a, b} <= {"cli", "__main__"}, f"{a} and {b} may import each other"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("aphrodite_jax.engine.x", "from aphrodite_jax.llm import LLM"),
        ("aphrodite_jax.engine.x", "from aphrodite_jax import llm"),
        ("aphrodite_jax.engine.x", "from aphrodite_jax import LLM"),
        ("aphrodite_jax.engine.x", "from ..llm import LLM"),
        ("aphrodite_jax.engine.x", "from .. import llm"),
        ("aphrodite_jax.engine.x", "import importlib\nimportlib.import_module('aphrodite_jax.cli')"),
        ("aphrodite_jax.modeling.models.x", "def f():\n    import aphrodite_jax.executor.batch"),
        ("aphrodite_jax.multimodal.x", "from aphrodite_jax.modeling.models.llava import num_image_tokens"),
        ("aphrodite_jax.multimodal.x", "from aphrodite_jax.inputs import LLMInputs"),
        ("aphrodite_jax.inputs.x", "if True:\n    from aphrodite_jax.engine.sequence import Sequence"),
        ("aphrodite_jax.config", "from aphrodite_jax.inputs.data import LLMInputs"),
        ("aphrodite_jax.errors", "from aphrodite_jax.config import ModelConfig"),
        ("aphrodite_jax.sampling.x", "from aphrodite_jax.executor.batch import Rows"),
        ("aphrodite_jax.llm", "import torch.nn as nn"),
        ("kernels_pallas.x", "from aphrodite_jax.errors import ConfigError"),
        ("aphrodite_jax.modeling.models.x", "from kernels_pallas import interval_attention"),
        ("kernels_pallas.x", "import flax"),
        ("kernels_pallas.x", "def f():\n    import matplotlib"),
        ("kernels_pallas.interval_attention.x", "from torch import nn"),
    ],
)
def test_a_forbidden_import_is_caught(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("aphrodite_jax.cli", "import aphrodite_jax\nfrom aphrodite_jax.batch import answer_job"),
        ("aphrodite_jax.engine.x", "import torchless\nfrom .sequence import Sequence\nfrom ..inputs import LLMInputs"),
        ("aphrodite_jax.modeling.models.x", "from kernels_pallas.intervals import RowIntervals"),
        ("kernels_pallas.mask_picture", "def f():\n    from matplotlib import pyplot"),
        ("kernels_pallas.x", "import functools\nimport jax.numpy as jnp\nfrom jaxtyping import Array\nfrom . import y"),
    ],
)
def test_a_right_import_is_not_caught(module, source):
    assert violations(source, module) == []


def test_a_package_counts_its_dots_from_itself():
    source = "from .llm import LLM"
    assert violations(source, "aphrodite_jax.engine", is_package=True) == []
    assert violations(source, "aphrodite_jax.engine") == ["aphrodite_jax.engine imports aphrodite_jax.llm"]
