"""What a user touches, on a tiny model whose every program is compiled ahead: a late compile is an error here."""

import dataclasses
import itertools
import subprocess
import sys

import hypothesis
import jax
import numpy as np
import pytest
from golden_files import read_golden
from hypothesis import strategies as st
from PIL import Image

from aphrodite_jax import LLM, ModelConfig, SamplingParams
from aphrodite_jax.errors import (
    ConfigError,
    MediaError,
    PlaceholderError,
    PromptTooLongError,
    RequestError,
    TooManyItemsError,
)
from aphrodite_jax.executor import memory
from aphrodite_jax.executor.model_runner import ModelRunner
from aphrodite_jax.executor.programs import Programs
from aphrodite_jax.modeling.loader import load_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, seed=7, max_tokens=12, ignore_eos=True)
ONE_BY_ONE = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=("never said",))
"""The same tokens; since a text could end it, they come one at a time."""
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} "
    "{% for part in message['content'] if part['type'] == 'image' %}<image> {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}w9"
)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8))


def text_prompt(seed: int, length: int) -> dict:
    return {"prompt_token_ids": np.random.default_rng(seed).integers(3, 150, length).tolist()}


def image_prompt(*seeds: int) -> dict:
    text = " ".join(f"w{10 + seed} <image>" for seed in seeds) + " w20"
    return {"prompt": text, "multi_modal_data": {"image": [picture(seed) for seed in seeds]}}


MIXED = [
    text_prompt(1, 3), image_prompt(1), text_prompt(2, 30), image_prompt(2, 3), {"prompt": "w5 w6"}, image_prompt(1)
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = read_golden("llava_clip_llama").write_checkpoint(tmp_path_factory.mktemp("llm") / "llava")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def make_llm(directory, **options):
    defaults = {
        "model": directory,
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "page_size": 8,
        "limit_mm_per_prompt": {"image": 2},
        "show_progress": False,
    }
    return LLM(**defaults | options)


@pytest.fixture(scope="module")
def llm(directory):
    return make_llm(directory, on_recompile="raise")


def generate(llm, prompts, params=GREEDY):
    return llm.generate(prompts, params, on_error="raise", use_tqdm=False)


def tokens(outputs):
    return [answer.token_ids for output in outputs for answer in output.outputs]


def is_idle(llm):
    engine = llm.engine
    free = engine.scheduler.blocks.num_free_pages == engine.runner.num_pages
    return free and not engine.has_unfinished_requests() and not engine.scheduler.running


# Batches.


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.once
def test_batched_is_single(llm, params):
    """Whatever else is in the batch, a request has its own answer, in its own place."""
    batched = generate(llm, MIXED, params)
    single = [generate(llm, prompt, params)[0] for prompt in MIXED]
    assert tokens(batched) == tokens(single)
    assert len(set(tokens(batched))) > 2
    assert is_idle(llm)


def test_different_options_in_one_batch(llm):
    prompt = image_prompt(1)
    options = [
        SamplingParams(temperature=0.0, max_tokens=3),
        SamplingParams(temperature=1.5, top_k=5, seed=1, max_tokens=8),
        SamplingParams(temperature=1.0, top_p=0.5, min_p=0.1, seed=2, max_tokens=5, logprobs=2),
        SamplingParams(temperature=0.0, repetition_penalty=1.8, presence_penalty=1.0, max_tokens=9, prompt_logprobs=1),
        SamplingParams(temperature=0.0, logit_bias={77: 100.0}, max_tokens=2),
    ]
    outputs = llm.generate([prompt] * len(options), options, on_error="raise", use_tqdm=False)
    assert tokens(outputs) == tokens(generate(llm, prompt, params)[0] for params in options)
    assert outputs[4].outputs[0].token_ids == (77, 77)
    assert outputs[2].outputs[0].logprobs is not None
    assert outputs[0].outputs[0].logprobs is None
    assert outputs[3].prompt_logprobs[0] is None
    assert len(outputs[3].prompt_logprobs) == len(outputs[3].prompt_token_ids)


def test_nothing_compiles_after_warm_up(llm):
    """Not the engine's programs alone: no operation of a step may reach the compiler."""
    compiled = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x + len(compiled))(np.zeros(17, np.float32))
    assert compiled, "the event that this test listens to has another name now"
    compiled.clear()
    options = [GREEDY, SAMPLED, SamplingParams(repetition_penalty=1.5, logprobs=3, prompt_logprobs=2, seed=1)]
    for params in options:
        generate(llm, [*MIXED, text_prompt(9, 50)], params)
    width = llm.model_config.hf_text_config.hidden_size
    generate(llm, {"prompt": "<image>", "multi_modal_data": {"image": np.ones((4, width), np.float32)}})
    assert compiled == []


