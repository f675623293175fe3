"""A plan from a config alone: what the compiler says, what follows, and what is refused."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from aphrodite_jax import planning
from aphrodite_jax.cli import main
from aphrodite_jax.config import EngineConfig, ModelConfig
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.executor.model_programs import ModelPrograms
from aphrodite_jax.executor.programs import Programs
from aphrodite_jax.modeling.loader.load import abstract_model
from aphrodite_jax.modeling.models.llama import LlamaForCausalLM
from aphrodite_jax.planning import Workload, as_json, as_text, find_target, make_plan, with_processor
from aphrodite_jax.planning import plan as plan_module
from aphrodite_jax.planning.advice import Needs, remedies
from aphrodite_jax.planning.floors import all_gather_bytes, all_reduce_bytes, all_to_all_bytes, floor_of
from aphrodite_jax.planning.shapes import weight_bytes
from aphrodite_jax.planning.workload import usual_image

pytestmark = pytest.mark.once
pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'aphrodite-jax[compile]'")

PUBLISHED = Path(__file__).parents[1] / "published"
FEW_LAYERS = {"text_config": {"num_hidden_layers": 1}, "vision_config": {"num_hidden_layers": 2}}
WORK = Workload(requests=4, prompt_tokens=64, output_tokens=128)
SIDE, IMAGE = 112, 64  # pixels, tokens: kernels for larger images take the compiler half a minute
SMALL_IMAGES = {
    "hf_overrides": {**FEW_LAYERS, "vision_config": {**FEW_LAYERS["vision_config"], "image_size": SIDE}},
    "mm_processor_kwargs": {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
}
ENGINE = EngineConfig(
    tensor_parallel_size=2, data_parallel_size=2, max_num_seqs=4, max_num_batched_tokens=256, max_encode_items=1,
    show_progress=False,
)  # fmt: skip
WIDTH, INNER, VOCABULARY = 4096, 11008, 32064
LAYER = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER
TOWER_LAYER = 4 * 1024 * 1024 + 2 * 1024 * 4096


def write_model(directory, name, processor):
    shutil.copytree(PUBLISHED / "processors" / processor, directory)
    shutil.copyfile(PUBLISHED / f"{name}.json", directory / "config.json")
    return directory


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """LLaVA-1.5-7B's files, no weights and no tokenizer."""
    return write_model(tmp_path_factory.mktemp("published") / "llava", "llava_1.5_7b", "llava_1.5")


@pytest.fixture(scope="module")
def made(llava, computed_once):
    """The plan of LLaVA-1.5-7B with a decoder layer and two of the tower, a copy on two of four chips each.

    And what the compiler says of its programs' memory, by name, bucket and bytes of arguments.
    """
    compiled = []

    class Kept(Programs):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            compiled.append(self)

    def compute():
        # flax's own norms add bfloat16 to float32
        with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
            patch.setattr(plan_module, "Programs", Kept)
            plan = make_plan(
                ModelConfig(model=llava, max_model_len=1024, **SMALL_IMAGES),
                ENGINE,
                find_target("v5e:2x2"),
                WORK,
                price_per_hour=4.8,
            )
        found = {}
        for x in (x for programs in compiled for x in programs.table()):
            memory = x.call.memory_analysis()
            found[x.name, str(x.key), memory.argument_size_in_bytes] = (
                memory.temp_size_in_bytes,
                memory.generated_code_size_in_bytes,
                memory.output_size_in_bytes,
            )
        return plan, found

    return computed_once("plan", compute)


@pytest.fixture(scope="module")
def plan(made):
    return made[0]


def test_bytes_are_those_of_memory_analysis(made):
    plan, found = made
    assert {name for name, *_ in found} == {"decode", "encode", "forward", "sample", "store"}
    assert len(found) == len(plan.programs)
    for figures in plan.programs:
        analysis = found[figures.name, figures.bucket, figures.argument_bytes]
        assert (figures.temp_bytes, figures.code_bytes, figures.output_bytes) == analysis
        assert figures.code_bytes > 0
    # What a program takes as its arguments is what the plan says lies there: half of the decoder's heads, and pages.
    [decode] = [x for x in plan.programs if x.name == "decode"]
    pages = decode.pages * 16 * plan.memory.kv_bytes_per_token
    assert pages < decode.argument_bytes < pages + plan.memory.weights
    assert abs(pages - plan.memory.kv_pages) < 0.05 * plan.memory.device  # about as many as there will be


