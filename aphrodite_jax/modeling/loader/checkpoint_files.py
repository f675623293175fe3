"""From a directory or hub id to the tensors that a checkpoint holds, by name."""

import json
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import CheckpointError
from aphrodite_jax.modeling.loader.safetensors_file import StoredTensor, read_header

__all__ = ["INDEX_FILE", "SINGLE_FILE", "checkpoint_tensors"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HUB_PATTERNS = ["model*.safetensors", INDEX_FILE]
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def checkpoint_tensors(model_config: ModelConfig) -> dict[str, StoredTensor]:
    """Name to place of every tensor; hub files are downloaded first, unless they are in the local cache.

    Raises:
      CheckpointError: there are no safetensors files, or one is missing or damaged, or the hub can't serve.
    """
    directory = Path(str(model_config.model)) if model_config.is_local else _download(model_config)
    if (directory / INDEX_FILE).is_file():
        return _sharded(directory)
    if (directory / SINGLE_FILE).is_file():
        return read_header(directory / SINGLE_FILE)
    raise CheckpointError(_what_is_there(directory, model_config))


def _download(model_config: ModelConfig) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(model_config.model), revision=model_config.revision, allow_patterns=HUB_PATTERNS
            )
        )
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"model {model_config.model!r} is neither a directory here nor in the hub cache, and the hub "
            f"can't be reached ({error}). Go online once (unset HF_HUB_OFFLINE), or give a local directory"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"can't download model {model_config.model!r}"
            + (f" at revision {model_config.revision!r}" if model_config.revision else "")
            + f" from the hub: {error}. Check the name and revision, and log in if the model is gated"
        ) from error


def _sharded(directory: Path) -> dict[str, StoredTensor]:
    index = directory / INDEX_FILE
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
        outside = [name for name in files if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} has no readable 'weight_map' ({error}); download it again") from error
    if outside:
        raise CheckpointError(f"{index} names files outside its directory: {', '.join(outside)}")
    missing = [name for name in files if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(f"{directory} lacks shards of its index: {', '.join(missing)}; download them")
    headers = {name: read_header(directory / name) for name in files}
    lost = [name for name, file in weight_map.items() if name not in headers[file]]
    if lost:
        raise CheckpointError(
            f"{index} does not belong to its shards: {', '.join(sorted(lost)[:8])} "
            f"({len(lost)} tensors) are not in the files that it names"
        )
    # A tensor that the index does not name is still one that the model must know or the rules must drop.
    stored = {name: tensor for header in headers.values() for name, tensor in header.items()}
    return stored | {name: headers[file][name] for name, file in weight_map.items()}


def _what_is_there(directory: Path, model_config: ModelConfig) -> str:
    message = f"model {model_config.model!r} has neither {SINGLE_FILE} nor {INDEX_FILE} in {directory}"
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (
            f"{message}, only {', '.join(pickles[:4])}. Pickled weights are not read, since opening one can "
            "run any program that is in it; where you trust it, load it once with transformers and save it "
            "with save_pretrained, which writes safetensors"
        )
    if not model_config.is_local:
        return (
            f"{message}. If the hub has them, only other files are in the local cache: go online once (and "
            "unset HF_HUB_OFFLINE); else convert the model to safetensors"
        )
    names = ", ".join(sorted(path.name for path in directory.iterdir()))
    return f"{message}; there are: {names or 'no files'}"