@pytest.mark.once
def test_pages_that_run_out(directory, llm):
    """With pages for one long request and a half, sequences are preempted and their answers stay the same."""
    prompts = [text_prompt(seed, 20) for seed in range(4)]
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)
    page = llm.engine.runner.memory_budget().kv_pages // llm.engine.runner.num_pages
    small = make_llm(directory, warm_up=False, kv_cache_memory=12 * page)
    assert tokens(generate(small, prompts, params)) == tokens(generate(llm, prompts, params))
    assert small.engine.scheduler.num_preemptions > 0
    assert llm.engine.scheduler.num_preemptions == 0
    assert is_idle(small)


def test_equal_images_are_encoded_once(llm, monkeypatch):
    encoded = []
    encode = llm.engine.runner.encode
    monkeypatch.setattr(llm.engine.runner, "encode", lambda items, rows: encoded.extend(items) or encode(items, rows))
    llm.engine.reset_caches()
    generate(llm, [image_prompt(5), image_prompt(6, 5), image_prompt(5)])
    assert len(encoded) == 2
    generate(llm, image_prompt(6))
    assert len(encoded) == 2


@pytest.mark.once
def test_embeddings_in_place_of_an_image(directory, llm):
    """The rows that the model makes of an image, given by the user, lead to the same answer."""
    config = ModelConfig(model=directory, dtype="float32")
    model = load_model(config)
    from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY

    pixels = MULTIMODAL_REGISTRY.map_input(config, {"image": picture(1)})["pixel_values"]
    rows = np.asarray(model.embed_multimodal(pixel_values=jax.numpy.asarray(pixels))["image"][0])
    prompt = image_prompt(1)
    given = {"prompt": prompt["prompt"], "multi_modal_data": {"image": rows}}
    assert tokens(generate(llm, given)) == tokens(generate(llm, prompt))
    with pytest.raises(MediaError, match=r"rows, \d+"):
        generate(llm, {"prompt": "<image>", "multi_modal_data": {"image": rows[:, :-1]}})


# One answer.


def test_answers_per_prompt(llm):
    three = generate(llm, image_prompt(1), SamplingParams(n=3, seed=7, max_tokens=12, ignore_eos=True))[0]
    assert [answer.index for answer in three.outputs] == [0, 1, 2]
    assert len({answer.token_ids for answer in three.outputs}) == 3
    assert three.outputs[0].token_ids == generate(llm, image_prompt(1), SAMPLED)[0].outputs[0].token_ids


def test_where_an_answer_ends(llm):
    whole = generate(llm, image_prompt(2))[0].outputs[0]
    assert (whole.finish_reason, len(whole.token_ids)) == ("length", 12)
    words = whole.text.split()
    third = next(i for i in range(2, 12) if whole.token_ids[i] not in whole.token_ids[:i])
    by_text = SamplingParams(temperature=0.0, max_tokens=12, stop=words[third])
    stopped = generate(llm, image_prompt(2), by_text)[0].outputs[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", words[third])
    assert stopped.text.split() == words[:third]
    token = whole.token_ids[third]
    by_id = generate(llm, image_prompt(2), SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=[token]))
    assert by_id[0].outputs[0].stop_reason == token
    assert by_id[0].outputs[0].token_ids == whole.token_ids[: third + 1]
    later = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=[token], min_tokens=third + 2)
    assert token not in generate(llm, image_prompt(2), later)[0].outputs[0].token_ids[: third + 2]


