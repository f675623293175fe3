"""A checkpoint's weights into a model, one tensor at a time."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx
from jax.sharding import Mesh

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import CheckpointError, ConfigError
from aphrodite_jax.modeling.loader.checkpoint_files import checkpoint_tensors
from aphrodite_jax.modeling.loader.matching import match
from aphrodite_jax.modeling.loader.parameters import Parameter, WantedTensor, wanted_tensors
from aphrodite_jax.modeling.loader.safetensors_file import FLOAT_DTYPES, StoredTensor, read_blocks
from aphrodite_jax.modeling.sharding import Placement, place_parameters
from aphrodite_jax.multimodal.context import model_class

__all__ = ["abstract_model", "load_model", "resolve_dtype"]

ALIGNMENT = 64
"""Bytes. The CPU backend takes an array so aligned as it is, where it would copy another."""
SERVED_DTYPES = ("float32", "bfloat16", "float16")


def load_model(model_config: ModelConfig, mesh: Mesh | None = None, encoder_parallel: str = "items") -> nnx.Module:
    """The model of ``model_config`` with its weights, on the default device, or divided over those of a mesh.

    ``encoder_parallel`` says how what encodes media lies on a mesh (`place_parameters`).

    Nothing is initialised: the model is built in the abstract and filled tensor by tensor, so that host
    memory stays under the weights in their target dtype (of which an accelerator leaves none there) plus one
    tensor.

    Raises:
      CheckpointError: files that are missing or damaged, or tensors that do not fit (all such at once).
      ConfigError: an architecture or a way of storing weights that can't be served.
    """
    hf_config = model_config.hf_config
    if getattr(hf_config, "quantization_config", None) is not None:
        raise ConfigError(
            f"model {model_config.model!r} is quantized (quantization_config), which can't be served; take "
            "its float32, bfloat16 or float16 original"
        )
    model_cls = model_class(model_config)
    stored = checkpoint_tensors(model_config)
    dtype = resolve_dtype(model_config)
    model = abstract_model(model_cls, hf_config, dtype)
    wanted = wanted_tensors(model)
    chosen, tied = match(model_cls.weight_rules, stored, wanted, source=repr(model_config.model))
    for path, name in tied.items():
        _check_tied(path, stored[name], {p: stored[n] for p, n in chosen.items() if wanted[p].is_embedding})
    graphdef, state = nnx.split(model)
    places = {} if mesh is None else place_parameters(model, mesh, encoder_parallel)
    variables = dict(nnx.to_flat_state(state))
    for name, tensor in wanted.items():
        for parameter, rows in _rows_of_parts(tensor, stored[chosen[name]]):
            value = _read(name, rows, parameter, places.get(parameter.path))
            variables[parameter.path] = variables[parameter.path].replace(value)
    return nnx.merge(graphdef, nnx.from_flat_state(variables))


def abstract_model(model_cls: Any, hf_config: transformers.PretrainedConfig, dtype: Any) -> Any:
    """The model with shapes in the place of its parameters; nothing is computed."""
    return nnx.eval_shape(lambda: model_cls(hf_config, dtype=dtype, rngs=_SameKey(0)))


class _SameKey(nnx.Rngs):
    """Gives one key for everything, where no number is ever drawn.

    Streams that count would have each parameter wait for all those before it: minutes for the largest models.
    """

    def __getattr__(self, name: str) -> Any:
        return lambda: jax.random.key(0)


def resolve_dtype(model_config: ModelConfig) -> np.dtype:
    """The dtype of weights and computation.

    "auto" is the config's dtype, else that of most of the checkpoint's numbers; float64 becomes float32.

    Raises:
      ConfigError: "auto", and the checkpoint's dtype can't be served.
    """
    name = model_config.dtype
    if name == "auto":
        name = _config_dtype(model_config) or _stored_dtype(checkpoint_tensors(model_config))
        name = "float32" if name == "float64" else name
    if name not in SERVED_DTYPES:
        raise ConfigError(
            f"model {model_config.model!r} has the dtype {name!r}, which can't be served; give dtype, one of "
            f"{', '.join(SERVED_DTYPES)}"
        )
    return jnp.dtype(name)


def _config_dtype(model_config: ModelConfig) -> str | None:
    for config in (model_config.hf_config, model_config.hf_text_config):
        dtype = getattr(config, "dtype", None)
        if dtype is not None:
            return str(dtype).removeprefix("torch.")  # a torch.dtype where torch is installed, else a name
    return None


def _stored_dtype(stored: Mapping[str, StoredTensor]) -> str | None:
    counts = Counter()
    for tensor in stored.values():
        if tensor.dtype in FLOAT_DTYPES:
            dtype = FLOAT_DTYPES[tensor.dtype]
            counts[dtype.name] += tensor.num_bytes // dtype.itemsize
    return counts.most_common(1)[0][0] if counts else None


def _rows_of_parts(tensor: WantedTensor, stored: StoredTensor) -> Iterator[tuple[Parameter, StoredTensor]]:
    """Each parameter that a tensor fills, and its rows of it."""
    if len(tensor.parts) == 1:
        yield tensor.parts[0], stored
        return
    begin = 0
    for parameter in tensor.parts:
        end = begin + parameter.shape[0]
        yield parameter, stored.rows(begin, end)
        begin = end


def _read(name: str, tensor: StoredTensor, parameter: Parameter, place: Placement | None) -> jax.Array:
    """The tensor in our axes and dtype, on the device or devices."""
    array = _empty_aligned(parameter.value.shape, parameter.value.dtype)
    view = np.atleast_1d(parameter.view(array))
    for rows, block in read_blocks(tensor):
        with np.errstate(over="ignore"):
            view[rows] = block.astype(array.dtype)
        if array.dtype == np.float16 and np.isinf(view[rows]).sum() > np.isinf(block).sum():
            raise CheckpointError(
                f"{name} ({tensor.dtype}) has numbers past the range of float16; load with dtype='bfloat16' "
                "or 'float32'"
            )
    # Transfers run in the background and hold their array: without the wait, many could pile up in host memory.
    if place is None:
        return jax.block_until_ready(jax.device_put(array))
    return jax.block_until_ready(jax.device_put(place.values(array), place.sharding))


def _empty_aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(num_bytes + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + num_bytes].view(dtype).reshape(shape)


def _check_tied(path: str, head: StoredTensor, embeddings: Mapping[str, StoredTensor]) -> None:
    """Refuse an output head that the config says is the input embeddings, and that differs from them."""
    prefix = path.removesuffix("lm_head.weight")
    twins = [tensor for p, tensor in embeddings.items() if p.startswith(prefix) and tensor.shape == head.shape]
    if len(twins) == 1 and twins[0].dtype == head.dtype and head.dtype in FLOAT_DTYPES:
        pairs = zip(read_blocks(head), read_blocks(twins[0]), strict=True)
        if all(np.array_equal(ours, theirs) for (_, ours), (_, theirs) in pairs):
            return
    raise CheckpointError(
        f"the config ties the output head to the input embeddings, but the checkpoint's {path} is not equal "
        "to them; if the head is right, set hf_overrides={'tie_word_embeddings': False}"
    )
