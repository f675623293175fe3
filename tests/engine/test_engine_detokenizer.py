import itertools

import hypothesis
import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from aphrodite_jax.engine.detokenizer import MAX_WINDOW, Detokenizer

WORDS = ("a", "b", "ab", "aa", "▁", "▁▁", "▁a", "▁ab", "b▁", "é", "€", "\n", "\ufffd", "a\ufffd", "ï¿½")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Whole characters, parts of them, and pieces that end one character and begin the next.
PIECES = ("ab", " a", "  ", "é", "€", "😀", "\ufffd", "a\ufffd", "<0x41>")
FRAGMENTS = (b"\xac\xe2\x82", b"\xe2\x82", b"\x82\xac", b"a\xf0\x9f", b"\x98\x80b", b"\xf0\x9f\x98", b"\x80\x80")


def byte_alphabet():
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def make(pieces, decoder, **options):
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, [], **options))
    backend.decoder = decoder
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<image>", special=False), AddedToken("é é", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_level():
    letters = byte_alphabet()
    pieces = [bytes([byte]) for byte in range(256)] + [piece.encode() for piece in PIECES] + list(FRAGMENTS)
    return make(["".join(letters[byte] for byte in piece) for piece in pieces], decoders.ByteLevel())


def fallback(*last):
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    return make([*BYTES, *WORDS], decoders.Sequence(steps), byte_fallback=True)


TOKENIZERS = {
    "byte level": byte_level(),
    "byte fallback": fallback(),
    "byte fallback and strip": fallback(decoders.Strip(" ", 1, 0)),
    "metaspace": make(WORDS, decoders.Metaspace()),
    "metaspace that never prepends": make(WORDS, decoders.Metaspace(prepend_scheme="never")),
    "word ends": make(["a", "b</w>", "ab</w>", "é"], decoders.BPEDecoder("</w>")),
    "word pieces": make(["a", "##b", "ab", "é", "."], decoders.WordPiece()),
}

settings = hypothesis.settings(deadline=None, max_examples=150)


@st.composite
def answers(draw):
    """A tokenizer's name, and tokens: any of them, specials and unknown ids too, some kinds more often."""
    name = draw(st.sampled_from(sorted(TOKENIZERS)))
    size = len(TOKENIZERS[name])
    kinds = [st.integers(0, size + 1), st.integers(size - 5, size + 1)]
    if "byte" in name:  # these vocabularies begin with the 256 bytes
        parts = st.sampled_from([*"ab \né€😀\ufffd".encode(), 0x80, 0xC0, 0xE0, 0xED, 0xF4, 0xFF])
        kinds += [st.integers(256, size - 1), parts, parts]
    long = draw(st.booleans())
    return name, draw(st.lists(st.one_of(kinds), min_size=40 if long else 0, max_size=90 if long else 20))


def decode(name, tokens, skip=True):
    return TOKENIZERS[name].decode(tokens, skip_special_tokens=skip)


@hypothesis.given(answers(), st.booleans())
@settings
def test_texts_grow_to_what_the_tokenizer_decodes_from_all_tokens(answer, skip):
    name, tokens = answer
    detokenizer = Detokenizer(TOKENIZERS[name], skip_special_tokens=skip, stop=())
    texts = []
    for token in tokens:
        assert detokenizer.append(token) is None
        texts.append(detokenizer.text)
    texts.append(detokenizer.finish())
    assert texts[-1] == detokenizer.finish() == detokenizer.text == decode(name, tokens, skip)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


@hypothesis.given(answers())
@settings
def test_a_text_stays_true_wherever_the_answer_ends(answer):
    name, tokens = answer
    detokenizer = Detokenizer(TOKENIZERS[name], skip_special_tokens=True, stop=())
    texts = []
    for i, token in enumerate(tokens):
        detokenizer.append(token)
        texts.append(detokenizer.text)
        whole = decode(name, tokens[: i + 1])
        assert all(whole.startswith(text) for text in texts)


@hypothesis.given(answers(), st.integers(1, 40))
@settings
def test_it_does_not_matter_when_the_text_is_asked_for(answer, every):
    name, tokens = answer
    detokenizer = Detokenizer(TOKENIZERS[name], skip_special_tokens=True, stop=())
    for i, token in enumerate(tokens, start=1):
        detokenizer.append(token)
        if i % every == 0:
            assert decode(name, tokens[:i]).startswith(detokenizer.text)
    assert detokenizer.finish() == decode(name, tokens)


@hypothesis.given(answers())
@settings
def test_nothing_waits_but_one_unfinished_character_or_a_run_of_bytes(answer):
    name, tokens = answer
    detokenizer = Detokenizer(TOKENIZERS[name], skip_special_tokens=True, stop=())
    for i, token in enumerate(tokens):
        detokenizer.append(token)
        whole = decode(name, tokens[: i + 1])
        if "fallback" not in name or token in range(256, len(TOKENIZERS[name]) - 4):
            assert detokenizer.text == whole[: len(whole) - whole.endswith("\ufffd")]


stop_strings = st.lists(st.text("ab é€\n😀", min_size=1, max_size=4), min_size=1, max_size=3)


