"""Programs that one start compiles and saves are read by the next, which compiles none; others are told apart."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from jax.sharding import Mesh

from aphrodite_jax import LLM
from aphrodite_jax.config import EngineConfig, ModelConfig, shipped_model_path
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.executor import programs as programs_module
from aphrodite_jax.executor.batch import Rows
from aphrodite_jax.executor.model_runner import ModelRunner
from aphrodite_jax.modeling.models.mistral import MistralForCausalLM
from aphrodite_jax.sampling_params import SamplingParams
from kernels_pallas.intervals import causal

pytestmark = pytest.mark.once

CONFIG = transformers.MistralConfig(
    architectures=["MistralForCausalLM"], vocab_size=96, hidden_size=32, intermediate_size=64,
    num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
ROWS = Rows(
    token_ids=np.arange(5, dtype=np.int32),
    start=0,
    prompt_length=5,
    intervals={"full": causal(5)},
    pages=np.arange(1, dtype=np.int32),
    slot=0,
)


@pytest.fixture
def files(tmp_path):
    CONFIG.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def start(files, directory, mesh=None, **config):
    model = MistralForCausalLM(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))
    options = EngineConfig(max_num_seqs=1, programs_dir=directory, on_recompile="raise")
    model_config = ModelConfig(model=files, hf_overrides=config)
    return ModelRunner(model, model_config, options, media_budget=0, max_num_batched_tokens=16, mesh=mesh)


def answer(runner):
    logits, _, _ = runner.forward([], [ROWS])
    tokens, _ = runner.sample(logits, np.zeros(1, np.int32), None)
    return np.asarray(logits), np.asarray(tokens), np.asarray(runner.decode([0], [5], [0], [ROWS.pages], 3))[:3]


@pytest.fixture
def nothing_compiles(monkeypatch):
    def refuse(job, lowered, options):
        raise AssertionError(f"{job.name} for {job.key} is compiled")

    return lambda: monkeypatch.setattr(programs_module, "_compile", refuse)


def test_a_second_start_compiles_nothing_and_answers_alike(files, tmp_path, nothing_compiles):
    first = start(files, tmp_path / "programs")
    first.warm_up(show_progress=False)
    expected = answer(first)
    nothing_compiles()
    again = start(files, tmp_path / "programs")
    again.warm_up(show_progress=False)
    jax.tree.map(np.testing.assert_array_equal, answer(again), expected)

    def sizes(runner):
        return [dataclasses.replace(x, call=len, seconds=0) for x in runner.programs.table()]

    assert sizes(again) == sizes(first)


def test_programs_of_a_mesh_of_one_device_serve_that_device(files, tmp_path, nothing_compiles):
    """A plan is always for a mesh."""
    device = Mesh(np.array(jax.devices()[:1]), ("model",))
    expected = answer(start(files, tmp_path / "programs", device))
    nothing_compiles()
    jax.tree.map(np.testing.assert_array_equal, answer(start(files, tmp_path / "programs")), expected)


def test_a_start_of_the_engine_reads_what_another_left(tmp_path, nothing_compiles):
    options = dict(
        max_num_seqs=1, max_num_batched_tokens=16, max_model_len=64, programs_dir=tmp_path, compilation_cache_dir=None,
        show_progress=False, warm_up=False,
    )  # fmt: skip

    def answer():
        llm = LLM(shipped_model_path(), **options)
        return llm.generate("Is it red?", SamplingParams(max_tokens=3), use_tqdm=False)[0].outputs[0].token_ids

    expected = answer()
    nothing_compiles()
    assert answer() == expected


def test_programs_of_another_model_are_left_alone_and_the_difference_is_told(files, tmp_path):
    answer(start(files, tmp_path / "programs"))
    before = {path: path.read_bytes() for path in (tmp_path / "programs").rglob("*.bin")}
    with pytest.warns(RuntimeWarning, match=r"none of the programs in .* fits: model .*Mistral.* there, .* here"):
        other = start(files, tmp_path / "programs", rms_norm_eps=1e-3)
    answer(other)
    assert before == {path: path.read_bytes() for path in before}
    assert len(list((tmp_path / "programs").rglob("*.bin"))) == 2 * len(before) > 0


def test_programs_of_another_version_are_told(files, tmp_path, monkeypatch):
    answer(start(files, tmp_path / "programs"))
    [manifest] = (tmp_path / "programs").glob("*/made_for.json")
    assert json.loads(manifest.read_text())["jax"] == jax.__version__
    monkeypatch.setattr(jax, "__version__", "9.9.9")
    with pytest.warns(RuntimeWarning, match=r"jax \S+ there, 9.9.9 here"):
        start(files, tmp_path / "programs")


def test_a_file_that_was_cut_short_is_compiled_again(files, tmp_path):
    expected = answer(start(files, tmp_path / "programs"))
    broken = sorted((tmp_path / "programs").rglob("*.bin"))
    contents = [path.read_bytes() for path in broken]
    for path, content in zip(broken, contents, strict=True):
        path.write_bytes(content[:100])
    with pytest.warns(RuntimeWarning, match="can't be read .* it is compiled again") as warned:
        found = answer(start(files, tmp_path / "programs"))
    assert len(warned) == 1
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(len(path.read_bytes()) > 100 for path in broken)


def test_a_directory_that_is_a_file_is_refused(files, tmp_path):
    (tmp_path / "programs").write_text("")
    with pytest.raises(ConfigError, match=r"compiled programs can't be kept in .* set programs_dir"):
        start(files, tmp_path / "programs")