def test_the_end_token_ends_and_can_be_ignored(llm):
    to_end = {"logit_bias": {2: 100.0}, "temperature": 0.0, "max_tokens": 4}
    ended = generate(llm, {"prompt": "w5"}, SamplingParams(**to_end))[0].outputs[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ((2,), "stop", None)
    on = generate(llm, {"prompt": "w5"}, SamplingParams(**to_end, ignore_eos=True))[0].outputs[0]
    assert (on.token_ids, on.finish_reason) == ((2,) * 4, "length")


def test_an_answer_ends_at_the_models_limit(llm):
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    answer = generate(llm, text_prompt(1, 60), params)[0].outputs[0]
    assert (len(answer.token_ids), answer.finish_reason) == (4, "length")


def test_logprobs_of_a_greedy_answer(llm):
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3)
    answer = generate(llm, image_prompt(1), params)[0].outputs[0]
    for token, found in zip(answer.token_ids, answer.logprobs, strict=True):
        assert len(found) == 3
        assert found[token].rank == 1
        assert found[token].logprob == max(entry.logprob for entry in found.values()) < 0
        assert found[token].decoded_token == llm.tokenizer.decode([token])
    expected = sum(found[token].logprob for token, found in zip(answer.token_ids, answer.logprobs, strict=True))
    assert answer.cumulative_logprob == pytest.approx(expected)


# Streaming.


def test_a_stream_grows_to_the_answer(llm):
    pieces = list(llm.stream(image_prompt(1), ONE_BY_ONE))
    texts = [piece.outputs[0].text for piece in pieces]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert [piece.finished for piece in pieces] == [False] * 11 + [True]
    assert tokens(pieces[-1:]) == tokens(generate(llm, image_prompt(1)))


def test_a_stream_comes_token_by_token_and_a_list_several_at_a_time(llm):
    counts = [len(piece.outputs[0].token_ids) for piece in llm.stream(image_prompt(1), GREEDY)]
    assert counts == list(range(1, 13))
    for params, steps in ((GREEDY, 3), (ONE_BY_ONE, 12)):  # the prompt, and then 8 and 3 tokens, or one each
        before = llm.stats()["steps"]
        generate(llm, image_prompt(1), params)
        assert llm.stats()["steps"] - before == steps
    with pytest.raises(ValueError, match="from 1 to 8, got 9"):
        llm.engine.step(9)


def test_a_stream_that_is_left_frees_its_pages(llm):
    stream = llm.stream(image_prompt(1), GREEDY)
    next(stream)
    assert not is_idle(llm)
    stream.close()
    assert is_idle(llm)


@pytest.fixture
def few_steps(llm, monkeypatch):
    """An engine that fails where it would be run for good."""
    step, left = llm.engine.step, iter(range(40))

    def few(*args):
        assert next(left, None) is not None, "nothing ends this"
        return step(*args)

    monkeypatch.setattr(llm.engine, "step", few)


@pytest.mark.once
@pytest.mark.usefixtures("few_steps")
def test_a_stream_ends_when_its_request_is_aborted(llm):
    other = llm.stream(image_prompt(2), GREEDY)
    next(other)
    outputs = []
    for output in llm.stream(image_prompt(1), GREEDY):
        outputs.append(output)
        llm.engine.abort_request(output.request_id)
    assert [output.finished for output in outputs] == [False]
    assert not is_idle(llm)  # the other one was not run to its end meanwhile
    assert len(list(other)[-1].outputs[0].token_ids) == 12
    assert is_idle(llm)


