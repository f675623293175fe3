"""Functions that model classes are decorated with: kept by class, found along the MRO, called with care."""

import warnings
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from aphrodite_jax.errors import AphroditeError, RegistrationError, RequestError

__all__ = ["ClassTable", "call_model_function"]

ValueT = TypeVar("ValueT")
ModelT = TypeVar("ModelT", bound=type)


class ClassTable(Generic[ValueT]):
    """One kind of registration: a value per model class.

    Classes are held weakly, so that a class of a notebook cell that ran again can be freed.

    Args:
      what: the registration's name in messages.
    """

    def __init__(self, what: str):
        self._what = what
        self._values: weakref.WeakKeyDictionary[type, ValueT] = weakref.WeakKeyDictionary()

    def decorator(self, value: ValueT) -> Callable[[ModelT], ModelT]:
        """Class decorator that stores ``value`` and returns the class unchanged; replacing one warns.

        Raises:
          RegistrationError: it is not a class that is decorated.
        """

        def wrapper(model_cls: ModelT) -> ModelT:
            if not isinstance(model_cls, type):
                raise RegistrationError(f"{self._what}: a model class is decorated, got {model_cls!r}")
            if model_cls in self._values:
                warnings.warn(
                    f"{model_cls.__name__} already has a registered {self._what}; the new one replaces it",
                    stacklevel=2,
                )
            self._values[model_cls] = value
            return model_cls

        return wrapper

    def __contains__(self, model_cls: type) -> bool:
        return any(base in self._values for base in model_cls.__mro__)

    def get(self, model_cls: type) -> ValueT | None:
        """The value of the first class of ``model_cls.__mro__`` that has one; None if none has."""
        return next((self._values[base] for base in model_cls.__mro__ if base in self._values), None)


def check_function(value: Any, what: str, *, alternative: str = "") -> None:
    """Raise `RegistrationError` unless ``value`` can be called and is no class.

    A class comes here when a decorator was written without its parentheses.
    """
    if isinstance(value, type):
        raise RegistrationError(
            f"{what}: a function is registered, got the class {value.__name__}; "
            "write the decorator with parentheses, @REGISTRY.register_...(function)"
        )
    if not callable(value):
        raise RegistrationError(f"{what}: {alternative}a function is registered, got {value!r}")


def call_model_function(function: Callable[..., Any], what: str, *args: Any) -> Any:
    """Call a model author's function for one request.

    Raises:
      RequestError: the function failed with anything but a ValueError or an error of this package, which
        keep their type.
    """
    try:
        return function(*args)
    except (AphroditeError, ValueError):
        raise
    except Exception as error:
        raise RequestError(f"{what} failed: {type(error).__name__}: {error}") from error
