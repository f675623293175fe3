"""Tokens to text, one at a time, without decoding the answer again for each.

A window of the last tokens is decoded with and without the new one, and the text that came is appended. Two
kinds of decoders need care:

- byte-level: a token may end within a character, and its decoded text then ends in U+FFFD. That one character
  waits. UTF-8 needs four bytes at most, so a window of more tokens than that shows the end of the text rightly
  even where it starts within a character.
- byte fallback (tokens such as ``<0x0A>``): a run of byte tokens is text if all of it is UTF-8, and otherwise one
  U+FFFD for each byte. The text of a run waits until another token ends it.
"""

import codecs
from collections.abc import Sequence

__all__ = ["Detokenizer"]

REPLACEMENT = "\ufffd"
MIN_WINDOW = 8
"""Tokens kept when the window is cut: more than the bytes of a character."""
MAX_WINDOW = 24


class Detokenizer:
    """The text of one growing answer.

    At its end the text equals ``tokenizer.decode(tokens, skip_special_tokens=...,
    clean_up_tokenization_spaces=False)``, cut before the stop string that was hit. Where no stop string is looked for,
    tokens become text only when somebody asks for it: all at once, for an answer that nobody watches.

    Args:
      tokenizer: a fast tokenizer of transformers.
      stop: strings that end the answer. Of several, the one that is complete first counts, of those that end at
        the same character the longest: the text is the same however it falls into tokens.
    """

    def __init__(self, tokenizer, *, skip_special_tokens: bool, stop: Sequence[str]):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stop = tuple(stop)
        self._unread: list[int] = []
        self._window: list[int] = []
        self._decoded = ""  # the window's text, but for the byte run at its end
        self._sent = 0  # characters of it that went on to the text
        self._run: _ByteRun | None = None
        self._text = ""
        self._held = ""  # the end of the text so far, where a stop string may have begun
        self._ended = False

    @property
    def text(self) -> str:
        """What is sure not to change: no unfinished character, and while running no beginning of a stop string."""
        while self._unread:
            self._read(self._unread.pop(0))
        return self._text

    def append(self, token: int) -> str | None:
        """Take the next token; the stop string that its text completes, or None.

        Raises:
          RuntimeError: the answer has ended.
        """
        if self._ended:
            raise RuntimeError("a token came after the end of the answer")
        if not self._stop:
            self._unread.append(token)
            return None
        return self._read(token)

    def _read(self, token: int) -> str | None:
        byte = self._byte(token)
        if byte is not None:
            return self._append_byte(token, byte)
        decoded = self._decode([*self._window, token])
        maybe_skipped = decoded == self._decoded or self._run is not None
        if maybe_skipped and not self._decode([token, token]):  # twice: a first space may be stripped
            return None  # it has no text wherever it stands, and does not end a byte run
        self._window.append(token)
        self._decoded, self._run = decoded, None
        stop = self._send(len(decoded) - decoded.endswith(REPLACEMENT))
        if len(self._window) > MAX_WINDOW:
            waits = len(decoded) - self._sent
            self._window = self._window[-MIN_WINDOW:]
            self._decoded = self._decode(self._window)
            self._sent = len(self._decoded) - waits
        return stop

    def finish(self) -> str:
        """End the answer; its final text."""
        if not self._ended:
            if self._unread and not self._window and not self._text:
                self._window, self._unread = self._unread, []  # nothing was read yet
            _ = self.text
            self._ended = True
            self._text += self._held + self._decode(self._window)[self._sent :]
        return self._text

    def _append_byte(self, token: int, byte: int) -> str | None:
        """The text of a byte run is not sent, but looked through for stop strings: the answer may end with it."""
        if self._run is None:
            self._run = _ByteRun(self._held + self._decoded[self._sent :])
        self._window.append(token)
        text = self._run.decode(byte)
        if len(self._window) == 1 and text:
            text = self._decode(self._window)  # decoders may strip a space at the start of the text
        sure, self._run.held, stop = scan(self._run.held + text, self._stop)
        self._run.text += sure
        if stop is not None:
            self._end(self._run.text)
        return stop

    def _send(self, end: int) -> str | None:
        """Move the window's text up to ``end`` on."""
        new, self._sent = self._decoded[self._sent : end], end
        sure, self._held, stop = scan(self._held + new, self._stop)
        self._text += sure
        if stop is not None:
            self._end("")
        return stop

    def _end(self, rest: str) -> None:
        self._text += rest
        self._ended = True

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def _byte(self, token: int) -> int | None:
        """The byte that a byte-fallback token stands for; None for other tokens."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None or len(piece) != 6 or not (piece.startswith("<0x") and piece.endswith(">")):
            return None
        return int(piece[3:5], 16) if self._decode([token]) != piece else None


class _ByteRun:
    """Byte tokens in a row: the text they make as long as they are UTF-8, none from where they are not."""

    def __init__(self, held: str):
        self.text = ""
        self.held = held
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._valid = True

    def decode(self, byte: int) -> str:
        """Characters that the byte completes."""
        try:
            return self._utf8.decode(bytes([byte])) if self._valid else ""
        except UnicodeDecodeError:
            self._valid = False
            return ""


def scan(text: str, stop: Sequence[str]) -> tuple[str, str, str | None]:
    """Text in which no stop string can begin, the rest after it, and the stop string that is hit, if one is.

    At a hit the first part ends where the stop string begins, and the rest is empty.
    """
    hits = [(begin + len(s), begin, s) for s in stop if (begin := text.find(s)) >= 0]
    if hits:
        _, begin, hit = min(hits)
        return text[:begin], "", hit
    for begin in range(max(0, len(text) - max(map(len, stop), default=0) + 1), len(text)):
        if any(s.startswith(text[begin:]) for s in stop):
            return text[:begin], text[begin:], None
    return text, "", None
