"""Conversations to prompts: the model's chat template, with each media part tied to its placeholder.

What a user typed stays text: a part that holds the text of a special token, ``<image>`` say, gets the tokens
of its letters, and no picture can go missing, since texts and placeholders are counted after rendering.
"""

import itertools
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import transformers

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import RequestError
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY
from aphrodite_jax.multimodal.context import model_class
from aphrodite_jax.multimodal.inputs import MediaItems

__all__ = ["render_chat"]

Messages = Sequence[Mapping[str, Any]]
MEDIA_KEYS = {"image_url": "image", "image": "image", "video": "video", "audio": "audio"}


def render_chat(
    messages: Messages, tokenizer: transformers.PreTrainedTokenizerBase, model_config: ModelConfig
) -> dict[str, Any]:
    """The prompt that the chat template makes of a conversation.

    Args:
      messages: ``{"role": ..., "content": ...}``, where content is text or a list of parts:
        ``{"type": "text", "text": ...}``, ``{"type": "image_url", "image_url": {"url": "data:..." or "file:..."}}``,
        ``{"type": "image", "image": anything that opens}``, and the like for ``video`` and ``audio``.

    Returns:
      A prompt dict with ``prompt``, ``prompt_token_ids`` and ``multi_modal_data``.

    Raises:
      RequestError: messages of another form, a template that fails or drops a part, or media for a text model.
    """
    if not tokenizer.chat_template:
        raise RequestError(
            f"{model_config.tokenizer!r} has no chat template; use generate() with a prompt in the model's own form"
        )
    model_cls = model_class(model_config)
    shield = _Shield(tokenizer, model_cls)
    conversation, media = _read_messages(messages, shield)
    placeholders = _placeholders(model_cls, media)
    # Templates of multimodal models take lists of parts, those of text models strings; some take either.
    forms = (_with_parts, _with_strings) if hasattr(model_cls, "placeholder_str") else (_with_strings,)
    problems = []
    for form in forms:
        try:
            rendered = form(conversation, placeholders)
            text: Any = tokenizer.apply_chat_template(rendered, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the checkpoint's, and may fail in any way
            problems.append(f"{type(error).__name__}: {error}")
            continue
        problem = _what_is_missing(text, conversation, placeholders, shield)
        if any(isinstance(m["content"], list) and m["content"] and str(m["content"]) in text for m in rendered):
            problem = "it prints the list of a message's parts"
        if problem is None:
            return {
                "prompt": shield.restore(text),
                "prompt_token_ids": shield.tokenize(text, multimodal=len(forms) > 1),
                "multi_modal_data": media,
            }
        problems.append(problem)
    raise RequestError(f"the chat template of {model_config.tokenizer!r} can't render this: {'; '.join(problems)}")


# Reading messages: the conversation as (role, [text or (modality,)]) with shielded texts, and its media.

Part = str | tuple[str]


def _read_messages(messages: Messages, shield: "_Shield") -> tuple[list[tuple[str, list[Part]]], dict[str, MediaItems]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("messages are a non-empty list of {'role': ..., 'content': ...}")
    conversation, media = [], {}
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"a message is a dict with 'role' and 'content', got {_short(message)}")
        if not message["role"].isidentifier():
            raise RequestError(f"a role is one word such as 'user', got {_short(message['role'])}")
        if unknown := sorted(map(repr, set(message) - {"role", "content"})):
            raise RequestError(f"a message has 'role' and 'content', got {', '.join(unknown)} too")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence):
            raise RequestError(f"the content of a message is text or a list of parts, got {_short(content)}")
        parts = [_read_part(part, shield, media) for part in content]
        # A template may print a message's texts one behind the other, whatever stood between them.
        texts = [(index, part) for index, part in enumerate(parts) if isinstance(part, str)]
        for index, part in texts[:-1]:
            parts[index] = shield.end(part)
        conversation.append((message["role"], parts))
    return conversation, media


def _read_part(part: Any, shield: "_Shield", media: dict[str, MediaItems]) -> Part:
    if not isinstance(part, Mapping):
        raise RequestError(f"a part of a message is a dict with 'type', got {_short(part)}")
    kind = part.get("type")
    if not isinstance(kind, str) or (kind != "text" and kind not in MEDIA_KEYS):
        raise RequestError(f"a part's type is one of text, {', '.join(MEDIA_KEYS)}; got {_short(kind)}")
    if set(part) != {"type", kind}:
        raise RequestError(f"a part of type {kind!r} has the keys 'type' and {kind!r}, got {_short(list(part))}")
    value = part[kind]
    if kind == "text":
        if not isinstance(value, str):
            raise RequestError(f"the text of a part is a string, got {_short(value)}")
        return shield.protect(value)
    if kind == "image_url":
        value = _image_url(value)
    media.setdefault(MEDIA_KEYS[kind], MediaItems()).append(value)
    return (MEDIA_KEYS[kind],)


def _image_url(value: Any) -> str:
    value = {"url": value} if isinstance(value, str) else value
    if not isinstance(value, Mapping) or not isinstance(value.get("url"), str):
        raise RequestError(f"image_url is {{'url': 'data:...' or 'file:...'}}, got {_short(value)}")
    if unknown := sorted(map(repr, set(value) - {"url", "detail"})):
        raise RequestError(f"image_url has the keys 'url' and 'detail', got {', '.join(unknown)} too")
    if value.get("detail", "auto") != "auto":
        raise RequestError(f"image_url: only detail 'auto' is known, got {_short(value['detail'])}")
    return value["url"]


