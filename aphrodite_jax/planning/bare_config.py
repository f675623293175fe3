"""A config without the files beside it: a processor that the config tells enough about is made up."""

import json
import shutil
from pathlib import Path
from typing import Any

__all__ = ["with_processor"]

PROCESSORS = {"llava": "CLIPImageProcessor", "gemma3": "Gemma3ImageProcessor"}
"""Model types that resize every image to the tower's size, and their processors."""
FILES = ("preprocessor_config.json", "processor_config.json")


def with_processor(model: str, folder: str | Path) -> str:
    """``model``, or ``folder`` with its config and what the config tells of its image processor.

    Args:
      model: a directory or a hub id, or a config file alone.
      folder: empty; written to where ``model`` is a config file, or a directory without a processor for a model that
        needs no more than the size of its images.
    """
    path = Path(model)
    source = path if path.is_file() else path / "config.json"
    if not source.is_file() or (path.is_dir() and any((path / name).exists() for name in FILES)):
        return model
    config = json.loads(source.read_text())
    processor = PROCESSORS.get(config.get("model_type", ""))
    if path.is_dir() and processor is None:
        return model  # whose own error says what is missing
    for file in path.glob("*.json") if path.is_dir() else [path]:
        shutil.copyfile(file, Path(folder) / (file.name if path.is_dir() else "config.json"))
    if processor is not None and "image_size" in config.get("vision_config", {}):
        (Path(folder) / FILES[0]).write_text(json.dumps(_processor(processor, config["vision_config"]["image_size"])))
    return str(folder)


def _processor(name: str, side: int) -> dict[str, Any]:
    """Its file; colours do not matter where no image is looked at."""
    size: dict[str, int] = {"height": side, "width": side}
    return {
        "image_processor_type": name,
        "do_resize": True,
        "size": {"shortest_edge": side} if name == "CLIPImageProcessor" else size,
        "do_center_crop": name == "CLIPImageProcessor",
        "crop_size": size,
    }