@pytest.mark.once
@pytest.mark.usefixtures("few_steps")
def test_a_stream_ends_when_another_took_its_last_output(llm):
    stream = llm.stream(image_prompt(1), GREEDY)
    assert not next(stream).finished
    while llm.engine.has_unfinished_requests():
        taken = llm.engine.step()
    assert taken[-1].finished
    assert list(stream) == []


@pytest.mark.once
def test_without_options_all_are_greedy(llm):
    [listed] = llm.generate(image_prompt(1), on_error="raise", use_tqdm=False)
    *_, streamed = llm.stream(image_prompt(1))
    assert (
        tokens([streamed])
        == tokens([listed])
        == tokens(generate(llm, image_prompt(1), SamplingParams(temperature=0.0)))
    )


def test_generate_within_a_stream(llm):
    stream = llm.stream(image_prompt(1), GREEDY)
    next(stream)
    inner = generate(llm, [image_prompt(2), {"prompt": "w5"}], SAMPLED)
    assert tokens(list(stream)[-1:]) == tokens(generate(llm, image_prompt(1)))
    assert tokens(inner) == tokens(generate(llm, [image_prompt(2), {"prompt": "w5"}], SAMPLED))


@pytest.mark.once
def test_an_aborted_request_gives_what_it_has(llm):
    llm.engine.add_request("mine", image_prompt(1), ONE_BY_ONE)
    with pytest.raises(RequestError, match="in use"):
        llm.engine.add_request("mine", image_prompt(1), ONE_BY_ONE)
    for _ in range(4):  # the first three tokens are back
        llm.engine.step()
    output = llm.engine.abort_request("mine")
    assert output.finished
    assert output.outputs[0].finish_reason == "abort"
    assert output.outputs[0].token_ids == generate(llm, image_prompt(1))[0].outputs[0].token_ids[:3]
    assert llm.engine.abort_request("mine") is None
    assert is_idle(llm)


# Chat.


def test_chat_ties_images_to_their_places(llm):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "w30 w31"}]},
        {"role": "assistant", "content": "w32"},
        {"role": "user", "content": [{"type": "text", "text": "w33"}, {"type": "image", "image": picture(2)}]},
    ]
    [chat] = llm.chat(messages, GREEDY, on_error="raise", use_tqdm=False)
    text = "user <image> w30 w31 assistant w32 user <image> w33 w9"
    prompt = {"prompt": text, "multi_modal_data": {"image": [picture(1), picture(2)]}}
    assert chat.prompt == text
    assert tokens([chat]) == tokens(generate(llm, prompt))
    swapped = prompt | {"multi_modal_data": {"image": [picture(2), picture(1)]}}
    assert tokens([chat]) != tokens(generate(llm, swapped))


def test_chat_refuses_one_conversation_and_answers_the_other(llm):
    good = [{"role": "user", "content": "w5 w6"}]
    bad = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///no/such.png"}}]}]
    refused, answered = llm.chat([bad, good], GREEDY, use_tqdm=False)
    assert isinstance(refused.error, MediaError)
    assert answered.error is None
    malformed, answered = llm.chat([[{"role": "user"}], good], GREEDY, use_tqdm=False)
    assert isinstance(malformed.error, RequestError)
    assert len(answered.outputs[0].token_ids) == 12


# Bad input.

