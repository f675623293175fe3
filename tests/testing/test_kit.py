"""Parts of the conformance kit by themselves: its options, weights, and programs that are late."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from right_model import Strips, build, media_shapes, tiny_config

from aphrodite_jax.errors import ConfigError
from aphrodite_jax.executor.programs import CompileJob
from aphrodite_jax.testing import CLAUSES, ConformanceError, byte_tokenizer, check_multimodal_model
from aphrodite_jax.testing.clauses import GROUPS
from aphrodite_jax.testing.programs import DeclaredPrograms, fast_options
from aphrodite_jax.testing.tiny.model import special_tokens
from aphrodite_jax.testing.weights import random_weights


def test_clauses_are_named_and_each_says_what_it_asks():
    assert list(CLAUSES) == [clause.__name__ for group in GROUPS for clause in group]
    assert len(set(CLAUSES.values())) == len(CLAUSES)
    assert all(len(sentence) > 30 and sentence[0].islower() for sentence in CLAUSES.values())


@pytest.mark.once
def test_clauses_can_be_chosen():
    lying = build(bound=lambda ctx: 4)
    check_multimodal_model(lying, tiny_config(), clauses=["mapper_is_pure", "rows_see_what_is_declared"])
    with pytest.raises(ConformanceError) as caught:
        check_multimodal_model(lying, tiny_config(), clauses=["bound_is_a_bound"])
    assert list(caught.value.broken) == [CLAUSES["bound_is_a_bound"]]
    with pytest.raises(ConfigError, match="there is no clause mapper_is_poor; there are mapper_is_pure, "):
        check_multimodal_model(lying, tiny_config(), clauses=["mapper_is_poor"])


@pytest.mark.once
def test_a_program_of_the_engine_that_is_late_is_told():
    undeclared = build(shapes=lambda ctx: media_shapes(ctx)[1:])
    with pytest.raises(ConformanceError, match=r"the engine compiled late: encode for .*'is_strip', \(1, 2\)"):
        check_multimodal_model(undeclared, tiny_config(), clauses=["nothing_compiles_late"], max_examples=5)


def test_it_must_be_told_what_stands_for_an_item():
    config = tiny_config()
    del config.image_token_index
    with pytest.raises(ConfigError, match=r"give placeholders=\{'image': token id\}"):
        check_multimodal_model(Strips, config)


def test_weights_that_are_drawn_are_random_and_others_as_built():
    class Parts(nnx.Module):
        def __init__(self, config, *, dtype, rngs):
            self.linear = nnx.Linear(400, 30, dtype=dtype, param_dtype=dtype, rngs=rngs)
            self.scale = nnx.Param(jnp.full(5, 3.0, dtype))
            self.drawn = nnx.Param(jax.random.normal(rngs.params(), (900,), dtype))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    parts = nnx.merge(*random_weights(Parts, None))
    np.testing.assert_array_equal(parts.scale[...], [3.0] * 5)
    np.testing.assert_array_equal(parts.linear.bias[...], [0.0] * 30)
    assert abs(float(parts.linear.kernel[...].std()) * 20 - 1) < 0.05
    assert abs(float(parts.drawn[...].std()) * 30 - 1) < 0.1
    again = nnx.merge(*random_weights(Parts, None))
    np.testing.assert_array_equal(parts.linear.kernel[...], again.linear.kernel[...])


def job(length, name="double"):
    return CompileJob(name=name, key=length, fn=lambda x: x * 2, args=(np.arange(length, dtype=np.float32),))


def test_programs_that_are_declared_run_and_others_are_told():
    programs = DeclaredPrograms()
    programs.compile([job(3), job(4)], show_progress=False)
    assert programs.table() == ()
    programs.seal()
    np.testing.assert_array_equal(programs.run(job(3)), [0, 2, 4])
    assert [program.key for program in programs.table()] == [3]
    assert programs.late == []
    np.testing.assert_array_equal(programs.run(job(2)), [0, 2])
    np.testing.assert_array_equal(programs.run(job(2)), [0, 2])
    assert programs.late == ["double for 2"] * 2


def test_a_declared_program_is_that_of_its_declaration():
    programs = DeclaredPrograms()
    declared = CompileJob(name="double", key=3, fn=lambda x: x * 2, args=(np.zeros(5, np.float32),))
    programs.compile([declared], show_progress=False)
    with pytest.raises(TypeError):
        programs.run(job(3))


def test_what_others_compile_is_told():
    programs = DeclaredPrograms()
    programs.compile([job(7)], show_progress=False)
    with programs.compiled_beside() as names:
        programs.run(job(7))
        assert names == []
        jax.jit(lambda x: x - 1.2345)(np.float32(1))
    assert len(names) == 1
    jax.jit(lambda x: x - 2.3456)(np.float32(1))
    assert len(names) == 1


def test_programs_are_compiled_in_haste():
    assert fast_options()["xla_backend_optimization_level"] == 0


def test_special_tokens_have_the_ids_that_configs_say():
    tokens = special_tokens("<image>", "<video>")
    tokenizer = byte_tokenizer(list(tokens))
    assert tokenizer("a<video>b<image>")["input_ids"][1::2] == [tokens["<video>"], tokens["<image>"]]