def test_the_engine_counts_about_as_many_pages(tmp_path, monkeypatch):
    """It compiles programs for one page; so does a plan where the compiler refuses as many as it took for there."""
    transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=512, intermediate_size=1024, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=512, max_position_embeddings=1024,
    ).save_pretrained(tmp_path)  # fmt: skip

    @jax.numpy_dtype_promotion("standard")  # flax's own norms add bfloat16 to float32
    def make():
        return make_plan(
            ModelConfig(model=tmp_path, dtype="bfloat16"), ENGINE, find_target("v5e:2x2"), WORK, estimate_kernels=False
        )

    plan = make()
    monkeypatch.setattr(plan_module._Planner, "_assumed_pages", lambda self: 100_000_000)
    found = make()
    assert {x.pages for x in found.programs} == {1} != {x.pages for x in plan.programs}
    programs = plan.memory.code + plan.memory.temporary  # which hang on the number of pages next to not at all
    assert abs(found.memory.kv_pages - plan.memory.kv_pages) < 0.02 * programs < 0.001 * plan.memory.device


def test_the_memory_adds_up_to_what_may_be_used(plan):
    memory = plan.memory
    used = memory.weights + memory.encoder_cache + memory.code + memory.temporary + memory.kv_pages
    page = memory.kv_bytes_per_token * 16
    assert memory.usable == int(0.9 * memory.device)
    assert 0 <= memory.usable - used < page
    assert memory.kv_bytes_per_token == (32 / 2) * 128 * 2 * 2  # heads, width, key and value, bytes
    assert memory.kv_tokens == memory.kv_pages / memory.kv_bytes_per_token
    assert memory.full_requests == memory.kv_tokens // 1024 > 0


def test_weights_are_those_of_the_model_divided(plan):
    divided = 2 * (LAYER + 2 * VOCABULARY * WIDTH) / 2
    tower = 2 * 2 * TOWER_LAYER  # whole on each device, as its items are divided
    assert divided + tower < plan.memory.weights < 1.1 * (divided + tower)


def test_decode_reads_each_weight_and_key_once(plan):
    """By the compiler's own count, with requests that fill their block tables."""
    estimates = plan.estimates
    embedding = VOCABULARY * WIDTH * 2 / 2  # of which a row is read for each request
    needed = estimates.decode_weights_read - embedding + estimates.decode_kv_read_counted
    assert needed < estimates.decode_bytes_counted <= 1.15 * needed
    assert estimates.decode_kv_read_counted > 4 * 1024 * plan.memory.kv_bytes_per_token  # and queries


def test_floors_follow_from_bytes_and_operations(plan):
    target, decode, prefill = find_target("v5e:2x2"), plan.estimates.decode, plan.estimates.prefill
    assert (plan.estimates.decode_rows, plan.estimates.decode_keys) == (4, 64 + IMAGE + 64)
    assert decode.seconds == max(decode.memory_seconds, decode.flops_seconds) + decode.exchange_seconds
    assert decode.memory_seconds == decode.bytes / 819e9 > decode.flops_seconds
    assert prefill.flops_seconds == prefill.flops / target.flops
    rows = 256 + 4  # of prompts, and of decode beside them
    products = 2 * (LAYER * rows + WIDTH * VOCABULARY * 4) / 2  # on each of two devices
    assert products < prefill.flops < 1.1 * products
    sums = 3 * all_reduce_bytes(4 * WIDTH * 2, 2)  # two a layer, one behind the embedding
    logits = all_gather_bytes(4 * VOCABULARY * 4, 2)
    assert decode.sent == sums + logits
    assert plan.estimates.encode.sent == all_to_all_bytes(2 * IMAGE * WIDTH * 2, 2)  # of two images
    media = all_gather_bytes(rows * WIDTH * 2, 2)  # rows of the encoder cache, which is divided by columns
    assert prefill.sent == sums * rows / 4 + logits + media
    assert plan.estimates.encode.flops > 2 * IMAGE * TOWER_LAYER  # the last layer's output is not wanted


def test_the_compiler_estimates_the_attention_kernels(plan):
    decode, prefill = plan.estimates.kernels
    assert (decode.name, prefill.name) == ("paged_attention_decode", "paged_attention_prefill")
    for kernel in plan.estimates.kernels:
        assert kernel.error is None
        assert kernel.seconds == kernel.cycles / 1.5e9 > 0
        assert kernel.memory_seconds > 0


def test_throughput_and_cost_follow_from_the_floors(plan):
    found, estimates = plan.throughput, plan.estimates
    assert found.encode_seconds == 2 * estimates.encode.seconds  # of four images, two at a time
    assert found.prefill_seconds == pytest.approx(4 * (64 + IMAGE) / 256 * estimates.prefill.seconds)
    assert found.decode_seconds == 128 * estimates.decode.seconds
    round_seconds = found.encode_seconds + found.prefill_seconds + found.decode_seconds
    assert found.images_per_second == pytest.approx(2 * 4 / round_seconds)  # two copies
    assert found.output_tokens_per_second == pytest.approx(128 * found.images_per_second)
    assert found.cost_per_million_images == pytest.approx(1e6 / found.images_per_second / 3600 * 4.8)


