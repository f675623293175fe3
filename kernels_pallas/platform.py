"""Which implementation of an op serves."""

from collections.abc import Callable, Mapping

DEFAULT = "xla"


def select(name: str | None, implementations: Mapping[str, Callable]) -> Callable:
    """The implementation called ``name``; None takes the platform's default.

    Raises:
      ValueError: no implementation has this name.
    """
    name = DEFAULT if name is None else name
    if name not in implementations:
        raise ValueError(f"no implementation {name!r}; there are {', '.join(sorted(implementations))}")
    return implementations[name]
