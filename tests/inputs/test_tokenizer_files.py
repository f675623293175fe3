"""The tokenizer of a checkpoint, and the tokens that end its answers."""

import json
from concurrent.futures import ThreadPoolExecutor

import llava_files
import pytest

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError
from aphrodite_jax.inputs import end_token_ids, load_tokenizer, text_tokens


def write(directory, *, generation="absent", **text_fields) -> ModelConfig:
    llava_files.write_config(directory, llava_files.text_config(**text_fields))
    if generation != "absent":
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return ModelConfig(model=directory)


def test_the_tokenizer_of_the_model(tmp_path):
    llava_files.write_tokenizer(llava_files.write_llava(tmp_path), "template")
    tokenizer = load_tokenizer(ModelConfig(model=tmp_path))
    assert tokenizer.chat_template == "template"
    ids = tokenizer("a<image>é")["input_ids"]
    assert ids[:1] == [1]
    assert ids[2] == llava_files.IMAGE_TOKEN
    assert tokenizer.decode(ids) == "<s>a<image>é"


def test_a_tokenizer_of_its_own_directory(tmp_path):
    model = llava_files.write_llava(tmp_path / "model")
    own = llava_files.write_tokenizer(tmp_path / "tokenizer")
    assert load_tokenizer(ModelConfig(model=model, tokenizer=own)).eos_token_id == 2
    with pytest.raises(
        ConfigError, match=r"can't load a tokenizer from '.*/model': .*\. Give its directory or hub id with"
    ):
        load_tokenizer(ModelConfig(model=model))


@pytest.mark.parametrize("tokenizer", ["no/such-tokenizer", "/no/such/directory", "a/b/c/d"])
def test_a_tokenizer_that_is_not_there(tmp_path, tokenizer):
    model = llava_files.write_llava(tmp_path / "model")
    with pytest.raises(ConfigError, match=f"can't load a tokenizer from '{tokenizer}'"):
        load_tokenizer(ModelConfig(model=model, tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"type": "NoSuchModel"}}'),
        ("tokenizer_config.json", "{"),
        ("chat_template.json", "{"),
        ("chat_template.json", "{}"),
        ("chat_template.json", "[]"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, file, content):
    llava_files.write_tokenizer(llava_files.write_llava(tmp_path))
    (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match="can't load a tokenizer from") as info:
        load_tokenizer(ModelConfig(model=tmp_path))
    assert len(str(info.value)) < 800


def test_where_the_end_tokens_are_looked_up(tmp_path):
    class Tokenizer:
        eos_token_id = 77

    generation = write(tmp_path / "a", generation=[5, 6], eos_token_id=9)
    assert end_token_ids(generation) == {5, 6}
    assert end_token_ids(generation, Tokenizer()) == {5, 6}
    one = write(tmp_path / "b", generation=5, eos_token_id=9)
    assert end_token_ids(one, Tokenizer()) == {5}
    config = write(tmp_path / "c", eos_token_id=9)
    assert end_token_ids(config, Tokenizer()) == {9}
    several = write(tmp_path / "d", generation=None, eos_token_id=[9, 10])
    assert end_token_ids(several, Tokenizer()) == {9, 10}
    nothing = write(tmp_path / "e", eos_token_id=None)
    assert end_token_ids(nothing, Tokenizer()) == {77}
    assert end_token_ids(nothing) == frozenset()


def test_the_end_token_of_the_language_model(tmp_path):
    llava = llava_files.llava_config(text_config=llava_files.text_config(eos_token_id=33))
    assert end_token_ids(ModelConfig(model=llava_files.write_config(tmp_path, llava))) == {33}


def test_token_zero_ends_an_answer_too(tmp_path):
    assert end_token_ids(write(tmp_path, generation=0, eos_token_id=9)) == {0}


def test_a_damaged_generation_config(tmp_path):
    model_config = write(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(ConfigError, match="can't read the generation config of"):
            end_token_ids(model_config)


@pytest.mark.parametrize("value", ["</s>", ["</s>"], 2.5, {"a": 1}])
def test_an_end_token_that_is_none(tmp_path, value):
    with pytest.raises(ConfigError, match=r"eos_token_id of .* is a token id or a list of them, got"):
        end_token_ids(write(tmp_path, generation=value))


def test_a_hub_that_refuses_an_optional_file_is_no_missing_file(llava, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("you are trying to access a gated repo")

    monkeypatch.setattr("aphrodite_jax.inputs.tokenizer.cached_file", refuse)
    with pytest.raises(ConfigError, match="gated repo"):
        end_token_ids(ModelConfig(model=llava))


def test_texts_are_tokenized_once_and_from_any_thread():
    tokens = text_tokens(ModelConfig())
    texts = [f"text number {index % 7}" for index in range(200)]
    expected = [tuple(tokens.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokens, texts)) == expected
    assert text_tokens(ModelConfig()) is not tokens