def test_it_is_told_in_words_and_as_json(plan):
    text = as_text(plan)
    for word in ("fits", "KV pages", "ESTIMATES", "images a second", "tokens a second", "4.80 an hour", "decode"):
        assert word in text
    found = json.loads(json.dumps(as_json(plan)))
    assert found["memory"]["weights"] == plan.memory.weights
    assert found["estimates"]["decode"]["seconds"] == plan.estimates.decode.seconds
    assert [x["name"] for x in found["programs"]] == [x.name for x in plan.programs]


def run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["plan", *map(str, arguments)])
    return status, out.getvalue(), err.getvalue()


def test_the_command_passes_its_options_on(plan, llava, monkeypatch):
    asked = []

    def make_plan(*args, **options):
        asked.append((*args, options))
        return plan

    monkeypatch.setattr(planning, "make_plan", make_plan)
    status, out, _ = run(
        "--model", llava, "--topology", "v5e:2x4", "--tensor-parallel-size", 4, "--max-num-seqs", 8,
        "--requests", 3, "--images-per-prompt", 2, "--image-size", "64x32", "--price-per-hour", 2, "--dtype", "float32",
        "--no-kernel-estimate", "--max-model-len", 512, "--page-size", 32, "--export", "programs", "--json",
    )  # fmt: skip
    assert status == 0
    assert json.loads(out)["topology"] == "v5e:2x2"
    [(model, engine, target, work, options)] = asked
    assert (model.model, model.dtype, model.max_model_len, model.limit_for("image")) == (str(llava), "float32", 512, 2)
    assert (engine.tensor_parallel_size, engine.data_parallel_size) == (4, 2)
    assert (engine.max_num_seqs, engine.page_size, engine.programs_dir) == (8, 32, "programs")
    assert (target.name, len(target.devices)) == ("v5e:2x4", 8)
    assert work == Workload(requests=3, images_per_prompt=2, image_size=(64, 32))
    assert options == {"estimate_kernels": False, "price_per_hour": 2.0, "export": True}
    _, out, _ = run("--model", llava, "--topology", "v5e:2x4", "--data-parallel-size", 8)
    assert asked[1][1].tensor_parallel_size == 1
    assert "images a second" in out


# What does not fit.


def test_a_model_too_large_is_told_what_would_hold_it(tmp_path):
    model = write_model(tmp_path / "model", "llava_next_34b", "llava_next")
    status, out, _ = run("--model", model, "--topology", "v5e:2x2", "--max-num-seqs", 4, "--json")
    found = json.loads(out)
    assert status == 1
    assert not found["fits"]
    assert "weights and encoder cache take" in found["reason"]
    assert any(x.startswith("--topology v5e:2x4 --tensor-parallel-size 8: ") for x in found["remedies"])
    assert found["estimates"] is None


def small(llava, monkeypatch, **options):
    """A plan of two layers that compiles nothing."""
    monkeypatch.setattr(ModelPrograms, "representatives", lambda self, arrays: [])
    config = ModelConfig(model=llava, hf_overrides=FEW_LAYERS)
    return make_plan(config, EngineConfig(show_progress=False, **options), find_target("v5e:1x1"))


def test_pages_that_find_no_room_are_told(llava, monkeypatch):
    found = small(llava, monkeypatch, memory_fraction=0.0645)  # of which weights leave a little
    assert not found.fits
    assert "one request of max_model_len 4096 needs" in found.reason
    assert 0 < found.memory.weights < found.memory.usable
    assert any(x.startswith("--max-model-len 2048: ") for x in found.remedies)
    assert "DOES NOT FIT: weights, encoder cache and programs take" in as_text(found)


