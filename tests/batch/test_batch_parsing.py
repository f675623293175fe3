"""One line of the input to a request or to its refusal, whatever the line holds."""

import json

import pytest
from batch_fakes import chat_line, completion_line
from hypothesis import given, settings
from hypothesis import strategies as st

from aphrodite_jax.batch.lines import Line, read_lines, scan_input
from aphrodite_jax.batch.refusal import Refusal
from aphrodite_jax.batch.requests import Defaults, decode_line, parse_request
from aphrodite_jax.sampling_params import SamplingParams

DEFAULTS = Defaults(model_names=("tiny", "served"), context_length=100)


def parse(value, defaults=DEFAULTS):
    return parse_request(decode_line(Line(1, json.dumps(value).encode())), defaults)


def outcome(function):
    try:
        return function()
    except Refusal as error:
        return error


def refusal(value) -> Refusal:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    with pytest.raises(Refusal) as caught:
        parse_request(decode_line(Line(1, data)), DEFAULTS)
    return caught.value


def test_every_option_reaches_the_engine():
    options = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 0.25,
        "frequency_penalty": -1, "repetition_penalty": 1.5, "seed": 4_000_000_000, "stop": ["a", "b"],
        "stop_token_ids": [3, 4], "ignore_eos": True, "max_tokens": 20, "min_tokens": 2,
        "logit_bias": {"5": -100, "6": 1.5}, "skip_special_tokens": False,
    }  # fmt: skip
    expected = SamplingParams(**{**options, "logit_bias": {5: -100, 6: 1.5}})
    assert parse(completion_line("a", **options)).sampling_params == expected
    with_logprobs = parse(chat_line("a", **options, logprobs=True, top_logprobs=3)).sampling_params
    assert with_logprobs == SamplingParams(**{**options, "logit_bias": {5: -100, 6: 1.5}, "logprobs": 3})


def test_defaults_are_those_of_the_api():
    chat = parse(chat_line("a", seed=1)).sampling_params
    assert chat == SamplingParams(max_tokens=100, seed=1)
    assert parse(completion_line("a", seed=1)).sampling_params == SamplingParams(max_tokens=16, seed=1)
    own = Defaults(model_names=("tiny",), context_length=100, max_tokens=30)
    assert parse(chat_line("a", seed=1), own).sampling_params.max_tokens == 30
    assert parse(completion_line("a", seed=1, max_tokens=3), own).sampling_params.max_tokens == 3


def test_nothing_asked_is_nothing_refused():
    nothing = {
        "temperature": None, "stream": False, "tools": [], "tool_choice": "none", "store": False,
        "user": None, "response_format": {"type": "text"}, "logprobs": False, "model": "served",
        "max_completion_tokens": 5,
    }  # fmt: skip
    request = parse(chat_line("a", seed=1, **nothing))
    assert request.sampling_params == SamplingParams(max_tokens=5, seed=1)
    assert request.model == "served"
    assert parse(chat_line("a")).model == "tiny"


