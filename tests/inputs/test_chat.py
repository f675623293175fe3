"""Conversations to prompts: every image stands where it belongs, and what a user typed stays text."""

import base64
import io
import json

import llava_files
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import MediaError, RequestError
from aphrodite_jax.inputs import INPUT_REGISTRY, LLMInputs, load_tokenizer, render_chat
from aphrodite_jax.modeling.models.llava import LlavaForConditionalGeneration

BOS, EOS, IMAGE = (llava_files.SPECIALS.index(token) for token in ("<s>", "</s>", "<image>"))

# As llava-hf's: the images of a message, then its texts.
PARTS = """\
{%- for message in messages -%}
{{ message.role | upper }}: {# -#}
{%- for part in message.content if part.type == 'image' %}<image>
{% endfor -%}
{%- for part in message.content if part.type == 'text' %}{{ part.text }} {% endfor -%}
{%- endfor -%}
{%- if add_generation_prompt %}ASSISTANT:{% endif -%}
"""
# As a text model's: the content is a string.
STRINGS = """\
{%- for message in messages %}[{{ message.role }}]{{ message.content }}{{ eos_token }}{% endfor -%}
{%- if add_generation_prompt %}[assistant]{% endif -%}
"""
ADDING = """{% for message in messages %}{{ 'Q: ' + message.content + '\n' }}{% endfor %}A:"""
# Takes both, but knows no images.
TEXT_PARTS = """\
{%- for message in messages -%}
Q: {% if message.content is string %}{{ message.content }}{% else -%}
{%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}
{% endfor %}A:"""
DROPS_IMAGES = """\
{%- for m in messages %}{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endfor -%}
"""
FIRST_IMAGE = """\
{%- for m in messages %}{% for part in m.content %}{{ part.text or '<image>' }}{% endfor %}{% break %}{% endfor -%}
"""
DROPS_TEXT = "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """The tokenizer and config of a LLaVA, or of a text model, with a chat template."""

    def make(template: str | None, *, text_model=False, added=()):
        directory = tmp_path_factory.mktemp("model")
        llava_files.write_llava(directory, llava_files.text_config() if text_model else None)
        llava_files.write_tokenizer(directory, template, added=added)
        model_config = ModelConfig(model=directory, limit_mm_per_prompt={} if text_model else {"image": 8})
        return load_tokenizer(model_config), model_config

    return make


@pytest.fixture(scope="module")
def llava(make):
    return make(PARTS)


@pytest.fixture(scope="module")
def text_model(make):
    return make(STRINGS, text_model=True)


def user(*parts) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def image(source) -> dict:
    return {"type": "image", "image": source}


def url(source) -> dict:
    return {"type": "image_url", "image_url": {"url": source}}


def picture(colour) -> Image.Image:
    return Image.new("RGB", (4, 4), colour)


def png(colour) -> bytes:
    file = io.BytesIO()
    picture(colour).save(file, "PNG")
    return file.getvalue()


def special_tokens(prompt) -> list[int]:
    return [token for token in prompt["prompt_token_ids"] if token < len(llava_files.SPECIALS)]


# Templates.


def test_images_stand_before_the_texts_as_llavas_template_says(llava):
    tokenizer, model_config = llava
    red = picture("red")
    prompt = render_chat([user("what is this?", image(red), "be brief")], *llava)
    assert prompt["prompt"] == "USER: <image>\nwhat is this? be brief ASSISTANT:"
    assert prompt["multi_modal_data"] == {"image": [red]}
    assert prompt["multi_modal_data"]["image"][0] is red
    assert prompt["prompt_token_ids"] == tuple(tokenizer(prompt["prompt"])["input_ids"])
    assert special_tokens(prompt) == [BOS, IMAGE]
    processed = INPUT_REGISTRY.process_input(model_config, LLMInputs(**prompt))
    assert [span.length for span in processed.placeholders["image"]] == [4]


def test_text_alone(llava):
    for content in ("hello there", [{"type": "text", "text": "hello there"}]):
        prompt = render_chat([{"role": "user", "content": content}], *llava)
        assert prompt["prompt"] == "USER: hello there ASSISTANT:"
        assert prompt["multi_modal_data"] == {}
        assert special_tokens(prompt) == [BOS]


def test_several_images_in_several_messages_keep_their_order(llava):
    colours = ["red", "lime", "blue", "white"]
    pictures = [picture(colour) for colour in colours]
    messages = [
        user(image(pictures[0]), "one", image(pictures[1])),
        {"role": "assistant", "content": "two it is"},
        user("three", image(pictures[2])),
        user(image(pictures[3])),
    ]
    before = repr(messages)
    prompt = render_chat(messages, *llava)
    assert prompt["prompt"] == (
        "USER: <image>\n<image>\none ASSISTANT: two it is USER: <image>\nthree USER: <image>\nASSISTANT:"
    )
    assert all(a is b for a, b in zip(prompt["multi_modal_data"]["image"], pictures, strict=True))
    assert special_tokens(prompt) == [BOS] + [IMAGE] * 4
    assert repr(messages) == before
    processed = INPUT_REGISTRY.process_input(llava[1], LLMInputs(**prompt))
    assert [item.getpixel((0, 0)) for item in processed.multi_modal_data["image"]] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
    ]


def test_a_text_models_template(text_model):
    messages = [{"role": "system", "content": "be brief"}, user("one", "two")]
    prompt = render_chat(messages, *text_model)
    assert prompt["prompt"] == "[system]be brief</s>[user]one\ntwo</s>[assistant]"
    assert special_tokens(prompt) == [EOS, EOS]  # Hugging Face adds no beginning after a text model's template
    tokenizer = text_model[0]
    joined = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one\ntwo"}]
    expected = tokenizer.apply_chat_template(joined, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(prompt["prompt_token_ids"]) == expected


@pytest.mark.parametrize(
    ("template", "before", "after"), [(STRINGS, "[user]", "</s>[assistant]"), (ADDING, "Q: ", "\nA:")]
)
def test_a_template_of_strings_gets_placeholders_as_text(make, template, before, after):
    model = make(template)
    prompt = render_chat([user("this?", image(picture("red")), "or", image(picture("blue")))], *model)
    assert prompt["prompt"] == f"{before}this?\n<image>\nor\n<image>{after}"
    assert special_tokens(prompt).count(IMAGE) == 2
    # Nor is a list of parts ever printed into the prompt.
    prompt = render_chat([user("hello")], *model)
    assert prompt["prompt"] == f"{before}hello{after}"


def test_a_template_that_ignores_images_gets_placeholders_as_text(make):
    model = make(TEXT_PARTS)
    prompt = render_chat([user("this?", image(picture("red")))], *model)
    assert prompt["prompt"] == "Q: this?\n<image>A:"
    assert special_tokens(prompt) == [BOS, IMAGE]


@pytest.mark.parametrize(
    "content", ["{{ message.content | trim }}", "{{ message.content ~ '!' }}", "{{ message.content | string }}"]
)
def test_parts_are_never_printed(make, content):
    prompt = render_chat([user("hello")], *make("{% for message in messages %}" + content + "{% endfor %}"))
    assert prompt["prompt"].rstrip("!") == "hello"


def test_a_template_that_writes_the_beginning_itself(make):
    prompt = render_chat([user("hello")], *make("{{ bos_token }}" + PARTS))
    assert special_tokens(prompt) == [BOS]
    assert prompt["prompt"] == "<s>USER: hello ASSISTANT:"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "it drops the text 'hello'"),
        (DROPS_TEXT, "it drops the text 'brief'"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m.content.no.such }}{% endfor %}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% for %}", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_fails_or_drops_text(make, template, message):
    conversation = [{"role": "system", "content": "brief"}, user("hello")]
    if template.startswith("{% for m in messages %}{{ m.role"):
        conversation = conversation[1:]
    with pytest.raises(RequestError, match=f"the chat template of .* can't render this: .*{message}"):
        render_chat(conversation, *make(template))


@pytest.mark.parametrize(
    ("template", "count"),
    [
        (
            DROPS_IMAGES,
            0,
        ),
        (
            FIRST_IMAGE,
            1,
        ),
        (PARTS.replace("<image>", "<image><image>"), 4),
    ],
)
def test_an_image_is_never_dropped(make, template, count):
    messages = [user("this?", image(picture("red"))), user(image(picture("blue")))]
    with pytest.raises(RequestError, match=f"it has {count} <image> for 2 image items"):
        render_chat(messages, *make(template))


def test_no_template(make):
    with pytest.raises(RequestError, match=r"has no chat template; use generate\(\) with a prompt"):
        render_chat([user("hello")], *make(None))


def test_images_for_a_text_model(text_model):
    with pytest.raises(RequestError, match="LlamaForCausalLM takes text alone, the messages come with image"):
        render_chat([user("hello", image(picture("red")))], *text_model)


def test_media_that_the_model_cannot_place(llava, monkeypatch):
    monkeypatch.delattr(LlavaForConditionalGeneration, "placeholder_str")
    with pytest.raises(RequestError, match="LlavaForConditionalGeneration has no placeholder_str method"):
        render_chat([user(image(picture("red")))], *llava)


# Where images come from.


def test_every_source_of_an_image(llava, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png("red"))
    data = "data:image/png;base64," + base64.b64encode(png("red")).decode()
    parts = [
        url(data),
        url(path.as_uri()),
        {"type": "image_url", "image_url": data},
        {"type": "image_url", "image_url": {"url": data, "detail": "auto"}},
        image(picture("red")),
        image(path),
        image(png("red")),
        image(np.asarray(picture("red"))),
    ]
    prompt = render_chat([user(*parts)], *llava)
    processed = INPUT_REGISTRY.process_input(llava[1], LLMInputs(**prompt))
    images = processed.multi_modal_data["image"]
    assert len(images) == len(processed.placeholders["image"]) == len(parts)
    assert {item.getpixel((1, 1)) for item in images} == {(255, 0, 0)}


def test_embeddings_are_an_image_too(llava):
    prompt = render_chat([user(image(np.zeros((7, llava_files.WIDTH), np.float32)))], *llava)
    processed = INPUT_REGISTRY.process_input(llava[1], LLMInputs(**prompt))
    assert [span.length for span in processed.placeholders["image"]] == [7]


def test_a_broken_image_is_an_error_of_its_request(llava):
    for part in (
        url("data:image/png;base64,AAAA"),
        url("https://example.com/a.png"),
        image(None),
        image([picture("red")]),
    ):
        prompt = render_chat([user(part)], *llava)
        with pytest.raises(MediaError):
            INPUT_REGISTRY.process_input(llava[1], LLMInputs(**prompt))


# What a user typed stays text.


@pytest.mark.parametrize(
    "text", ["<image>", "</s>", "<s>", "a <image> b</s>c <pad>", "<<image>image>", "<ima<image>ge>", "<image><image>"]
)
def test_typed_special_tokens_are_letters(llava, text_model, text):
    for model, beginning in ((llava, [BOS]), (text_model, [])):
        tokenizer = model[0]
        prompt = render_chat([user(f"what is {text}?")], *model)
        assert f"what is {text}?" in prompt["prompt"]
        own = [EOS] if model is text_model else []
        assert special_tokens(prompt) == beginning + own
        decoded = tokenizer.decode(prompt["prompt_token_ids"])
        assert decoded == "<s>" * len(beginning) + prompt["prompt"]


def test_a_typed_placeholder_beside_an_image(llava):
    prompt = render_chat([user("what does <image> mean?", image(picture("red")))], *llava)
    assert prompt["prompt"] == "USER: <image>\nwhat does <image> mean? ASSISTANT:"
    assert special_tokens(prompt) == [BOS, IMAGE]
    processed = INPUT_REGISTRY.process_input(llava[1], LLMInputs(**prompt))
    assert processed.placeholders["image"][0].offset == len("<s>USER: ") - 2  # a token for each letter, one for <s>


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.sampled_from(["<image>", "</s>", "<s>", "<pad>", "<", "image>", "/s>", "é", " ", "\n", "{{ 1 }}", "x"]),
        min_size=1,
    )
)
def test_any_text_is_kept(llava, pieces):
    text = "".join(pieces)
    prompt = render_chat([user(text, image(picture("red")))], *llava)
    assert prompt["prompt"] == f"USER: <image>\n{text} ASSISTANT:"
    assert special_tokens(prompt) == [BOS, IMAGE]
    assert llava[0].decode(prompt["prompt_token_ids"]) == "<s>" + prompt["prompt"]


ONE_AFTER_ANOTHER = """\
{%- for message in messages %}Q: {% for part in message.content -%}
{%- if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}</s>{% endfor %}A:"""
IMAGES_FIRST = """\
{%- for message in messages %}Q: {% for part in message.content if part.type == 'image' %}<image>{% endfor %}
{%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}</s>{% endfor %}A:"""


@pytest.mark.parametrize(
    "parts",
    [
        ["a </", "s> b"],
        ["<", "/s", ">"],
        ["a <", "", "/s> b"],
        ["a </", image(picture("red")), "s> b"],
        ["<im", "age> <", "image>"],
        ["</s", "></s>", "<", "/s>"],
    ],
)
@pytest.mark.parametrize("template", [ONE_AFTER_ANOTHER, IMAGES_FIRST], ids=["one after another", "images first"])
def test_a_special_token_can_not_be_typed_in_several_parts(make, template, parts):
    model = make(template)
    prompt = render_chat([user(*parts)], *model)
    images = len(prompt["multi_modal_data"].get("image", ()))
    assert special_tokens(prompt) == [BOS] + [IMAGE] * images + [EOS]
    assert model[0].decode(prompt["prompt_token_ids"]) == "<s>" + prompt["prompt"]
    if not images:
        assert prompt["prompt"] == f"Q: {''.join(parts)}</s>A:"


def test_a_special_token_that_trimmed_parts_would_make(make):
    template = ONE_AFTER_ANOTHER.replace("part.text", "part.text | trim")
    prompt = render_chat([user("a </ ", " ", " s> b")], *make(template))
    assert prompt["prompt"] == "Q: a </s> b</s>A:"
    assert special_tokens(prompt) == [BOS, EOS]


@pytest.mark.parametrize("parts", [["wh", "at is"], ["a <", "b>"], ["<", " /s>"], ["</s>", "<s>"]])
def test_parts_that_make_no_special_token_are_read_together(make, parts):
    model = make(ONE_AFTER_ANOTHER)
    assert render_chat([user(*parts)], *model) == render_chat([user("".join(parts))], *model)


def test_a_part_that_is_dropped_is_shown_as_it_was_typed(make):
    template = "{% for message in messages %}{{ message.content[0].text }}{% endfor %}"
    with pytest.raises(RequestError, match="it drops the text 'b </s>'"):
        render_chat([user("a", "b </s>", "c")], *make(template))


@pytest.mark.parametrize(
    "text", ["{{ messages }}", "{% for x in y %}", "{# hidden #}", "ASSISTANT: yes USER: <b>&amp;</b>", "'\"\\n"]
)
def test_text_like_a_template_is_text(llava, text):
    assert render_chat([user(text)], *llava)["prompt"] == f"USER: {text} ASSISTANT:"


def test_added_tokens_that_are_not_special_stay_tokens(make):
    """Runs of spaces, or tags, that the tokenizer has a token for: the model knows them as text."""
    model = make(PARTS, added=("    ", "<table>"))
    tokenizer = model[0]
    prompt = render_chat([user("a    b<table></s>")], *model)
    added = [tokenizer.convert_tokens_to_ids(token) for token in ("    ", "<table>")]
    assert [token for token in prompt["prompt_token_ids"] if token in added] == added
    assert special_tokens(prompt) == [BOS]
    plain = render_chat([user("a    b<table>")], *model)
    assert plain["prompt_token_ids"] == tuple(tokenizer(plain["prompt"])["input_ids"])


def test_a_placeholder_that_is_no_special_token_is_kept_apart_too(make, monkeypatch):
    monkeypatch.setattr(LlavaForConditionalGeneration, "placeholder_str", staticmethod(lambda m, i: "<picture>"))
    model = make(PARTS.replace("<image>", "<picture>"), added=("<picture>",))
    token = model[0].convert_tokens_to_ids("<picture>")
    prompt = render_chat([user("a <picture>?", image(picture("red")))], *model)
    assert prompt["prompt"] == "USER: <picture>\na <picture>? ASSISTANT:"
    assert prompt["prompt_token_ids"].count(token) == 1


# Messages of another form.


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages are a non-empty list of"),
        ("hello", "messages are a non-empty list of"),
        (None, "messages are a non-empty list of"),
        ({"role": "user", "content": "x"}, "messages are a non-empty list of"),
        (["hello"], "a message is a dict with 'role' and 'content', got 'hello'"),
        ([{"content": "x"}], "a message is a dict with 'role' and 'content', got {'content': 'x'}"),
        ([{"role": 3, "content": "x"}], "a message is a dict with 'role' and 'content'"),
        ([{"role": "</s>", "content": "x"}], "a role is one word such as 'user', got '</s>'"),
        ([{"role": "user"}], "the content of a message is text or a list of parts, got None"),
        ([{"role": "user", "content": 3}], "the content of a message is text or a list of parts, got 3"),
        ([{"role": "user", "content": {"type": "text"}}], "the content of a message is text or a list of parts"),
        (
            [{"role": "user", "content": "x", "name": "a", 3: 4}],
            "a message has 'role' and 'content', got 'name', 3 too",
        ),
        ([{"role": "user", "content": ["x"]}], "a part of a message is a dict with 'type', got 'x'"),
        (
            [{"role": "user", "content": [Image.new("L", (1, 1))]}],
            "a part of a message is a dict with 'type', got <PIL",
        ),
        (
            [{"role": "user", "content": [{"text": "x"}]}],
            "a part's type is one of text, image_url, image, video, audio; got None",
        ),
        ([{"role": "user", "content": [{"type": "smell", "smell": 1}]}], "a part's type is one of .*; got 'smell'"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], r"a part's type is one of .*; got \['text'\]"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            r"a part of type 'text' has the keys 'type' and 'text', got \['type'\]",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], r"a part of type 'image' has the keys 'type' and 'image'"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x", 3: 1}]}],
            r"has the keys 'type' and 'text', got \[",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "the text of a part is a string, got 3"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": 3}]}], "image_url is {'url': .*got 3"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url is {'url': .*got {}"),
        ([{"role": "user", "content": [url(3)]}], "image_url is {'url': .*got {'url': 3}"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "size": 1, 3: 4}}]}],
            "image_url has the keys 'url' and 'detail', got 'size', 3 too",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "detail": "high"}}]}],
            "image_url: only detail 'auto' is known, got 'high'",
        ),
        ([{"role": "user", "content": ["x" * 500]}], r"got 'x{56}\.\.\.$"),
    ],
)
def test_messages_of_another_form(llava, messages, message):
    with pytest.raises(RequestError, match=message):
        render_chat(messages, *llava)


# The template's own files.


def test_the_template_of_a_legacy_file(tmp_path):
    llava_files.write_tokenizer(llava_files.write_llava(tmp_path))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": PARTS}))
    model_config = ModelConfig(model=tmp_path)
    prompt = render_chat([user(image(picture("red")), "this?")], load_tokenizer(model_config), model_config)
    assert prompt["prompt"] == "USER: <image>\nthis? ASSISTANT:"


def test_the_newer_file_goes_before_the_legacy_one(tmp_path):
    llava_files.write_tokenizer(llava_files.write_llava(tmp_path), PARTS)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 1 // 0 }}"}))
    assert load_tokenizer(ModelConfig(model=tmp_path)).chat_template == PARTS