def test_what_the_compiler_refuses_is_told(llava, monkeypatch):
    def refuse(self, jobs, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM, 20.00G exceeds 15.75G.")

    monkeypatch.setattr(Programs, "compile", refuse)
    found = small(llava, monkeypatch)
    assert not found.fits
    assert found.reason == (
        "the compiler refuses a program: RESOURCE_EXHAUSTED: Ran out of memory on HBM, 20.00G exceeds 15.75G."
    )
    assert found.remedies[-1].startswith("programs are not counted")


@pytest.fixture
def small_needs(tmp_path):
    """Of a small text model."""
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=1024, intermediate_size=4096, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=2**16, vocab_size=1024,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    return dict(
        model=abstract_model(LlamaForCausalLM, config, jnp.float32), model_config=ModelConfig(model=tmp_path),
        encoder_parallel="items", devices=1, context_length=2**16, page_size=16, kv_shapes=((2, 128),) * 2,
        platform="tpu", itemsize=4, encoder_cache=(0, 1024), programs=2**20,
    )  # fmt: skip


def test_remedies_are_the_least_changes_that_fit(small_needs):
    model = small_needs["model"]
    weights = 4 * sum(np.prod(x.shape) for x in nnx.to_flat_state(nnx.state(model)).leaves)
    assert weight_bytes(model, 1, "items") == weights
    kv = 2**16 * 2 * 2 * 128 * 2 * 4
    target = find_target("v5e:2x2")
    found = remedies(Needs(**small_needs, limit=weights + kv // 2 + 2**21), target, "float32")
    assert [x.partition(":")[0] for x in found[:1]] == ["--tensor-parallel-size 2"]
    assert any(x.startswith("--max-model-len 32768: ") for x in found)
    assert any(x.startswith("--dtype bfloat16: ") for x in found)
    assert remedies(Needs(**small_needs, limit=2**10), target, "float32")[0].startswith("nothing of this kind")


def test_an_encoder_cache_that_the_devices_do_not_divide_lies_whole(small_needs):
    def cache(width, devices):
        with_cache, without = (Needs(**small_needs | {"encoder_cache": (rows, width)}, limit=0) for rows in (100, 0))
        sizes = dict(devices=devices, context_length=16, itemsize=4)
        return with_cache.bytes(**sizes) - without.bytes(**sizes)

    assert cache(30, 2) == 100 * 15 * 4
    assert cache(30, 4) == 100 * 30 * 4


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "no topology 'v9:2x2'"),
        ("v5e:2x2x2", "has 2 dimensions"),
        ("v5e:3x3", "no topology 'v5e:3x3'.*slices are 1x1, 2x2"),
        ("v5p:2x2", "has 3 dimensions"),
        ("v5e:0x4", "has 2 dimensions"),
        ("h900", "or a GPU, a100, l4, h100"),
    ],
)
def test_a_topology_that_is_not_there_is_refused(topology, message):
    with pytest.raises(ConfigError, match=message):
        find_target(topology)


def test_devices_that_do_not_divide_the_heads_are_refused(tmp_path):
    model = write_model(tmp_path / "model", "llava_next_34b", "llava_next")
    status, _, err = run("--model", model, "--topology", "v5e:4x4")
    assert status == 1
    assert "tensor_parallel_size 16 does not divide the model's 56 attention heads" in err
    status, _, err = run("--model", model, "--topology", "v5e:2x2", "--tensor-parallel-size", 3)
    assert "tensor_parallel_size 3 x data_parallel_size 1 is not the 4 devices of v5e:2x2" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(requests=0), "requests must be at least 1"),
        (dict(output_tokens=0), "output_tokens must be at least 1"),
        (dict(images_per_prompt=-1), "images_per_prompt must be at least 0"),
        (dict(image_size=(0, 5)), "image_size must be at least 1x1"),
        (dict(images_per_prompt=2), "above limit_mm_per_prompt"),
        (dict(requests=17), "above max_num_seqs 16"),
        (dict(prompt_tokens=5000), "above max_model_len 4096"),
    ],
)
def test_work_that_can_t_be_is_refused(llava, options, message):
    target = find_target("v5e:1x1")
    with pytest.raises(ConfigError, match=message):
        make_plan(ModelConfig(model=llava, hf_overrides=FEW_LAYERS), EngineConfig(), target, Workload(**options))


@pytest.mark.parametrize("alone", [True, False])
def test_a_missing_processor_is_named(tmp_path, alone):
    shutil.copyfile(PUBLISHED / "llava_next_34b.json", tmp_path / "config.json")
    status, _, err = run("--model", tmp_path / "config.json" if alone else tmp_path, "--topology", "v5e:2x4")
    assert status == 1
    assert "image processor" in err


@pytest.mark.parametrize(("name", "tokens"), [("llava_1.5_7b", 576), ("gemma3_27b", 258)])
def test_a_config_alone_is_enough_where_it_tells_the_size_of_images(tmp_path, name, tokens):
    shutil.copyfile(PUBLISHED / f"{name}.json", tmp_path / "config.json")
    (tmp_path / "made").mkdir()
    model = with_processor(str(tmp_path / "config.json"), tmp_path / "made")
    assert usual_image(ModelConfig(model=model), (1024, 768)).tokens == tokens
    assert with_processor("org/name", tmp_path) == "org/name"


def test_floors_add_the_exchange_to_the_longer_of_the_others():
    target = find_target("v5e:2x4")
    assert target.egress == 2 * 50e9  # a corner has one neighbour in each dimension
    assert find_target("v5e:1x1").egress is None
    floor = floor_of(target, bytes=819e9, flops=0, sent=100e9)
    assert floor.seconds == 2.0
    assert (all_reduce_bytes(100, 4), all_gather_bytes(100, 4), all_to_all_bytes(100, 4)) == (150, 75, 18.75)
