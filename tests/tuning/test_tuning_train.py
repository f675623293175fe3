"""Training: what changes and what does not, going on after an interruption, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tuning_cases import shared_case

from aphrodite_jax.errors import CheckpointError, ConfigError, RequestError
from aphrodite_jax.tuning import Example, add_lora, fine_tune, load_model, lora_modules, train

STEPS, ROWS = 6, 120
TARGETS = r"(?!.*tower.*layers\.2).*\.(q_proj|fc1|"
"""With a projection of the projector behind it; of the tower, the last layer is not used."""
OPTIMIZER = optax.adamw(optax.cosine_decay_schedule(1e-2, STEPS))


@pytest.fixture(scope="module")
def case():
    return shared_case("llava_clip_mistral")


@functools.cache
def template(case, **options):
    model = nnx.clone(case.model)
    add_lora(model, **{"rank": 4, "targets": TARGETS + "linear_1)", "rngs": nnx.Rngs(0)} | options)
    return model


def with_lora(case, **options):
    """A model whose LoRA is its own, to be trained."""
    model = nnx.clone(template(case, **options))
    nnx.update(model, jax.tree.map(jnp.copy, nnx.state(model, nnx.LoRAParam)))
    return model


def tune(case, model, **options):
    defaults = {"optimizer": OPTIMIZER, "num_steps": STEPS, "row_length": ROWS, "save_every": 2, "use_tqdm": False}
    examples = options.pop("examples", case.examples)
    return fine_tune(model, case.model_config, examples, **defaults | options)


def values(model, *kinds):
    return {path: np.asarray(x.get_value()) for path, x in nnx.to_flat_state(nnx.state(model, *kinds))}


def changed(before, after):
    return {path for path in before if not np.array_equal(before[path], after[path])}


@pytest.mark.once
def test_an_interrupted_run_ends_as_an_undisturbed_one(case, tmp_path, monkeypatch):
    """LoRA alone is trained, in the tower, the projector and the language model; the loss falls."""
    model = with_lora(case)
    before, fresh = values(model), set(values(model, nnx.LoRAParam))
    undisturbed = tune(case, model)
    expected = values(model)
    assert len(undisturbed.losses) == STEPS
    assert undisturbed.losses[-1] < 0.7 * undisturbed.losses[0]
    assert changed(before, expected) == fresh
    assert {path.split(".")[0] for path in lora_modules(model)} == {
        "language_model",
        "multi_modal_projector",
        "vision_tower",
    }

    packs = []

    def pack(examples, sizes):
        packs.append(examples)
        if len(packs) == 6:
            raise KeyboardInterrupt
        return real_pack(examples, sizes)

    real_pack = train.pack
    monkeypatch.setattr(train, "pack", pack)
    model = with_lora(case)
    with pytest.raises(KeyboardInterrupt):
        tune(case, model, checkpoint_dir=tmp_path)
    assert changed(before, values(model)) == fresh  # it can be looked at, and went five steps
    monkeypatch.undo()
    model = with_lora(case)
    resumed = tune(case, model, checkpoint_dir=tmp_path)
    np.testing.assert_array_equal(resumed.losses, undisturbed.losses)
    assert changed(expected, values(model)) == set()

    finished = with_lora(case)  # a run that is over gives its end once more
    np.testing.assert_array_equal(tune(case, finished, checkpoint_dir=tmp_path).losses, undisturbed.losses)
    assert changed(expected, values(finished)) == set()

    fresh, other = with_lora(case), with_lora(case)
    norm = other.language_model.model.norm.scale
    norm.set_value(norm.get_value() + 1)
    for message, model, options in (
        ("row_length was 120, is 130", fresh, {"row_length": 130}),
        ("seed was 0, is 1", fresh, {"seed": 1}),
        ("examples was '3, .*, is '2, ", fresh, {"examples": case.examples[:2]}),
        ("optimizer was", fresh, {"optimizer": optax.sgd(1e-2)}),
        ("after 6 steps, past num_steps 5", fresh, {"num_steps": 5}),
        ("run: other parameters was [^;]*$", other, {}),
        ("trained parameters was .* scale of LoRA was '1.0', is '2.0'", with_lora(case, rank=2, alpha=4), {}),
    ):
        before = values(model)
        with pytest.raises(CheckpointError, match=message):
            tune(case, model, checkpoint_dir=tmp_path, **options)
        assert changed(before, values(model)) == set()


@pytest.mark.once
def test_all_parameters_are_trained_where_there_is_no_lora(case):
    model = load_model(case.model_config)
    before = values(model)
    losses = tune(case, model, num_steps=3, optimizer=optax.sgd(1e-2)).losses
    assert losses[-1] < losses[0]
    # The tower's last layer is not used, nor its last norm.
    assert {path[0] for path in changed(before, values(model))} == set(dict(nnx.iter_children(model)))
    unused = {path for path in before if path[:2] == ("vision_tower", "vision_model") and "2" in map(str, path)}
    used = {path for path in before if path not in unused and "post_layernorm" not in path}
    # What all keys share is nothing to a softmax: their biases have no gradient but what is rounded.
    without_gradient = {path for path in used if path[-2:] == ("k_proj", "bias")}
    assert without_gradient
    assert changed(before, values(model)) | without_gradient == used


def test_a_loss_that_is_no_number_ends_the_run(case):
    model = with_lora(case)
    module = next(iter(lora_modules(model).values()))
    module.lora_a.set_value(module.lora_a.get_value() * np.float32("nan"))
    with pytest.raises(ConfigError, match="the loss of step 0 is nan: take a smaller learning rate"):
        tune(case, model)


def test_options_and_examples_are_checked_before_the_first_step(case, monkeypatch):
    monkeypatch.setattr(train, "_make_step", lambda *_: pytest.fail("a step was made"))
    model = case.model
    for options, error, message in (
        ({"num_steps": 0}, ConfigError, "num_steps is a whole number of at least 1, got 0"),
        ({"row_length": 1.5}, ConfigError, "row_length is a whole number"),
        ({"save_every": 0}, ConfigError, "save_every is a whole number"),
        ({"examples": []}, ConfigError, "there are no examples"),
        ({"row_length": 50}, RequestError, r"example 2 has 67 rows, row_length is 50"),
        ({"examples": [*case.examples, Example(prompt=[5], answer="")]}, RequestError, "example 3: the answer ''"),
    ):
        with pytest.raises(error, match=message):
            tune(case, model, **options)


def test_examples_that_are_not_kept_are_prepared_again(case, monkeypatch):
    monkeypatch.setattr(train, "KEPT_BYTES", 30_000)  # the first two
    prepared = []

    def prepare(example):
        prepared.append(example)
        return case.prepared[case.examples.index(example)]

    data = train._Data(prepare, case.examples, ROWS, use_tqdm=False)
    assert [data[index].num_rows for index in (0, 1, 2, 2)] == [15, 32, 67, 67]
    assert prepared == [*case.examples, case.examples[2], case.examples[2]]


def test_the_bar_shows_the_loss(case, capsys):
    losses = tune(case, with_lora(case), num_steps=1, use_tqdm=True).losses
    err = capsys.readouterr().err
    assert f"loss={losses[0]:.4f}" in err
    assert "examples: 100%" in err
    assert jax.tree.leaves(losses)[0].dtype == np.float32