@hypothesis.given(answers(), stop_strings)
@settings
def test_stop_strings_are_hit_at_once_and_never_shown(answer, stop):
    name, tokens = answer
    detokenizer = Detokenizer(TOKENIZERS[name], skip_special_tokens=True, stop=tuple(stop))
    texts = [""]
    for i, token in enumerate(tokens):
        hit = detokenizer.append(token)
        whole = decode(name, tokens[: i + 1])
        expected, text = first_stop(whole, stop)
        assert hit == expected
        texts.append(detokenizer.text)
        if hit is not None:
            assert detokenizer.finish() == texts[-1] == text
            break
    else:
        assert detokenizer.finish() == decode(name, tokens)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


def first_stop(text, stop):
    """Character by character: the stop string that is complete first, the longest of them."""
    for end in range(1, len(text) + 1):
        hits = [s for s in stop if text[:end].endswith(s)]
        if hits:
            hit = max(hits, key=len)
            return hit, text[: end - len(hit)]
    return None, text


@pytest.mark.parametrize(
    ("stop", "tokens", "shown", "hit", "final"),
    [
        (["\n\n"], ["ab", "<0x0A>", "<0x0A>"], "ab", "\n\n", "ab"),
        (["€"], ["ab", "<0xE2>", "<0x82>", "<0xAC>"], "ab", "€", "ab"),
        (["aab"], ["a", "a", "ab"], "", "aab", "a"),
        (["bbb"], ["aa", "b", "b"], "aa", None, "aabb"),
        (["b", "ab"], ["aa", "b"], "a", "ab", "a"),
        ([" "], ["▁a", "a"], "a", None, "aa"),
        (["a"], ["<0x20>", "<0x20>", "a"], "", "a", " "),
        (["a"], ["\ufffd", "<0x61>"], "", "a", "\ufffd"),
    ],
)
def test_stop_strings_by_example(stop, tokens, shown, hit, final):
    """``shown``: the text before the last token."""
    tokenizer = TOKENIZERS["byte fallback and strip"]
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True, stop=stop)
    *first, last = tokenizer.convert_tokens_to_ids(tokens)
    assert [detokenizer.append(token) for token in first] == [None] * len(first)
    assert detokenizer.text == shown
    assert detokenizer.append(last) == hit
    assert detokenizer.finish() == final


def test_a_character_is_shown_with_its_last_byte():
    tokenizer = TOKENIZERS["byte level"]
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True, stop=())
    shown = []
    for byte in "a€😀".encode():
        detokenizer.append(byte)
        shown.append(detokenizer.text)
    assert shown == ["a", "a", "a", "a€", "a€", "a€", "a€", "a€😀"]


def test_a_replacement_character_of_the_vocabulary_is_kept():
    for name in ("byte level", "byte fallback", "metaspace"):
        detokenizer = Detokenizer(TOKENIZERS[name], skip_special_tokens=True, stop=())
        token = next(i for i in range(len(TOKENIZERS[name])) if decode(name, [i]) == "a\ufffd")
        detokenizer.append(token)
        assert detokenizer.text == "a"
        detokenizer.append(token)
        assert detokenizer.text == "a\ufffda"
        assert detokenizer.finish() == "a\ufffda\ufffd"


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.most = self.total = 0

    def decode(self, tokens, **options):
        self.most = max(self.most, len(tokens))
        self.total += len(tokens)
        return self.tokenizer.decode(tokens, **options)

    def convert_ids_to_tokens(self, token):
        return self.tokenizer.convert_ids_to_tokens(token)


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("byte level", [256]),
        ("byte level", [0x80]),
        ("byte level", [0xE2]),
        ("byte level", [0xE2, 0x82, 256 + len(PIECES)]),  # every token ends within a character
        ("byte level", ["<s>"]),
        ("byte fallback and strip", ["▁"]),
        ("byte fallback and strip", ["\ufffd"]),
        ("byte fallback and strip", ["</s>", "ab"]),
        ("metaspace", ["▁"]),
    ],
)
def test_work_per_token_is_bounded(name, pieces):
    tokenizer = Counting(TOKENIZERS[name])
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True, stop=("xyz",))
    pieces = [p if isinstance(p, int) else TOKENIZERS[name].convert_tokens_to_ids(p) for p in pieces]
    tokens = (pieces * 1000)[:1000]
    for token in tokens:
        detokenizer.append(token)
    assert detokenizer.finish() == decode(name, tokens)
    assert tokenizer.most <= MAX_WINDOW + 1
    assert tokenizer.total <= 1000 * MAX_WINDOW


@pytest.mark.parametrize("byte", [0x0A, 0x80, 0xE2])
def test_a_long_run_of_bytes_is_decoded_once(byte):
    tokenizer = Counting(TOKENIZERS["byte fallback"])
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True, stop=("xyz",))
    tokens = [byte] * 1000 + [256] * 2
    for token in tokens:
        detokenizer.append(token)
    assert detokenizer.text == decode("byte fallback", tokens)
    assert tokenizer.total < 5000


def test_a_token_after_the_end_is_an_error():
    tokenizer = TOKENIZERS["metaspace"]
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True, stop=("a",))
    assert detokenizer.append(0) == "a"
    with pytest.raises(RuntimeError, match="after the end"):
        detokenizer.append(0)
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True, stop=())
    assert detokenizer.finish() == ""
    with pytest.raises(RuntimeError, match="after the end"):
        detokenizer.append(0)
