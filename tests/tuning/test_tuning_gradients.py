"""Losses and gradients by every parameter, against Hugging Face's models here and now."""

import chex
import numpy as np
import pytest
from flax import nnx
from tuning_cases import compiled_loss, open_case

torch = pytest.importorskip("torch", reason="the reference models of Hugging Face need torch")

import checkpoints  # noqa: E402
from golden_cases import all_cases  # noqa: E402
from make_goldens import load_reference  # noqa: E402

from aphrodite_jax import ModelConfig  # noqa: E402
from aphrodite_jax.tuning import BatchSizes, load_model, pack  # noqa: E402

TOLERANCE = 1e-4
IGNORED = -100


def reference_loss(model, golden, directory, prompt, example):
    """Hugging Face's loss of one example, with labels on its answer alone."""
    case = all_cases()[golden.name]
    expanded, keywords = case.reference_inputs(
        directory, prompt.prompt.tolist(), list(prompt.images), list(prompt.videos)
    )
    answer = example.tokens[example.prompt_length :].tolist()
    if "token_type_ids" in keywords:
        keywords["token_type_ids"] = torch.nn.functional.pad(keywords["token_type_ids"], (0, len(answer)))
    labels = torch.tensor([[IGNORED] * len(expanded) + answer])
    return model(input_ids=torch.tensor([expanded + answer]), labels=labels, **keywords).loss


@pytest.mark.once
@pytest.mark.parametrize(("name", "count"), [("llava_clip_llama", 3), ("gemma3", 2)])
def test_gradients_are_the_reference_s(tmp_path, name, count):
    """Examples without a picture, with one and with three: here in one pack, of the reference one after another."""
    case = open_case(name, tmp_path / "model")
    golden, examples = case.golden, case.prepared[:count]
    reference = load_reference(golden.write_checkpoint(tmp_path / "reference", layout="memory"))
    total = sum(example.num_answers for example in examples)
    losses = [
        reference_loss(reference, golden, tmp_path / "reference", prompt, example)
        for prompt, example in zip(golden.prompts, examples, strict=False)
    ]
    expected = sum(loss * (e.num_answers / total) for loss, e in zip(losses, examples, strict=True))
    expected.backward()

    loss, gradient = compiled_loss(case.model, gradient=True)(pack(examples, BatchSizes.of([examples], case.num_rows)))
    np.testing.assert_allclose(loss, expected.item(), rtol=0, atol=TOLERANCE)
    chex.assert_trees_all_close(gradient, loaded(gradients(reference), tmp_path), rtol=0, atol=TOLERANCE)


def gradients(reference):
    """By name; zeros for what the loss does not reach, the last layers of a tower of which others are taken."""
    named = dict(reference.named_parameters())
    reached = [name for name, x in named.items() if x.grad is not None]
    assert len(reached) > 0.7 * len(named)
    for part in ("norm", "embed_tokens", "vision", "projector", "lm_head", "position_embedding"):
        found = [named[name].grad.abs().max() for name in reached if part in name]
        assert found, part
        assert max(found) > 10 * TOLERANCE, part
    return {name: np.zeros(x.shape, np.float32) if x.grad is None else x.grad.numpy() for name, x in named.items()}


def loaded(tensors, tmp_path):
    """The tensors as our model would load them: as a checkpoint of the same model."""
    checkpoints.write_tensors(tmp_path / "reference", tensors)
    return nnx.state(load_model(ModelConfig(model=tmp_path / "reference", dtype="float32")))
