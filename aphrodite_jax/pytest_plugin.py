"""A pytest plugin: ``pytest --aphrodite-model mypkg.models:MyModel`` checks a model class without a test file.

The class says in static methods or attributes what it is checked with: ``conformance_config()`` gives its tiny config;
``conformance_options``, if it is there, is a mapping of further arguments of `check_multimodal_model`.

pytest loads this in every run where the package is installed, so it imports nothing else before it is asked.
"""

import importlib

import pytest

__all__ = ["pytest_addoption", "pytest_collection"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    group = parser.getgroup("aphrodite_jax")
    group.addoption(
        "--aphrodite-model",
        action="append",
        default=[],
        metavar="MODULE:CLASS",
        help="check that a model class keeps to what its registration promises; may be given again",
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_collection(session: pytest.Session):
    """Put a check of each model before the other tests."""
    yield
    targets = session.config.getoption("--aphrodite-model") or ()
    checks = [ModelCheck.from_parent(session, name=f"conformance of {target}", target=target) for target in targets]
    session.items[:0] = checks
    session.testscollected = len(session.items)


class ModelCheck(pytest.Item):
    """The check of one model class."""

    def __init__(self, *, target: str, **kwargs):
        super().__init__(**kwargs)
        self.target = target

    def runtest(self) -> None:
        """Check it."""
        from aphrodite_jax.testing import check_multimodal_model

        module, _, name = self.target.partition(":")
        model_cls = getattr(importlib.import_module(module), name)
        if not hasattr(model_cls, "conformance_config"):
            raise pytest.UsageError(
                f"{self.target} has no conformance_config(): a static method that gives the tiny config to check with"
            )
        check_multimodal_model(
            model_cls, model_cls.conformance_config(), **getattr(model_cls, "conformance_options", {})
        )

    def repr_failure(self, excinfo, style=None):
        """The clauses in words, without a traceback."""
        from aphrodite_jax.testing import ConformanceError

        return str(excinfo.value) if isinstance(excinfo.value, ConformanceError) else super().repr_failure(excinfo)

    def reportinfo(self):
        """Where it comes from, and its name."""
        return self.target, None, self.name
