"""Every error that the package raises on purpose.

AphroditeError
├── ConfigError            (ValueError)  an option, a config file, a device that can't serve
│   └── UnknownArchitectureError
├── CheckpointError        (ValueError)  files that are missing, damaged or of the wrong shape
├── RegistrationError      (ValueError)  a model class registered wrongly or not at all
├── RequestError           (ValueError)  one request that can't be served; the others go on
│   ├── PromptTooLongError
│   ├── MediaError                       an item that can't be opened, is too large, or is of no known kind
│   ├── TooManyItemsError                more items than ``limit_mm_per_prompt``
│   └── PlaceholderError                 placeholders and items do not match
├── BatchError             (RuntimeError) a batch job whose input or output can't be used
├── LockstepError          (RuntimeError) processes that serve one model together have come apart
└── RecompilationError     (RuntimeError) a program compiled after warm-up where that is forbidden
"""

__all__ = [
    "AphroditeError",
    "BatchError",
    "CheckpointError",
    "ConfigError",
    "LockstepError",
    "MediaError",
    "PlaceholderError",
    "PromptTooLongError",
    "RecompilationError",
    "RegistrationError",
    "RequestError",
    "TooManyItemsError",
    "UnknownArchitectureError",
]


class AphroditeError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(AphroditeError, ValueError):
    """An option or a config file that can't be used as given."""


class UnknownArchitectureError(ConfigError):
    """A checkpoint names an architecture that no registered class serves."""


class CheckpointError(AphroditeError, ValueError):
    """Checkpoint files that are missing, damaged, or do not fit the model."""


class RegistrationError(AphroditeError, ValueError):
    """A model class whose registration is missing a piece or contradicts itself."""


class RequestError(AphroditeError, ValueError):
    """One request that can't be served; other requests are not touched."""


class PromptTooLongError(RequestError):
    """The prompt has more tokens than the model or the cache can hold."""


class MediaError(RequestError):
    """A media item that can't be opened, is over a limit, or is of no known kind."""


class TooManyItemsError(RequestError):
    """More items of a modality than ``limit_mm_per_prompt`` allows."""


class PlaceholderError(RequestError):
    """Placeholders in the prompt and media items do not match."""


class BatchError(AphroditeError, RuntimeError):
    """A batch job whose input can't be read, or whose output can't be written or is not its own."""


class LockstepError(AphroditeError, RuntimeError):
    """Processes that serve one model together differ in what they do, or can't reach each other."""


class RecompilationError(AphroditeError, RuntimeError):
    """A device program was compiled after warm-up where that is forbidden."""
