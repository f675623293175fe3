"""A model in a package of its own: installed from a wheel, known by its entry point, checked by the pytest plugin."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

MODELS = '''

class Outside(Strips):
    """A model of another package."""

    conformance_config = staticmethod(tiny_config)
    conformance_options = {"max_examples": 3}


class Lying(build(bound=lambda ctx: 4)):
    """One that breaks a promise."""

    conformance_config = staticmethod(tiny_config)


class Silent(Strips):
    """One that does not say what it is checked with."""


def register():
    from aphrodite_jax import register_model

    register_model("OutsideForConditionalGeneration")(Outside)
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A directory with the package installed."""
    folder = tmp_path_factory.mktemp("outside")
    info = "outside_models-1.0.dist-info"
    files = {
        "outside_models.py": Path(__file__).with_name("right_model.py").read_text() + MODELS,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: outside-models\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[aphrodite_jax.plugins]\noutside = outside_models:register\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    wheel = folder / "outside_models-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    target = folder / "site"
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    return target


def run(site, *command):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(site)
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=site, capture_output=True, text=True, timeout=600
    )


def pytest_of(site, *models):
    options = [option for model in models for option in ("--aphrodite-model", f"outside_models:{model}")]
    return run(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options)


def test_the_entry_point_makes_it_known(site):
    listed = run(site, "-m", "aphrodite_jax", "models")
    assert "OutsideForConditionalGeneration" in listed.stdout, listed.stderr


def test_the_plugin_checks_it(site):
    done = pytest_of(site, "Outside")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_plugin_tells_in_words_what_is_broken(site):
    done = pytest_of(site, "Lying", "Silent")
    assert done.returncode == 1
    assert "no item takes more tokens than the registered bound" in done.stdout
    assert "a image takes 6 tokens, the bound is 4" in done.stdout
    assert "outside_models:Silent has no conformance_config()" in done.stdout
    assert "2 failed" in done.stdout
