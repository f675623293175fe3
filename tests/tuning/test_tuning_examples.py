"""Examples: the tokens and rows that become of them, and what is refused."""

import numpy as np
import pytest
from golden_files import media_of, write_chat_model
from tuning_cases import shared_case

from aphrodite_jax import ModelConfig
from aphrodite_jax.errors import ConfigError, PlaceholderError, PromptTooLongError, RequestError, TooManyItemsError
from aphrodite_jax.tuning import Example, ExamplePreparer, load_model
from aphrodite_jax.tuning.examples import tokens_behind

pytestmark = pytest.mark.once

END = 2


@pytest.fixture(scope="module")
def case():
    return shared_case("llava_clip_llama")


@pytest.fixture(scope="module")
def prepare(case):
    return ExamplePreparer(case.model, case.model_config)


def test_an_example_is_its_prompt_its_answer_and_an_end_token(case):
    for prompt, example in zip(case.golden.prompts, case.prepared, strict=True):
        answer = prompt.tokens[: example.num_answers - 1]
        np.testing.assert_array_equal(example.tokens, [*prompt.input_ids, *answer, END])
        assert example.prompt_length == len(prompt.input_ids)
        assert example.num_rows == len(prompt.input_ids) + len(answer)
        assert len(example.media) == len(prompt.images)
        np.testing.assert_array_equal(example.positions, np.arange(example.num_rows))
        np.testing.assert_array_equal(example.intervals["full"].stop, np.arange(example.num_rows) + 1)


def test_answers_are_causal_behind_a_prompt_that_sees_itself():
    example = shared_case("paligemma2").prepared[1]
    prompt, rows = example.prompt_length, example.num_rows
    stop = np.maximum(np.arange(rows) + 1, prompt)
    np.testing.assert_array_equal(example.intervals["full"].stop, stop)
    window = shared_case("paligemma2").golden.config["text_config"]["sliding_window"]
    start = example.intervals["sliding"].start
    np.testing.assert_array_equal(start[:prompt], 0)
    np.testing.assert_array_equal(start[prompt:], np.maximum(np.arange(prompt, rows) + 1 - window, 0))


def test_answers_go_on_behind_positions_of_several_axes():
    example = shared_case("qwen2_vl").prepared[-1]
    prompt = example.prompt_length
    last = example.positions[:, :prompt].max()
    behind = np.arange(example.num_rows - prompt) + last + 1
    np.testing.assert_array_equal(example.positions[:, prompt:], np.stack([behind] * 3))
    assert last + 1 < prompt  # a video's rows share positions


def test_texts_and_conversations_are_tokenized_as_when_served(tmp_path):
    model_config = ModelConfig(model=write_chat_model(tmp_path), dtype="float32")
    prepare = ExamplePreparer(load_model(model_config), model_config)
    image = media_of(shared_case("llava_clip_llama").golden.prompts[1])["image"][0]
    text = prepare(Example(prompt="w3 <image> w9 w4", answer=" w7 w8", multi_modal_data={"image": image}))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "w9"}]
    chat = prepare(Example(prompt=[{"role": "user", "content": content}], answer="w7 w8"))
    np.testing.assert_array_equal(text.tokens, chat.tokens)
    assert text.tokens[-3:].tolist() == [7, 8, END]
    assert text.tokens[text.tokens != 159].tolist() == [3, 9, 4, 7, 8, END]
    with pytest.raises(RequestError, match="media of a conversation stand in its messages"):
        prepare(Example(prompt=[{"role": "user", "content": content}], answer="w7", multi_modal_data={"image": image}))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (lambda text: tuple(text), (" ", "a")),  # a byte-level tokenizer
        (lambda text: tuple("▁" + text.replace(" ", "▁")), ("▁", "a")),  # SentencePiece puts one space before a text
        (lambda text: (text,), (" a",)),  # one that joins a line's end with what follows
    ],
)
def test_an_answer_s_tokens_are_those_that_follow_a_prompt(tokens, expected):
    assert tokens_behind(tokens, " a") == expected


def refusals():
    text = [1, 5, 6]
    image = {"image": [np.zeros((28, 28, 3), np.uint8)] * 4}
    return {
        "empty answer": (Example(prompt=text, answer=""), RequestError, "answer '' has no tokens"),
        "answer outside": (Example(prompt=text, answer=[160]), RequestError, "token ids below 160"),
        "answer of words": (Example(prompt=text, answer=["w3"]), RequestError, "text or token ids"),
        "empty prompt": (Example(prompt=[], answer=[5]), RequestError, "the prompt is empty"),
        "end token": (Example(prompt=text, answer=[5], end_token="w9"), RequestError, "give one of '</s>'"),
        "long prompt": (Example(prompt=text * 90, answer=[5]), PromptTooLongError, "at most 255"),
        "long answer": (Example(prompt=text, answer=[5] * 254), RequestError, "have 257 tokens, the model takes 256"),
        "no picture": (Example(prompt=[1, 159], answer=[5]), PlaceholderError, "1 placeholders"),
        "pictures": (Example(prompt=[1, 159], answer=[5], multi_modal_data=image), TooManyItemsError, "at most 3"),
    }


@pytest.mark.parametrize("name", refusals())
def test_an_example_that_can_not_be_used_is_refused_in_words(prepare, name):
    example, error, message = refusals()[name]
    with pytest.raises(error, match=message):
        prepare(example)


def test_the_longest_example_fits(prepare):
    assert prepare(Example(prompt=[1, 5, 6], answer=[5] * 253)).num_rows == 256


def test_the_config_is_that_of_the_model(case):
    with pytest.raises(ConfigError, match=r"a LlavaForConditionalGeneration, .* has a Gemma3For"):
        ExamplePreparer(case.model, shared_case("gemma3").model_config)