BAD = {
    "too long": (text_prompt(1, 64), PromptTooLongError, "at most 63"),
    "too many images": (image_prompt(1, 2, 3), TooManyItemsError, "limit_mm_per_prompt"),
    "image without placeholder": (image_prompt(1) | {"prompt": "w5"}, PlaceholderError, "0 placeholders"),
    "placeholder without image": ({"prompt": "<image> w5"}, PlaceholderError, "1 placeholders"),
    "unknown modality": ({"prompt": "w5", "multi_modal_data": {"smell": 1}}, RequestError, "unknown modality"),
    "modality not taken": ({"prompt": "w5", "multi_modal_data": {"audio": (np.zeros(9), 8)}}, RequestError, "audio"),
    "broken image": ({"prompt": "<image>", "multi_modal_data": {"image": b"no image"}}, MediaError, "no image file"),
    "unknown key": ({"prompt": "w5", "images": []}, RequestError, "unknown prompt key 'images'"),
    "no prompt": ({"multi_modal_data": {}}, RequestError, "needs 'prompt'"),
    "no dict": (5, RequestError, "a string or a dict"),
    "empty": ({"prompt_token_ids": []}, RequestError, "no tokens"),
    "ids that are not in the vocabulary": ({"prompt_token_ids": [5, 10_000]}, RequestError, "vocabulary"),
    "ids that are no numbers": ({"prompt_token_ids": ["w5"]}, RequestError, "prompt_token_ids"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_has_its_error_in_its_place(llm, name):
    bad, kind, message = BAD[name]
    good = image_prompt(1)
    before, refused, after = llm.generate([good, bad, good], GREEDY, use_tqdm=False)
    assert isinstance(refused.error, kind)
    assert message in str(refused.error)
    assert refused.finished
    assert refused.outputs == ()
    assert tokens([before, after]) == tokens(generate(llm, [good, good]))
    with pytest.raises(kind):
        llm.generate([good, bad, good], GREEDY, on_error="raise", use_tqdm=False)
    assert is_idle(llm)


def test_options_of_a_request_that_the_model_has_not(llm):
    [output] = llm.generate("w5", SamplingParams(stop_token_ids=[10_000]), use_tqdm=False)
    assert isinstance(output.error, RequestError)
    with pytest.raises(ConfigError, match="2 prompts came with 1"):
        llm.generate(["w5", "w6"], [GREEDY], use_tqdm=False)
    with pytest.raises(ConfigError, match="on_error"):
        llm.generate("w5", on_error="ignore", use_tqdm=False)


def test_an_image_for_a_text_model(tmp_path):
    llm = make_llm(read_golden("llama").write_checkpoint(tmp_path), limit_mm_per_prompt={}, warm_up=False)
    refused, answered = llm.generate([image_prompt(1), "w5"], GREEDY, use_tqdm=False)
    assert "takes text alone" in str(refused.error)
    assert len(answered.outputs[0].token_ids) == 12


def test_models_and_options_that_are_not_there(directory, tmp_path):
    with pytest.raises(ConfigError, match="unknown option 'temprature'"):
        LLM(directory, temprature=1.0)
    with pytest.raises(ConfigError, match="neither a directory"):
        LLM(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        LLM(tmp_path)
    with pytest.raises(ConfigError, match="takes image"):
        make_llm(directory, limit_mm_per_prompt={"audio": 1})


@pytest.mark.once
def test_the_start_tells_which_attention_runs_and_where_the_memory_goes(capsys, monkeypatch, directory):
    monkeypatch.setattr(ModelRunner, "warm_up", lambda self, show_progress: None)
    make_llm(directory, show_progress=True, max_encode_items=1)
    told = capsys.readouterr().err
    assert "attention: xla" in told
    assert "encoder cache" in told


@pytest.mark.once
def test_pages_leave_room_for_the_hungrier_program(directory, monkeypatch):
    """As on an accelerator, whose memory is what it is."""
    monkeypatch.setattr(memory, "device_limit", lambda device, fraction: 64 * 2**20)
    llm = make_llm(directory, warm_up=False)
    page = llm.engine.runner.memory_budget().kv_pages // llm.engine.runner.num_pages
    encode = []
    compile_jobs = Programs.compile

    def hungrier(self, jobs, **options):
        compile_jobs(self, jobs, **options)
        encode.extend(job for job in jobs if job.name == "encode")
        for key, program in self._compiled.items():
            if program.name == "encode":
                self._compiled[key] = dataclasses.replace(program, temp_bytes=program.temp_bytes + 2**24)

    monkeypatch.setattr(Programs, "compile", hungrier)
    hungry = make_llm(directory, warm_up=False)
    assert len(encode) == 1
    fewer = llm.engine.runner.num_pages - hungry.engine.runner.num_pages
    assert 0 < fewer <= 2**24 // page


@pytest.mark.once
def test_describe_names_model_and_memory(llm, directory):
    text = llm.describe()
    assert str(directory) in text
    assert all(word in text for word in ("weights", "KV pages", "encoder cache", "forward"))
    assert "attention: xla" in text
    for program in llm.engine.runner.programs.table():
        assert f"\n{program.name} " in text


@pytest.mark.once
def test_stats_count_what_was_done(directory):
    llm = make_llm(directory, warm_up=False)
    prompts = [image_prompt(1), image_prompt(1), text_prompt(1, 20)]
    lengths = [len(output.prompt_token_ids) for output in generate(llm, prompts)]
    stats = llm.stats()
    assert (stats["requests"], stats["finished"], stats["output_tokens"]) == (3, 3, 36)
    assert stats["prompt_tokens"] == sum(lengths) == stats["prompt_tokens_computed"] + stats["prompt_tokens_cached"]
    assert (stats["media_items"], stats["media_encoded"]) == (2, 1)
    assert stats["pages_in_use"] == 0
    assert stats["time_to_first_token"]["count"] == 3
    assert stats["time_between_tokens"]["count"] == 33
    assert 0 < stats["plan"] < stats["step"]
    assert stats["rows"] == stats["prompt_tokens_computed"] + 33
    generate(llm, prompts)
    again = llm.stats()
    assert again["prompt_tokens_computed"] - stats["prompt_tokens_computed"] < sum(lengths) / 2
    assert again["media_encoded"] == 1


@pytest.mark.once
def test_a_trace_has_named_steps(directory, tmp_path):
    """In a process of its own: beside PyTorch, which other tests import, JAX's profiler can end the process."""
    code = (
        "from aphrodite_jax import LLM, SamplingParams\n"
        f"llm = LLM({str(directory)!r}, max_model_len=64, warm_up=False, trace_dir={str(tmp_path)!r})\n"
        "llm.generate('w5', SamplingParams(max_tokens=3), use_tqdm=False, on_error='raise')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    [trace] = tmp_path.rglob("*.xplane.pb")
    assert b"engine step" in trace.read_bytes()


# Whatever else runs, however prompts are cut, whatever the caches hold.


@pytest.fixture(scope="module")
def variants(directory):
    """Engines that cut and share differently: small and large budgets and pages, with caches and without."""
    sizes = [dict(max_num_batched_tokens=16, page_size=4), dict(max_num_batched_tokens=64, prefix_caching=False)]
    return [make_llm(directory, warm_up=False, max_num_seqs=3, **size) for size in sizes]


@pytest.fixture(scope="module")
def alone(llm):
    """Each of a few prompts, answered alone and with empty caches."""
    prompts = [image_prompt(1), image_prompt(2), image_prompt(1, 2), text_prompt(1, 3), text_prompt(1, 37)]
    prompts.append({"prompt_token_ids": text_prompt(1, 37)["prompt_token_ids"][:30]})
    answers = []
    for prompt in prompts:
        llm.engine.reset_caches()
        answers += tokens(generate(llm, prompt, ONE_BY_ONE))
    return prompts, answers


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12), st.booleans()), min_size=1, max_size=7),
    st.integers(0, 2),
    st.booleans(),
)
@hypothesis.settings(deadline=None, max_examples=25)
@pytest.mark.once
def test_a_greedy_request_has_the_same_answer_in_any_company(llm, variants, alone, requests, which, forget):
    prompts, answers = alone
    engine = [llm, *variants][which]
    if forget:
        engine.engine.reset_caches()
    params = [
        SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, stop=("never said",) if one else ())
        for _, length, one in requests
    ]
    outputs = generate(engine, [prompts[index] for index, _, _ in requests], params)
    for output, (index, length, _) in zip(outputs, requests, strict=True):
        assert output.outputs[0].token_ids == answers[index][:length]
    assert is_idle(engine)
