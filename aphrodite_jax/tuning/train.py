"""Training on examples: which parameters, in which order, one step after the other."""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float
from tqdm import tqdm

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError, RequestError
from aphrodite_jax.tuning.checkpoints import Checkpoints, checksum, digest
from aphrodite_jax.tuning.examples import Example, ExamplePreparer, PreparedExample
from aphrodite_jax.tuning.lora import lora_modules
from aphrodite_jax.tuning.loss import answer_loss
from aphrodite_jax.tuning.packing import Batch, BatchSizes, MediaShape, media_shapes, pack, pack_order

__all__ = ["History", "fine_tune"]

KEPT_BYTES = 256 * 2**20
"""Of prepared examples that are kept; others are prepared again each time they come."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """What a run tells of itself.

    Attributes:
      losses: of each step, before its update, in nats for each token of an answer; those of the runs that it went on
        from, too.
    """

    losses: Float[np.ndarray, " num_steps"]


def fine_tune(
    model: nnx.Module,
    model_config: ModelConfig,
    examples: Sequence[Example],
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    row_length: int,
    seed: int = 0,
    checkpoint_dir: str | os.PathLike | None = None,
    save_every: int = 100,
    use_tqdm: bool = True,
) -> History:
    """Train a model on examples, in place: its LoRA parameters where it has them (`add_lora`), else all parameters.

    A step is one call of the model on ``row_length`` rows, in which as many examples stand as fit. All examples are
    prepared once before the first step, so that a bad one is found then. A step gives the arrays that are trained
    away and makes new ones: what else holds the model's old arrays must not use them.

    Args:
      model: as `load_model` gives it.
      model_config: the config that it was loaded with.
      examples: in any order; each epoch has its own, by ``seed``.
      optimizer: of optax, with its learning rate.
      num_steps: in all, those before a checkpoint included.
      row_length: tokens of a step, those of media included.
      checkpoint_dir: where the run keeps itself, and goes on from where it was interrupted; then it ends in the same
        losses and weights as an undisturbed run on the same machine.
      save_every: steps between checkpoints; one is kept at the end, too.
      use_tqdm: draw progress bars on stderr, with the loss.

    Raises:
      ConfigError: an option out of range, no examples, or a loss that is no number any more.
      RequestError: an example that can't be used, or that is longer than ``row_length``; the message says which.
      CheckpointError: ``checkpoint_dir`` has checkpoints of another run.
    """
    for name, value in (("num_steps", num_steps), ("row_length", row_length), ("save_every", save_every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} is a whole number of at least 1, got {value!r}")
    data = _Data(ExamplePreparer(model, model_config), examples, row_length, use_tqdm)
    kind = nnx.LoRAParam if lora_modules(model) else nnx.Param
    graphdef, trained, frozen = nnx.split(model, kind, ...)
    state = (trained, optimizer.init(trained))
    plan = list(itertools.islice(pack_order(data.num_rows, row_length, seed=seed), num_steps))
    sizes = BatchSizes.for_counts([[data.counts[index] for index in indices] for indices in plan], row_length)
    take_step, losses = _make_step(graphdef, optimizer), []
    setup = {"row_length": row_length, "seed": seed, "examples": f"{len(examples)}, {data.digest}"}
    setup |= _described(model, *state, frozen)
    with contextlib.nullcontext() if checkpoint_dir is None else Checkpoints(checkpoint_dir, setup) as checkpoints:
        if checkpoints is not None:
            state, losses = checkpoints.restore(state, num_steps=num_steps)
        pending: deque[jax.Array] = deque()
        first = len(losses)
        try:
            with tqdm(total=num_steps, initial=first, desc="fine-tuning", disable=not use_tqdm) as bar:
                for step in range(first, num_steps):
                    batch = pack([data[index] for index in plan[step]], sizes)  # while the device runs the step before
                    *state, loss = take_step(*state, frozen, batch)
                    pending.append(loss)
                    keep = (step + 1) % save_every == 0 or step + 1 == num_steps
                    while len(pending) > (0 if keep else 1):
                        losses.append(_checked(float(pending.popleft()), len(losses)))
                        bar.update()
                        bar.set_postfix(loss=f"{losses[-1]:.4f}")
                    if keep and checkpoints is not None:
                        checkpoints.save(state, losses)
        finally:
            nnx.update(model, state[0])
    return History(losses=np.array(losses, np.float32))


def _make_step(graphdef: Any, optimizer: optax.GradientTransformation) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """The jitted step: new parameters and state of the optimizer, whose arrays are donated, and the loss before."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained, opt_state, frozen, batch: Batch):
        def loss_of(trained):
            return answer_loss(nnx.merge(graphdef, trained, frozen), batch)

        loss, gradient = jax.value_and_grad(loss_of)(trained)
        with jax.numpy_dtype_promotion("standard"):  # the optimizer's own arithmetic may mix dtypes, ours does not
            updates, opt_state = optimizer.update(gradient, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, loss

    return step


def _checked(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise ConfigError(f"the loss of step {step} is {loss}: take a smaller learning rate, or clip gradients")
    return loss


def _described(model: nnx.Module, trained: nnx.State, opt_state: Any, frozen: nnx.State) -> dict[str, str]:
    """What is trained from which state, in short texts by name."""
    parameters = {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(trained)}
    shapes = [(name, x.shape, str(x.dtype)) for name, x in parameters.items()]
    kept, _ = jax.tree_util.tree_flatten_with_path(opt_state)
    lora = {name: module.scale for name, module in lora_modules(model).items()}
    return {
        "trained parameters": f"{len(shapes)}, {digest(shapes)}",
        "other parameters": checksum(frozen),
        "scale of LoRA": ", ".join(map(str, sorted(set(lora.values())))) or "none",
        "optimizer": digest([(jax.tree_util.keystr(path), x.shape, str(x.dtype)) for path, x in kept]),
    }


class _Data:
    """Examples, prepared once to be checked and counted, and again when they come where they were not kept."""

    def __init__(self, prepare: ExamplePreparer, examples: Sequence[Example], row_length: int, use_tqdm: bool):
        self._prepare, self._examples = prepare, examples
        self._kept: dict[int, PreparedExample] = {}
        self.num_rows: list[int] = []
        self.counts: list[tuple[int, Counter[MediaShape]]] = []
        hashes, free = [], KEPT_BYTES
        if not len(examples):
            raise ConfigError("there are no examples")
        for index in tqdm(range(len(examples)), desc="examples", disable=not use_tqdm):
            try:
                example = prepare(examples[index])
            except RequestError as error:
                raise type(error)(f"example {index}: {error}") from error
            if example.num_rows > row_length:
                raise RequestError(
                    f"example {index} has {example.num_rows} rows, row_length is {row_length}: shorten it, or raise "
                    "row_length"
                )
            self.num_rows.append(example.num_rows)
            self.counts.append((example.num_answers, media_shapes(example)))
            hashes.append((example.tokens.tolist(), example.prompt_length, [m.content_hash for m in example.media]))
            free -= _num_bytes(example)
            if free >= 0:
                self._kept[index] = example
        self.digest = digest(hashes)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> PreparedExample:
        return self._kept[index] if index in self._kept else self._prepare(self._examples[index])


def _num_bytes(example: PreparedExample) -> int:
    arrays = [array for item in example.media for array in (item.mm_kwargs or {"embeds": item.embeds}).values()]
    return sum(array.nbytes for array in [example.tokens, example.positions, *arrays] if array is not None)
