"""Requests to prompts, in preparing threads: what many rows have in common is done once.

Rows of a job often ask the same about other images, or other things about the same ones. The chat template places
images by their number alone, so what it makes of a conversation serves all that differ in their images.
"""

import collections
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aphrodite_jax.batch.requests import BatchRequest, prompt_of
from aphrodite_jax.batch.shared_images import SharedImages

if TYPE_CHECKING:
    from aphrodite_jax.llm import LLM

__all__ = ["PromptMaker"]

CAPACITY = 1024
"""Conversations that are kept."""
LONGEST = 4096
"""Characters of a conversation's text, above which it is not kept."""


class PromptMaker:
    """Makes prompts; safe to share between threads.

    Attributes:
      images: decoded ones that several rows name.
    """

    def __init__(self, llm: "LLM"):
        self._llm = llm
        self.images = SharedImages(llm.model_config)
        self._kept: collections.OrderedDict[Hashable, Mapping[str, Any]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, request: BatchRequest) -> Any:
        """The prompt of a request, as `AphroditeEngine.prepare` takes it.

        Raises:
          RequestError: media that can't be opened, or messages that can't be rendered; and what the request's source
            raises.
        """
        source: Any = request.source() if callable(request.source) else request.source
        return self._render(self.images.in_messages(source)) if request.kind == "chat" else prompt_of(source)

    def _render(self, messages: Sequence[Any]) -> Any:
        texts, images = _apart(messages)
        if texts is None:
            return self._llm.render_chat(messages)
        with self._lock:
            rendered = self._kept.get(texts)
            if rendered is not None:
                self._kept.move_to_end(texts)
        if rendered is None:
            prompt: Any = self._llm.render_chat(messages)
            with self._lock:
                self._kept[texts] = {name: value for name, value in prompt.items() if name != "multi_modal_data"}
                if len(self._kept) > CAPACITY:
                    self._kept.popitem(last=False)
            return prompt
        return {**rendered, "multi_modal_data": {"image": images} if images else {}}


def _apart(messages: Any) -> tuple[Hashable | None, list[Any]]:
    """The texts of a conversation, with None in the place of each image, and the images.

    None for one that holds anything else, or too much text to be kept.
    """
    texts, images, length = [], [], 0
    if not isinstance(messages, list | tuple):
        return None, images
    for message in messages:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            return None, images
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(message["role"], str) or not isinstance(parts, list | tuple):
            return None, images
        found: list[str | None] = []
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and set(part) == {"type", "text"} and isinstance(part["text"], str):
                found.append(part["text"])
                length += len(part["text"])
            elif kind == "image" and set(part) == {"type", "image"}:
                found.append(None)
                images.append(part["image"])
            else:
                return None, images
        texts.append((message["role"], tuple(found)))
    return (tuple(texts) if length <= LONGEST else None), images
