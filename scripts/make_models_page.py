"""Write docs/models.md: families by trait, and how close each is to Hugging Face.

    python scripts/make_models_page.py              # from what was measured last
    python scripts/make_models_page.py --measure    # measures anew, a minute or two, and keeps it in tests/goldens

Nothing is typed into the page by hand: a test compares it with what this script makes.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from golden_files import GOLDENS, golden_names, read_golden  # noqa: E402

from aphrodite_jax.architectures import built_in_architectures, resolve_architecture  # noqa: E402
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
MEASURED = GOLDENS / "parity.json"
"""Name of a golden to the largest difference of its prefill logits from ours."""
HEAD = """# Models

Written by `scripts/make_models_page.py`; a test keeps it current. `aphrodite-jax models` lists the same, with plugins.

## Families by trait

| architecture | takes | traits | class |
| --- | --- | --- | --- |
"""
PARITY = """
## Parity with Hugging Face

Tiny models with random weights in float32 on CPU, against the answers of Hugging Face's own classes, which
`scripts/make_goldens.py` stores. The difference is the largest of all logits of all prompts; 2e-4 is what the tests
allow. Greedy answers of 32 tokens are equal, by the model alone and by the engine: in chunks, from cached pages, in
batches.

| model | language model | tower | media of each prompt | largest difference |
| --- | --- | --- | --- | --- |
"""


def measure(name: str) -> float:
    """The largest difference of our prefill logits from a golden's."""
    import parity

    golden = read_golden(name)
    with tempfile.TemporaryDirectory() as directory:
        model, config = parity.load(golden.write_checkpoint(Path(directory)))
        return max(
            float(np.abs(parity.prefill_logits(model, config, prompt) - prompt.logits).max())
            for prompt in golden.prompts
        )


def families() -> list[str]:
    """A row for each architecture."""
    rows = []
    for name in built_in_architectures():
        architecture, _, tower = name.partition("/")
        model_cls = resolve_architecture([architecture], tower=tower or None)
        takes = ", ".join(["text", *MULTIMODAL_REGISTRY.modalities(model_cls)])
        place = f"{model_cls.__module__.rpartition('.')[2]}.{model_cls.__name__}"
        rows.append(f"| `{name}` | {takes} | {'; '.join(model_cls.traits)} | `{place}` |")
    return rows


def parity_rows(measured: dict[str, float]) -> list[str]:
    """A row for each golden."""
    rows = []
    for name in golden_names():
        golden = read_golden(name)
        text = golden.config.get("text_config", golden.config)["model_type"]
        tower = golden.config.get("vision_config", {}).get("model_type", "")
        prompts = ", ".join(map(_media, golden.prompts))
        rows.append(f"| {name} | {text} | {tower} | {prompts} | {measured[name]:.1e} |")
    return rows


def _media(prompt) -> str:
    counts = [("image", len(prompt.images)), ("video", len(prompt.videos))]
    named = [f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts if count]
    return " and ".join(named) or "text"


def page(measured: dict[str, float]) -> str:
    """The whole page."""
    return HEAD + "\n".join(families()) + "\n" + PARITY + "\n".join(parity_rows(measured)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="run every golden again")
    args = parser.parse_args()
    if args.measure:
        measured = {name: float(f"{measure(name):.1e}") for name in golden_names()}
        MEASURED.write_text(json.dumps(measured, indent=1) + "\n")
    PAGE.write_text(page(json.loads(MEASURED.read_text())))


if __name__ == "__main__":
    main()
