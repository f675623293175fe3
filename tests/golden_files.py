"""The stored answers of Hugging Face's models, as `scripts/make_goldens.py` writes them."""

import dataclasses
import itertools
import json
from pathlib import Path

import checkpoints
import numpy as np
from PIL import Image

GOLDENS = Path(__file__).parent / "goldens"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldenPrompt:
    """One prompt and what the reference made of it.

    Attributes:
      prompt: token ids with one placeholder an image.
      input_ids: token ids ``[T]`` with one placeholder a row of an image.
      images: ``[h, w, 3]`` uint8 each.
      videos: ``[frames, h, w, 3]`` uint8 each.
      logits: ``[T, V]`` float32, of the prefill.
      tokens: the greedy answer.
    """

    prompt: np.ndarray
    input_ids: np.ndarray
    images: tuple[np.ndarray, ...]
    videos: tuple[np.ndarray, ...]
    logits: np.ndarray
    tokens: np.ndarray

    @property
    def continued(self) -> np.ndarray:
        """``input_ids`` and the answer but for its last token: the rows that chose all of the answer."""
        return np.concatenate([self.input_ids, self.tokens[:-1]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Golden:
    """One model by its config and the seed of its weights, and its prompts.

    ``described`` is what else `checkpoints.write_checkpoint` must know of it.
    """

    name: str
    config: dict
    described: dict
    seed: int
    prompts: tuple[GoldenPrompt, ...]

    @property
    def media_limits(self) -> dict[str, int]:
        """Modality to the most items of one of the prompts."""
        counts = {kind: max(len(getattr(prompt, f"{kind}s")) for prompt in self.prompts) for kind in ("image", "video")}
        return {kind: count for kind, count in counts.items() if count}

    def write_checkpoint(self, directory: Path, *, config: dict | None = None, **options) -> Path:
        """The model's directory; ``options`` as `checkpoints.write_checkpoint` has them."""
        return checkpoints.write_checkpoint(directory, config or self.config, self.seed, **self.described, **options)


def media_of(prompt: GoldenPrompt) -> dict[str, list]:
    """The prompt's media as a user gives them."""
    media = {"image": list(map(Image.fromarray, prompt.images)), "video": list(prompt.videos)}
    return {modality: items for modality, items in media.items() if items}


def golden_names() -> list[str]:
    """Every golden that is stored."""
    return sorted(file.stem for file in GOLDENS.glob("*.npz"))


def read_golden(name: str) -> Golden:
    """The golden called ``name``."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        stored = dict(file)
    count = sum(key.endswith(".logits") for key in stored)
    for index in range(count):
        if f"{index}.images" not in stored:  # of different sizes
            names = itertools.takewhile(stored.__contains__, (f"{index}.image{i}" for i in itertools.count()))
            stored[f"{index}.images"] = [stored[name] for name in names]
        stored[f"{index}.images"] = tuple(stored[f"{index}.images"])
        names = itertools.takewhile(stored.__contains__, (f"{index}.video{i}" for i in itertools.count()))
        stored[f"{index}.videos"] = tuple(stored[name] for name in names)
    fields = [field.name for field in dataclasses.fields(GoldenPrompt)]
    return Golden(
        name=name,
        config=json.loads(str(stored["config"])),
        seed=int(stored["seed"]),
        described=json.loads(str(stored["described"])),
        prompts=tuple(
            GoldenPrompt(**{field: stored[f"{index}.{field}"] for field in fields}) for index in range(count)
        ),
    )


def write_chat_model(directory: Path) -> Path:
    """A tiny LLaVA with a chat template that sets every part between ``w3`` and ``w4``."""
    read_golden("llava_clip_llama").write_checkpoint(directory)
    (directory / "chat_template.jinja").write_text(
        "{% for message in messages %}w3 {% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}w4"
    )
    return directory