def _placeholders(model_cls: type, media: Mapping[str, list]) -> dict[str, list[str]]:
    """The text of each item's placeholder, by modality."""
    if media and not hasattr(model_cls, "placeholder_str"):
        if getattr(model_cls, "supports_multimodal", False):
            raise RequestError(f"{model_cls.__name__} has no placeholder_str method, so chat can't place media")
        raise RequestError(f"{model_cls.__name__} takes text alone, the messages come with {', '.join(media)}")
    return {
        modality: [model_cls.placeholder_str(modality, index) for index in range(1, len(items) + 1)]
        for modality, items in media.items()
    }


# The two forms that templates take.


def _with_parts(conversation, placeholders) -> list[dict[str, Any]]:
    return [
        {
            "role": role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": part[0]} for part in parts
            ],
        }
        for role, parts in conversation
    ]


def _with_strings(conversation, placeholders) -> list[dict[str, Any]]:
    left = {modality: iter(texts) for modality, texts in placeholders.items()}
    return [
        {
            "role": role,
            "content": "\n".join(part if isinstance(part, str) else next(left[part[0]]) for part in parts),
        }
        for role, parts in conversation
    ]


def _what_is_missing(text: str, conversation, placeholders: Mapping[str, list[str]], shield: "_Shield") -> str | None:
    for _, parts in conversation:
        for part in parts:
            if isinstance(part, str) and part.strip() not in text:
                return f"it drops the text {shield.restore(part)!r}"
    for modality, wanted in placeholders.items():
        for placeholder in dict.fromkeys(wanted):
            if text.count(placeholder) != wanted.count(placeholder):
                return f"it has {text.count(placeholder)} {placeholder} for {len(wanted)} {modality} items"
    return None


class _Shield:
    """Keeps what a user typed from being read as special tokens, through template and tokenizer.

    Marks stand in the text meanwhile: in the place of each special token's text, and where a part of a message ends,
    for the end of one part and the beginning of the next may be such a text too.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, model_cls: type):
        self._tokenizer = tokenizer
        # Tokens that are added but not special are text to the model (runs of spaces, tags), unless they place media.
        placeholders = "".join(
            model_cls.placeholder_str(modality, 1)
            for modality in MULTIMODAL_REGISTRY.modalities(model_cls)
            if hasattr(model_cls, "placeholder_str")
        )
        literals = {
            added.content
            for added in tokenizer.added_tokens_decoder.values()
            if added.content and (added.special or added.content in placeholders)
        }
        literals = sorted(literals, key=len, reverse=True)
        literal = "|".join(map(re.escape, literals)) or r"(?!)"
        self._literal = re.compile(literal)
        self._overlapping = re.compile(f"(?=({literal}))")
        self._mark = uuid.uuid4().hex
        self._marked = re.compile(f"\ue000{self._mark}:(\\d+)\ue001")
        self._end = f"\ue000{self._mark}:end\ue001"
        self._kept: list[str] = []

    def protect(self, text: str) -> str:
        """``text`` with a mark in place of each special token's text."""
        return self._literal.sub(self._put, text)

    def end(self, text: str) -> str:
        """Protected ``text`` with a mark where it ends, before spaces that a template may cut off.

        Of a blank one nothing changes: it stands behind another's mark, and a template may leave it out.
        """
        kept = text.rstrip()
        return kept + self._end + text[len(kept) :] if kept else text

    def _put(self, match: re.Match) -> str:
        self._kept.append(match[0])
        return f"\ue000{self._mark}:{len(self._kept) - 1}\ue001"

    def restore(self, text: str) -> str:
        """Rendered text as the user would read it."""
        return self._marked.sub(lambda match: self._kept[int(match[1])], text.replace(self._end, ""))

    def _pieces(self, text: str) -> list[str]:
        """What stands between the ends within special tokens; the other ends go, as they would change the tokens."""
        parts = text.split(self._end)
        text = "".join(parts)
        # The longest at each place: what a shorter one there reaches over, it reaches over too.
        found = [match.span(1) for match in self._overlapping.finditer(text)] if len(parts) > 1 else []
        ends = itertools.accumulate(map(len, parts[:-1]))
        cuts = [end for end in ends if any(start < end < stop for start, stop in found)]
        return [text[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(text)])]

    def tokenize(self, text: str, *, multimodal: bool) -> tuple[int, ...]:
        """Tokens of rendered text; special tokens are added as Hugging Face does after its template.

        There, a processor adds those of the tokenizer unless the text begins with one; a tokenizer adds none.
        """
        bos: Any = self._tokenizer.bos_token
        special = multimodal and not (bos and text.startswith(bos))
        texts = []
        for piece in self._pieces(text):
            plain, *marked = self._marked.split(piece)  # text, number, text, number, ..., text
            texts.append(plain)
            for number, following in zip(marked[::2], marked[1::2], strict=True):
                literal = self._kept[int(number)]
                texts += [literal[:1], literal[1:], following]
        ids = list(self._tokenizer(texts[0], add_special_tokens=special)["input_ids"])
        for letters in filter(None, texts[1:]):
            ids += self._tokenizer(letters, add_special_tokens=False)["input_ids"]
        return tuple(ids)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
