"""Tiny models with examples, for the tests of fine-tuning."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from golden_files import Golden, media_of, read_golden
from parity import COMPILE_FAST

from aphrodite_jax import ModelConfig
from aphrodite_jax.tuning import Example, ExamplePreparer, PreparedExample, answer_loss, load_model


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A golden's model and its prompts with answers of 3, 4 ... tokens, all prepared."""

    golden: Golden
    directory: Path
    model_config: ModelConfig
    model: Any
    examples: tuple[Example, ...]
    prepared: tuple[PreparedExample, ...]

    @property
    def num_rows(self) -> int:
        return sum(example.num_rows for example in self.prepared)


def open_case(name: str, directory: Path | None = None) -> Case:
    """The golden's checkpoint, written to a directory that nobody clears before the end if none is given."""
    golden = read_golden(name)
    directory = golden.write_checkpoint(Path(tempfile.mkdtemp()) if directory is None else directory)
    model_config = ModelConfig(model=directory, dtype="float32", limit_mm_per_prompt=golden.media_limits)
    examples = tuple(
        Example(
            prompt=prompt.prompt.tolist(), answer=prompt.tokens[: 3 + i].tolist(), multi_modal_data=media_of(prompt)
        )
        for i, prompt in enumerate(golden.prompts)
    )
    model = load_model(model_config)
    return Case(
        golden=golden,
        directory=directory,
        model_config=model_config,
        model=model,
        examples=examples,
        prepared=tuple(map(ExamplePreparer(model, model_config), examples)),
    )


shared_case = functools.cache(open_case)
"""A case that tests share, and change nothing of."""


def compiled_loss(model, *, gradient: bool = False):
    """`answer_loss` of a batch, or the loss and its gradient by all parameters, compiled once for each shape."""
    graphdef, state = nnx.split(model)

    def loss(state, batch):
        return answer_loss(nnx.merge(graphdef, state), batch)

    jitted = jax.jit(jax.value_and_grad(loss) if gradient else loss, compiler_options=COMPILE_FAST)
    return lambda batch: jitted(state, batch)


def logits_of(model, batch):
    """Of the rows of a batch without media that come before an answer's tokens."""
    graphdef, state = nnx.split(model)

    def logits(state, batch):
        model = nnx.merge(graphdef, state)
        hidden, _ = model(batch.input_ids, batch.positions, None, batch.metadata)
        return model.compute_logits(hidden[batch.answer_rows])

    return np.asarray(jax.jit(logits, compiler_options=COMPILE_FAST)(state, batch))
