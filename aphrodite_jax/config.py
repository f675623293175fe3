"""Frozen option values: which model, with which limits, and how the engine runs it."""

import copy
import dataclasses
import functools
import importlib.resources
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from flax.core import FrozenDict

from aphrodite_jax.errors import ConfigError

__all__ = ["EngineConfig", "ModelConfig", "default_compilation_cache_dir", "shipped_model_path", "split_options"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_MAX_IMAGE_PIXELS = 178_956_970
"""Pillow's own threshold for a decompression bomb: 1 GiB of RGB over two."""


def shipped_model_path() -> Path:
    """Directory of the small LLaVA-1.5 that the package carries."""
    return Path(str(importlib.resources.files("aphrodite_jax") / "assets" / "tiny_llava"))


def default_compilation_cache_dir() -> Path:
    """``aphrodite_jax/xla`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aphrodite_jax" / "xla"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which checkpoint, and what a prompt to it may hold. All that the registries need.

    Attributes:
      model: a directory in Hugging Face format or a hub id; None is the model that ships with the package.
      tokenizer: the same for the tokenizer; None takes ``model``.
      revision: hub branch, tag or commit; an error with a local directory.
      dtype: "auto" (the checkpoint's; float16 stays float16), "float32", "bfloat16" or "float16".
      seed: base of the seeds of requests that give none.
      max_model_len: tokens of prompt and answer together; None takes the config's limit.
      limit_mm_per_prompt: modality to most items of one prompt; 1 for modalities that are not named.
      mm_processor_kwargs: options for the Hugging Face image processor.
      video_sampling: which frames are taken of video files, in the place of what the checkpoint's processor says:
        ``num_frames``, or ``fps`` with ``min_frames`` and ``max_frames``.
      hf_overrides: config fields to replace after loading; nested fields as nested dicts.
      max_image_pixels: largest width x height that is decoded.
      media_roots: directories from which paths and file: URLs may be read; None allows any, () forbids all.

    Raises:
      ConfigError: a value out of range, or a model that is neither a directory nor a hub id.
    """

    model: str = None  # pyright: ignore[reportAssignmentType] - None becomes the path of the shipped model
    tokenizer: str = None  # pyright: ignore[reportAssignmentType] - None becomes ``model``
    revision: str | None = None
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    limit_mm_per_prompt: Mapping[str, int] = FrozenDict()
    mm_processor_kwargs: Mapping[str, Any] = FrozenDict()
    video_sampling: Mapping[str, Any] = FrozenDict()
    hf_overrides: Mapping[str, Any] = FrozenDict()
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS
    media_roots: tuple[str, ...] | None = None

    def __post_init__(self):
        def put(name, value):
            object.__setattr__(self, name, value)

        put("model", str(self.model) if self.model is not None else str(shipped_model_path()))
        put("tokenizer", str(self.tokenizer) if self.tokenizer is not None else self.model)
        for name in ("limit_mm_per_prompt", "mm_processor_kwargs", "video_sampling", "hf_overrides"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name} is a mapping, got {type(value).__name__}")
            put(name, FrozenDict(copy.deepcopy(dict(value))))
        if self.media_roots is not None:
            # A bare string would be a root for each of its letters, "/" among them.
            if isinstance(self.media_roots, str | Path) or not isinstance(self.media_roots, Iterable):
                raise ConfigError(f"media_roots is a list of directories, got {self.media_roots!r}")
            put("media_roots", tuple(str(root) for root in self.media_roots))
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for modality, limit in self.limit_mm_per_prompt.items():
            if not _is_whole(limit, least=1):
                raise ConfigError(f"limit_mm_per_prompt[{modality!r}] must be at least 1, got {limit!r}")
        for name in ("max_model_len", "max_image_pixels"):
            value = getattr(self, name)
            if not _is_whole(value, least=1) and not (value is None and name == "max_model_len"):
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not _is_whole(self.seed, least=0) or self.seed >= 2**32:
            raise ConfigError(f"seed must be a whole number in [0, 2**32), got {self.seed!r}")
        if self.revision is not None and self.is_local:
            raise ConfigError(f"revision {self.revision!r} has no meaning for the directory {self.model!r}")
        if not self.is_local and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", self.model):
            raise ConfigError(f"model {self.model!r} is neither a directory here nor a hub id such as 'org/name'")

    @property
    def is_local(self) -> bool:
        """Whether ``model`` is a directory on this machine."""
        return bool(self.model) and Path(self.model).is_dir()  # "" would be the working directory

    @functools.cached_property
    def hf_config(self) -> transformers.PretrainedConfig:
        """The checkpoint's Hugging Face config, with ``hf_overrides`` applied."""
        if self.is_local and not (Path(self.model) / "config.json").is_file():
            raise ConfigError(f"{self.model!r} has no config.json: not a Hugging Face checkpoint directory")
        try:
            config = transformers.AutoConfig.from_pretrained(self.model, revision=self.revision)
        except (
            Exception
        ) as error:  # fields of the wrong type or that contradict each other come as errors of many types
            raise ConfigError(f"can't read the config of model {self.model!r}: {error}") from error
        _override(config, self.hf_overrides, "hf_overrides")
        return config

    @property
    def hf_text_config(self) -> transformers.PretrainedConfig:
        """The language model's part of ``hf_config``; the whole for a text model."""
        return self.hf_config.get_text_config()

    @functools.cached_property
    def context_length(self) -> int:
        """Tokens of prompt and answer together: ``max_model_len``, else the config's own limit.

        Raises:
          ConfigError: ``max_model_len`` is above what the positions of the config reach.
        """
        limit = _position_limit(self.hf_text_config)
        if self.max_model_len is None:
            if limit is None:
                raise ConfigError(f"the config of {self.model!r} has no length limit; give max_model_len")
            return limit
        if limit is not None and self.max_model_len > limit:
            raise ConfigError(
                f"max_model_len {self.max_model_len} is above the {limit} positions of {self.model!r}; "
                "to go beyond, override max_position_embeddings with hf_overrides"
            )
        return self.max_model_len

    def limit_for(self, modality: str) -> int:
        """Most items of ``modality`` in one prompt."""
        return self.limit_mm_per_prompt.get(modality, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engine runs a model.

    Attributes:
      max_num_seqs: requests that run at the same time.
      max_num_batched_tokens: prompt tokens of one prefill step; longer prompts take several steps. None takes
        the smaller of 2048 and the model's length, or what rows that see each other need, rounded up to a bucket.
      page_size: tokens of one KV page.
      kv_cache_memory: bytes of KV pages, as a number or as text such as "512MiB". None takes enough on CPU for
        ``max_num_seqs`` full-length requests, at most 1 GiB; on accelerators what is left of the device's memory.
      memory_fraction: share of an accelerator's memory that may be used in all.
      encoder_cache_tokens: rows of encoded media kept on device; None takes what one prompt at its limits
        needs, and room for one prefill step.
      max_encode_items: media items of one shape that are encoded together at most, rounded up to what gives each
        device that encodes its own as many; and never more than 4096 rows of several on a device. Fewer take less
        memory.
      prefix_caching: whether a prompt begins behind pages that hold its first tokens and media already.
      tensor_parallel_size: devices that the model is divided over.
      encoder_parallel: how these encode media: "items", each device its own, for which all of the encoder's weights lie
        on each; or "weights", all devices each item, with their parts of the weights.
      data_parallel_size: copies of the model, each on so many devices of its own; requests are shared out among them.
        ``max_num_seqs`` and the sizes of the caches are those of one copy.
      preprocess_workers: threads that prepare prompts of a list ahead of the device.
      warm_up: compile every program before the first request.
      on_recompile: "warn" (once, and counted) or "raise" when a program compiles after warm-up.
      compilation_cache_dir: where compiled programs are kept between runs; "auto" is ``aphrodite_jax/xla`` in the
        user's cache directory, None keeps none. A place that JAX was configured with goes before: one in a bucket is
        given to JAX, as ``JAX_COMPILATION_CACHE_DIR``.
      programs_dir: where compiled programs are kept whole, to be read without tracing at the next start, or after
        ``aphrodite-jax plan --export`` on another machine; None keeps none. Reading one can run any code: use your own.
      trace_dir: where each `LLM.generate` leaves a trace of `jax.profiler`, its steps named; None traces nothing.
      show_progress: draw progress bars on stderr, and tell there, after the warm-up, where the memory goes.
    """

    max_num_seqs: int = 16
    max_num_batched_tokens: int | None = None
    page_size: int = 16
    kv_cache_memory: Any = None  # int | None once built
    memory_fraction: float = 0.9
    encoder_cache_tokens: int | None = None
    max_encode_items: int = 8
    prefix_caching: bool = True
    tensor_parallel_size: int = 1
    encoder_parallel: str = "items"
    data_parallel_size: int = 1
    preprocess_workers: int = 2
    warm_up: bool = True
    on_recompile: str = "warn"
    compilation_cache_dir: str | None = "auto"
    programs_dir: str | None = None
    trace_dir: str | None = None
    show_progress: bool = True

    def __post_init__(self):
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "page_size",
            "encoder_cache_tokens",
            "max_encode_items",
            "tensor_parallel_size",
            "data_parallel_size",
            "preprocess_workers",
        ):
            value = getattr(self, name)
            required = name not in ("max_num_batched_tokens", "encoder_cache_tokens")
            if not _is_whole(value, least=1) and (value is not None or required):
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.on_recompile not in ("warn", "raise"):
            raise ConfigError(f"on_recompile must be 'warn' or 'raise', got {self.on_recompile!r}")
        for name in ("compilation_cache_dir", "programs_dir"):
            if "://" in str(getattr(self, name)):
                raise ConfigError(
                    f"{name} must be a directory of this machine, got {getattr(self, name)!r}; JAX's own cache can be "
                    "in a bucket: set JAX_COMPILATION_CACHE_DIR"
                )
        if self.encoder_parallel not in ("items", "weights"):
            raise ConfigError(f"encoder_parallel must be 'items' or 'weights', got {self.encoder_parallel!r}")
        for name in ("prefix_caching", "warm_up", "show_progress"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        fraction = self.memory_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise ConfigError(f"memory_fraction must be in (0, 1], got {self.memory_fraction!r}")
        if self.kv_cache_memory is not None:
            object.__setattr__(self, "kv_cache_memory", _bytes(self.kv_cache_memory))


def split_options(options: Mapping[str, Any]) -> tuple[ModelConfig, EngineConfig]:
    """The two configs of fields of either, by name.

    Raises:
      ConfigError: an option that neither has, or that is out of range.
    """
    of_model = {field.name for field in dataclasses.fields(ModelConfig)}
    of_engine = {field.name for field in dataclasses.fields(EngineConfig)}
    unknown = sorted(set(options) - of_model - of_engine)
    if unknown:
        raise ConfigError(
            f"unknown option {', '.join(map(repr, unknown))}; there are "
            f"{', '.join(sorted((of_model | of_engine) - {'model'}))}"
        )
    return (
        ModelConfig(**{name: value for name, value in options.items() if name in of_model}),
        EngineConfig(**{name: value for name, value in options.items() if name in of_engine}),
    )


def _position_limit(config: transformers.PretrainedConfig) -> int | None:
    """Tokens that the positions of a language model reach; those of dynamic scaling go beyond the trained length."""
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    return int(limit * rope["factor"]) if limit and rope.get("rope_type") == "dynamic" else limit


def _bytes(value: Any) -> int:
    """A count of bytes from a number or from text such as "512MiB" or "2 GB"."""
    if _is_whole(value, least=1):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", str(value), re.IGNORECASE)
    unit = ((match and match[2]) or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    size = int(float(match[1]) * base ** (" kmgt".index(unit[0]) if unit else 0)) if match else 0
    if size < 1:
        raise ConfigError(f"a size in bytes is a number of at least 1 or text such as '512MiB', got {value!r}")
    return size


def _is_whole(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _override(config: transformers.PretrainedConfig, overrides: Mapping[str, Any], where: str) -> None:
    for name, value in overrides.items():
        if not hasattr(config, name) or callable(getattr(config, name)):
            raise ConfigError(f"{where}: the config {type(config).__name__} has no field {name!r}")
        current = getattr(config, name)
        if isinstance(value, Mapping) and isinstance(current, transformers.PretrainedConfig):
            _override(current, value, f"{where}[{name!r}]")
        else:
            try:
                setattr(config, name, _plain(value))
            except Exception as error:  # the config class checks its fields, with errors of its own
                raise ConfigError(f"{where}: {name!r} can't be {value!r}: {error}") from error


def _plain(value: Any) -> Any:
    """A copy of a value with plain dicts in place of frozen ones."""
    if isinstance(value, Mapping):
        return {key: _plain(element) for key, element in value.items()}
    return copy.deepcopy(value)
