"""Fine-tuning: examples to learn, LoRA, training that goes on after an interruption, and a merged checkpoint.

    model_config = ModelConfig(model=...)
    model = load_model(model_config)
    add_lora(model, rank=16, rngs=nnx.Rngs(0))
    fine_tune(model, model_config, [Example(prompt=..., answer=...), ...], optimizer=optax.adamw(1e-4), ...)
    save_merged(model, model_config, "tuned")
    LLM("tuned")

The modules that are trained here are those that are served, and prompts are made ready by the same functions.
"""

from aphrodite_jax.modeling.loader import load_model
from aphrodite_jax.tuning.examples import Example, ExamplePreparer, PreparedExample
from aphrodite_jax.tuning.lora import DEFAULT_TARGETS, LoRALinear, add_lora, lora_modules, merge_lora
from aphrodite_jax.tuning.loss import answer_loss
from aphrodite_jax.tuning.packing import Batch, BatchSizes, pack
from aphrodite_jax.tuning.save import save_merged
from aphrodite_jax.tuning.train import History, fine_tune

__all__ = [
    "DEFAULT_TARGETS",
    "Batch",
    "BatchSizes",
    "Example",
    "ExamplePreparer",
    "History",
    "LoRALinear",
    "PreparedExample",
    "add_lora",
    "answer_loss",
    "fine_tune",
    "load_model",
    "lora_modules",
    "merge_lora",
    "pack",
    "save_merged",
]