def test_seed_is_a_function_of_the_job_and_the_custom_id():
    seeds = {parse(chat_line(name)).sampling_params.seed for name in ("a", "b", "a")}
    assert len(seeds) == 2
    other = Defaults(model_names=("tiny",), context_length=100, seed=1)
    assert parse(chat_line("a"), other).sampling_params.seed not in seeds


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"custom_id": None}, "missing_custom_id", "non-empty string"),
        ({"custom_id": 7}, "missing_custom_id", "non-empty string"),
        ({"method": "GET"}, "invalid_method", "'POST'"),
        ({"url": "/v1/embeddings"}, "invalid_url", "/v1/chat/completions"),
        ({"url": ["x"]}, "invalid_url", "/v1/chat/completions"),
        ({"body": "text"}, "invalid_value", "body must be an object"),
        ({"bodies": {}}, "unknown_key", "custom_id, method, url, body"),
    ],
)
def test_envelope_refusals(change, code, words):
    error = refusal({**chat_line("a"), **change})
    assert error.code == code
    assert words in str(error)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"temprature": 0}, "unknown_option", "temperature"),
        ({"temprature": None}, "unknown_option", "temperature"),
        ({"stream": True}, "unsupported_option", "stream"),
        ({"stream": 0}, "unsupported_option", "stream"),
        ({"tools": [{"type": "function"}]}, "unsupported_option", "tools"),
        ({"response_format": {"type": "json_object"}}, "unsupported_option", "response_format"),
        ({"user": "u"}, "unsupported_option", "user"),
        ({"temperature": "hot"}, "invalid_value", "a number"),
        ({"temperature": True}, "invalid_value", "a number"),
        ({"temperature": -1}, "invalid_value", "temperature must be at least 0"),
        ({"top_p": 10**400}, "invalid_value", "a number"),
        ({"n": 0}, "invalid_value", "1 to 128"),
        ({"n": 1000}, "invalid_value", "1 to 128"),
        ({"max_tokens": 2.0}, "invalid_value", "a whole number"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens must be at least 1"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "invalid_value", "not both"),
        ({"seed": -1}, "invalid_value", "seed must be"),
        ({"stop": [1]}, "invalid_value", "list of strings"),
        ({"stop": ""}, "invalid_value", "non-empty strings"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "token ids to numbers"),
        ({"top_logprobs": 3}, "invalid_value", "logprobs to be true"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "logprobs must be None or 0 to 20"),
        ({"logprobs": 3}, "invalid_value", "true or false"),
        ({"model": "gpt-4o"}, "model_not_found", "--served-model-name"),
        ({"messages": []}, "invalid_value", "at least one message"),
        ({"messages": ["hi"]}, "invalid_value", "at least one message"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "unsupported_option", "name"),
    ],
)
def test_chat_refusals(options, code, words):
    error = refusal(chat_line("a", **options))
    assert error.code == code
    assert words in str(error)


@pytest.mark.parametrize("prompt", ["", [], None, ["a", "b"], [1, True], [-1], {"prompt": "a"}])
def test_a_completion_takes_one_prompt(prompt):
    assert "one non-empty string or one list" in str(refusal(completion_line("a", prompt)))


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"[1]",
        b"\xff{}",
        b'{"custom_id": NaN}',
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_line_that_is_no_json_object(data):
    assert refusal(data).code == "invalid_json"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
OPTION = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "n",
        "temperature",
        "top_p",
        "top_k",
        "stop",
        "seed",
        "max_tokens",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "stop_token_ids",
        "stream",
        "tools",
        "response_format",
        "x",
    ]
)


@settings(deadline=None)
@given(
    st.sampled_from(["/v1/chat/completions", "/v1/completions"]),
    st.dictionaries(OPTION, JSON, max_size=4),
    st.dictionaries(st.sampled_from(["custom_id", "method", "url", "body", "x"]), JSON, max_size=1),
)
def test_any_json_is_a_request_or_a_refusal(url, body, change):
    source = {"messages": [{"role": "user", "content": "x"}]} if "chat" in url else {"prompt": "x"}
    value = {"custom_id": "a", "method": "POST", "url": url, "body": {**source, **body}, **change}
    result = outcome(lambda: parse(value))
    assert isinstance(result, Refusal) or isinstance(result.sampling_params, SamplingParams)


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_an_object_or_a_refusal(data):
    result = outcome(lambda: decode_line(Line(1, data)))
    assert isinstance(result, dict) or result.code == "invalid_json"


@settings(deadline=None)
@given(st.lists(st.sampled_from([b"", b" ", b"a", b"bb", b"ccccc", b"dddddddd"]), max_size=8), st.booleans())
def test_lines_are_those_that_are_not_blank(tmp_path_factory, lines, ended):
    path = tmp_path_factory.mktemp("lines") / "input"
    path.write_bytes(b"\n".join(lines) + b"\n" * ended)
    expected = [(number, data if len(data) <= 4 else None) for number, data in enumerate(lines, 1) if data.strip()]
    found = list(read_lines(path, max_line_bytes=4))
    assert [(line.number, line.data and line.data.rstrip(b"\n")) for line in found] == expected
    assert scan_input(path).num_lines == len(expected)


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "input").write_bytes(b"\xef\xbb\xbf{}\n")
    assert [line.data for line in read_lines(tmp_path / "input")] == [b"{}\n"]
