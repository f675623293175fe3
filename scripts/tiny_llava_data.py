"""What the shipped model learns from: pictures, questions about them, and batches of token sequences.

Pictures are easy-vqa's (64x64, one coloured shape each) and scikit-learn's handwritten digits (8x8, grey). Both are
split here by picture, once: "train", "validation" and "test". The tests are easy-vqa's official one and every fifth
digit; validation is every twentieth picture of what is left. (Digits of one hand may stand on both sides of that.)
"""

import dataclasses
import functools
import re
from collections import defaultdict

import numpy as np
from PIL import Image

IMAGE_SIZE = 48
"""Pixels a side that the model sees."""
CANVAS = 64
"""Pixels a side on which pictures are varied: easy-vqa's own size."""
COLORS = ("black", "gray", "red", "green", "blue", "yellow", "brown", "teal")
SHAPES = ("rectangle", "circle", "triangle")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A picture and what is known of it; ``color`` and ``shape`` are None where no question tells them.

    Attributes:
      pixels: uint8, ``[64, 64, 3]`` for a shape, ``[8, 8]`` (ink is bright) for a digit.
      asked: the data set's own questions and answers.
    """

    pixels: np.ndarray
    color: str | None = None
    shape: str | None = None
    digit: int | None = None
    asked: tuple[tuple[str, str], ...] = ()

    def image(self) -> Image.Image:
        """The picture as a user would hand it over."""
        return Image.fromarray(self.pixels)


# --- data sets ---------------------------------------------------------------------------------------------------


def load_shapes(split: str) -> list[Picture]:
    """Pictures of easy-vqa: "train", "validation" (every twentieth picture of its train split) or "test"."""
    import easy_vqa

    official = "test" if split == "test" else "train"
    paths = getattr(easy_vqa, f"get_{official}_image_paths")()
    asked = defaultdict(list)
    for question, answer, key in zip(*getattr(easy_vqa, f"get_{official}_questions")(), strict=True):
        asked[key].append((question, answer))
    keys = sorted(paths) if split == "test" else [k for k in sorted(paths) if (k % 20 == 0) == (split == "validation")]
    return [
        Picture(
            pixels=np.asarray(Image.open(paths[key]).convert("RGB")),
            color=_told(asked[key], COLORS),
            shape=_told(asked[key], SHAPES),
            asked=tuple(asked[key]),
        )
        for key in keys
    ]


def _told(asked: list[tuple[str, str]], values: tuple[str, ...]) -> str | None:
    """The one value that the questions and answers about a picture give away, if any does."""
    found = set()
    for question, answer in asked:
        words = re.findall("[a-z]+", question)
        denied = "no" in words or "not" in words
        if answer in values:
            found.add(answer)
        if answer not in ("yes", "no") or (answer == "yes") != denied:
            found.update(word for word in words if word in values)
    if len(found) > 1:
        raise ValueError(f"questions disagree: {sorted(found)} in {asked}")
    return found.pop() if found else None


def load_digits(split: str) -> list[Picture]:
    """scikit-learn's digits: "test" is every fifth, "validation" every twentieth, "train" the others."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    part = [{4: "test"}.get(i % 5, "validation" if i % 20 == 3 else "train") for i in range(len(bunch.target))]
    return [
        Picture(pixels=np.round(image * (255 / 16)).astype(np.uint8), digit=int(digit))
        for image, digit, of in zip(bunch.images, bunch.target, part, strict=True)
        if of == split
    ]


# --- questions ---------------------------------------------------------------------------------------------------

ASK_COLOR = ("what color is the shape?", "what is the color of the shape?")
ASK_COLOR_OF = ("what color is the {shape}?", "what is the color of the {shape}?")
ASK_SHAPE = ("what shape is in the image?", "what shape does the image contain?", "what shape is present?")
ASK_SHAPE_OF = ("what is the {color} shape?",)
IS_THERE = (
    "is there a {thing}?",
    "is there a {thing} in the image?",
    "does the image contain a {thing}?",
    "is a {thing} present?",
)
IS_THERE_NOT = (
    "is there not a {thing}?",
    "is there not a {thing} in the image?",
    "does the image not contain a {thing}?",
    "is no {thing} present?",
)
ASK_DIGIT = ("which digit is this?", "what digit is this?", "what digit is shown?", "which digit is shown?")
DESCRIBE = ("describe the picture", "describe the image")

# The same in other words, so that the model is not bound to the data set's sentences.
FREE_COLOR = (
    "what color is it?",
    "what color is this?",
    "which color is it?",
    "which color is the shape?",
    "which color does the shape have?",
    "what color does the shape have?",
    "what color do you see?",
    "what is the color?",
    "what is its color?",
    "what is the shape's color?",
    "what color is the shape in the image?",
    "what color is the object?",
    "what color is the figure?",
    "name the color of the shape",
    "tell me the color of the shape",
    "tell me the color",
    "name the color",
    "color?",
    "what color?",
    "which color is the {shape}?",
    "tell me the color of the {shape}",
    "what color is this {shape}?",
    "what color is the {shape} in the image?",
)
FREE_SHAPE = (
    "which shape is it?",
    "which shape is this?",
    "what shape is it?",
    "what shape is this?",
    "what shape is that?",
    "which shape is in the image?",
    "which shape is present?",
    "which shape is shown?",
    "which shape do you see?",
    "what shape do you see?",
    "what shape is shown?",
    "what shape is shown in the image?",
    "what shape is there?",
    "what shape is the object?",
    "what is the shape?",
    "what is the shape in the image?",
    "what kind of shape is it?",
    "what kind of shape is this?",
    "what type of shape is this?",
    "what figure is in the image?",
    "name the shape",
    "tell me the shape",
    "shape?",
    "what shape?",
    "what is the {color} thing?",
    "what is the {color} object?",
    "what shape is {color}?",
    "which shape is {color}?",
)
FREE_IS_THERE = (
    "is there any {thing}?",
    "is this a {thing}?",
    "is it a {thing}?",
    "do you see a {thing}?",
    "can you see a {thing}?",
    "does the image show a {thing}?",
    "does it contain a {thing}?",
    "is a {thing} in the image?",
    "is there a {thing} here?",
)
FREE_IS_COLOR = (
    "is it {any}?",
    "is the shape {any}?",
    "is the color {any}?",
    "is the {shape} {any}?",
    "is this {any}?",
)
FREE_DIGIT = (
    "which digit is it?",
    "what digit is it?",
    "what digit is in the image?",
    "which digit is in the image?",
    "which digit do you see?",
    "what digit do you see?",
    "what is the digit?",
    "what is this digit?",
    "what number is this?",
    "which number is this?",
    "what number is it?",
    "what number is shown?",
    "which number is shown?",
    "what number is in the image?",
    "which number is in the image?",
    "what number do you see?",
    "which digit is written here?",
    "what is written here?",
    "what number is written?",
    "what is the number?",
    "read the digit",
    "read the number",
    "name the digit",
    "tell me the digit",
    "digit?",
    "which digit?",
    "what digit?",
    "what number?",
)
FREE_IS_DIGIT = (
    "is this a {any}?",
    "is it a {any}?",
    "is this the digit {any}?",
    "is the digit a {any}?",
    "is there a {any}?",
    "is there a {any} in the image?",
)
FREE_DESCRIBE = (
    "describe this picture",
    "describe this image",
    "describe it",
    "describe",
    "describe what you see",
    "what is in the picture?",
    "what is in the image?",
    "what is in this picture?",
    "what's in the picture?",
    "what is this?",
    "what is it?",
    "what's this?",
    "what is that?",
    "what is shown?",
    "what is shown in the image?",
    "what do you see?",
    "what do you see in the image?",
    "what can you see?",
    "what does the picture show?",
    "what does the image show?",
    "what does the image contain?",
    "what is there?",
    "tell me about the picture",
    "caption this picture",
    "write a caption",
)
ONE_WORD = " Answer the question using a single word or phrase."
NO_PICTURE = "please show me a picture"
SMALL_TALK = (
    ("hello", "hello"),
    ("hi", "hello"),
    ("hello!", "hello"),
    ("who are you?", "a tiny LLaVA"),
    ("what are you?", "a tiny LLaVA"),
    ("thank you", "you are welcome"),
    ("thanks", "you are welcome"),
)
EVERY_QUESTION_FORM = (
    *ASK_COLOR, *ASK_COLOR_OF, *ASK_SHAPE, *ASK_SHAPE_OF, *IS_THERE, *IS_THERE_NOT, *ASK_DIGIT, *DESCRIBE,
    *FREE_COLOR, *FREE_SHAPE, *FREE_IS_THERE, *FREE_IS_COLOR, *FREE_DIGIT, *FREE_IS_DIGIT, *FREE_DESCRIBE,
)  # fmt: skip


def describe(picture: Picture) -> str:
    """A short description; the picture's colour and shape, or its digit, must be known."""
    return f"the digit {picture.digit}" if picture.digit is not None else f"a {picture.color} {picture.shape}"


NEGATED = 0.4
"""Share of the questions about what is there that ask whether it is not there."""


def ask(picture: Picture, rng: np.random.Generator, *, free: float = 0.4, negated: float = NEGATED) -> tuple[str, str]:
    """A random question about ``picture`` and its answer; the share ``free`` is in words of other than the data."""
    loose = rng.random() < free
    if picture.digit is not None:
        question, answer = _ask_digit(picture, rng, loose)
    elif picture.color is None or picture.shape is None:
        question, answer = _pick(rng, picture.asked)
    else:
        question, answer = _ask_shape(picture, rng, loose, negated)
    return (reword(question, rng) if loose else question), answer


def ask_whether(picture: Picture, rng: np.random.Generator) -> tuple[str, str]:
    """Whether one thing is there, in plain words: the color or the shape; half of the answers are yes."""
    name, value, values = ("color", picture.color, COLORS) if rng.random() < 0.5 else ("shape", picture.shape, SHAPES)
    asked = value if rng.random() < 0.5 else _pick(rng, [v for v in values if v != value])
    thing = f"{asked} shape" if name == "color" else asked
    return _pick(rng, IS_THERE).format(thing=thing), _yes(asked == value)


def _ask_shape(picture: Picture, rng: np.random.Generator, loose: bool, negated: float) -> tuple[str, str]:
    color, shape = picture.color, picture.shape
    topic = rng.choice(["color", "shape", "there", "describe"], p=[0.25, 0.25, 0.4, 0.1])
    if topic == "color":
        return _pick(rng, FREE_COLOR if loose else ASK_COLOR + ASK_COLOR_OF).format(shape=shape), color
    if topic == "shape":
        return _pick(rng, FREE_SHAPE if loose else ASK_SHAPE + ASK_SHAPE_OF).format(color=color), shape
    if topic == "describe":
        return _pick(rng, FREE_DESCRIBE if loose else DESCRIBE), describe(picture)
    # Half of these hold; where they don't, one or both words are wrong.
    other_color = color if rng.random() < 0.5 else _pick(rng, [c for c in COLORS if c != color])
    other_shape = shape if rng.random() < 0.5 else _pick(rng, [s for s in SHAPES if s != shape])
    kind = int(rng.integers(4 if loose else 2))
    if kind == 3:
        question = _pick(rng, FREE_IS_COLOR).format(any=other_color, shape=shape)
        return question, _yes(other_color == color)
    thing, holds = (
        (f"{other_color} shape", other_color == color),
        (other_shape, other_shape == shape),
        (f"{other_color} {other_shape}", other_color == color and other_shape == shape),
    )[kind]
    if rng.random() < negated:
        return _pick(rng, IS_THERE_NOT).format(thing=thing), _yes(not holds)
    forms = IS_THERE + FREE_IS_THERE if loose else IS_THERE
    return _pick(rng, forms).format(thing=thing), _yes(holds)


def _ask_digit(picture: Picture, rng: np.random.Generator, loose: bool) -> tuple[str, str]:
    topic = rng.choice(["digit", "is", "describe"], p=[0.7, 0.15, 0.15])
    if topic == "digit":
        return _pick(rng, FREE_DIGIT if loose else ASK_DIGIT), str(picture.digit)
    if topic == "describe":
        return _pick(rng, FREE_DESCRIBE if loose else DESCRIBE), describe(picture)
    other = picture.digit if rng.random() < 0.5 else int((picture.digit + rng.integers(1, 10)) % 10)
    return _pick(rng, FREE_IS_DIGIT).format(any=other), _yes(other == picture.digit)


def ask_about_two(pictures: tuple[Picture, Picture], rng: np.random.Generator) -> tuple[str, str]:
    """A question about the first or second of two pictures, or about both."""
    if rng.random() < 0.3:
        question = _pick(rng, ("describe the pictures", "what is in the pictures?", "what do you see?"))
        return _swap_words(question, rng), " and ".join(describe(p) for p in pictures)
    which = int(rng.integers(2))
    place, picture = ("first", "second")[which], pictures[which]
    if picture.digit is not None:
        forms = (
            ("which digit is in the {place} picture?", str(picture.digit)),
            ("what digit is shown in the {place} picture?", str(picture.digit)),
            ("what is in the {place} picture?", describe(picture)),
            ("describe the {place} picture", describe(picture)),
        )
    else:
        forms = (
            ("what color is the shape in the {place} picture?", picture.color),
            ("what shape is in the {place} picture?", picture.shape),
            ("what is in the {place} picture?", describe(picture)),
            ("describe the {place} picture", describe(picture)),
        )
    question, answer = _pick(rng, forms)
    return _swap_words(question.format(place=place), rng), answer


def reword(question: str, rng: np.random.Generator) -> str:
    """The same question as other people type it: case, spelling, punctuation."""
    question = _swap_words(question, rng)
    if rng.random() < 0.3:
        question = question.removesuffix("?")
    elif rng.random() < 0.1:
        question = question.replace("?", " ?") if question.endswith("?") else question + "."
    if rng.random() < 0.05:
        question = "please " + question
    style = rng.random()
    if style < 0.5:
        question = question[0].upper() + question[1:]
    elif style < 0.55:
        question = question.upper()
    if rng.random() < 0.05 and "escribe" not in question:
        question += ONE_WORD
    return question


def _swap_words(question: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.25:
        question = question.replace("color", "colour")
    if rng.random() < 0.3:
        question = question.replace("gray", "grey")
    noun = rng.random()
    if noun < 0.3:
        question = question.replace("image", "picture")
    elif noun < 0.4:
        question = question.replace("image", "photo").replace("picture", "photo")
    elif noun < 0.5:
        question = question.replace("picture", "image")
    return question


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


# --- pixels ------------------------------------------------------------------------------------------------------


def augment(picture: Picture, rng: np.random.Generator, ease: float = 0.0) -> np.ndarray:
    """A random view of a picture that leaves every answer true: uint8 ``[48, 48, 3]``.

    The share ``ease`` of digits is left as it is: a network that has seen no digit yet learns nothing for long
    from digits in all inks and places.
    """
    if picture.digit is not None and rng.random() < ease:
        return plain(picture)
    pixels = _augment_shape(picture.pixels, rng) if picture.digit is None else _augment_digit(picture.pixels, rng)
    resized = Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized).astype(np.float32)
    if rng.random() < 0.3:
        pixels *= rng.uniform(0.88, 1.06)
    if rng.random() < 0.3:
        pixels += rng.normal(0, rng.uniform(1, 8), pixels.shape)
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


_FILTERS = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def _augment_shape(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn, mirror, scale and move the shape; it stays inside the picture and large enough to be told."""
    if rng.random() < 0.15:
        return pixels
    pixels = np.rot90(pixels, int(rng.integers(4))) if rng.random() < 0.3 else pixels
    pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
    ground = np.median(pixels, axis=(0, 1))
    shape = np.abs(pixels - ground).sum(axis=-1) > 30  # bright backgrounds: even yellow is this far off
    rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
    if len(rows) == 0 or shape.mean() > 0.45:
        return pixels
    if rng.random() < 0.3:
        new = rng.uniform(185, 255, 3) if rng.random() < 0.5 else np.full(3, rng.uniform(200, 255))
        pixels = np.where(shape[..., None], pixels, np.round(new)).astype(np.uint8)
        ground = np.round(new)
    size = max(np.ptp(rows), np.ptp(columns)) + 1
    angle = np.deg2rad(rng.uniform(-15, 15)) if rng.random() < 0.3 else 0.0
    scale = float(np.clip(rng.uniform(0.7, 1.5), 9 / size, 44 / size)) if rng.random() < 0.6 else 1.0
    half = 0.5 * scale * (np.ptp(columns) + 1), 0.5 * scale * (np.ptp(rows) + 1)
    turned = [abs(np.cos(angle)) * half[i] + abs(np.sin(angle)) * half[1 - i] + 0.5 for i in (0, 1)]
    target = [rng.uniform(min(t, 32), max(64 - t, 32)) for t in turned]
    if angle == 0.0 and scale == 1.0:  # whole pixels keep the edges as sharp as the data set's
        target = [np.round(t - h) + h for t, h in zip(target, half, strict=True)]
    center = columns.mean() + 0.5, rows.mean() + 0.5
    return _affine(pixels, center, target, scale, angle, tuple(int(g) for g in ground), _pick(rng, _FILTERS))


def _affine(pixels, center, target, scale, angle, fill, resample) -> np.ndarray:
    """Move ``center`` (x, y) to ``target``, scaled and turned about it."""
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    matrix = (
        cos, sin, center[0] - cos * target[0] - sin * target[1],
        -sin, cos, center[1] + sin * target[0] - cos * target[1],
    )  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.transform((CANVAS, CANVAS), Image.Transform.AFFINE, matrix, resample, fillcolor=fill))


def _augment_digit(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Enlarge, bend a little, and ink in any two colours that stand apart."""
    resample = _pick(rng, (*_FILTERS, Image.Resampling.BICUBIC, Image.Resampling.BICUBIC))
    large = np.asarray(Image.fromarray(pixels).resize((CANVAS, CANVAS), resample))
    if rng.random() < 0.8:
        target = 32 + rng.uniform(-5, 5, 2)
        scale, angle = rng.uniform(0.75, 1.12), np.deg2rad(rng.uniform(-13, 13))
        large = _affine(large, (32.0, 32.0), target, scale, angle, 0, Image.Resampling.BILINEAR)
    ink = large[..., None].astype(np.float32) / 255
    if rng.random() < 0.2:
        ink = ink ** rng.uniform(0.6, 1.5)
    style = rng.random()
    if style < 0.55:
        dark, bright = np.zeros(3), np.full(3, 255.0)
    elif style < 0.8:
        dark, bright = np.full(3, 255.0), np.zeros(3)
    else:
        dark, bright = rng.uniform(0, 255, 3), rng.uniform(0, 255, 3)
        while np.abs(dark - bright).sum() < 250:
            bright = rng.uniform(0, 255, 3)
    return np.round(dark + ink * (bright - dark)).astype(np.uint8)


def plain(picture: Picture, *, inverted: bool = False) -> np.ndarray:
    """The picture as the image processor will make it, before normalisation: uint8 ``[48, 48, 3]``."""
    image = Image.fromarray(255 - picture.pixels if inverted else picture.pixels).convert("RGB")
    return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def normalize(pixels: np.ndarray) -> np.ndarray:
    """uint8 ``[..., 48, 48, 3]`` to float32 ``[..., 3, 48, 48]`` in [-1, 1]."""
    return np.moveaxis(pixels.astype(np.float32) / np.float32(127.5) - np.float32(1), -1, -3)


# --- sequences ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """Conversations to token ids, in the form of the chat template.

    Attributes:
      tokenizer: a `tokenizers.Tokenizer` that adds no tokens of its own.
      image_tokens: tokens that one picture takes.
    """

    tokenizer: object
    image_tokens: int

    def __post_init__(self):
        object.__setattr__(self, "pieces", functools.lru_cache(maxsize=200_000)(self._piece))

    def _piece(self, text: str) -> tuple[int, ...]:
        image = self.tokenizer.token_to_id("<image>")
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return tuple(j for i in ids for j in ([i] * self.image_tokens if i == image else [i]))

    def sequence(self, turns, *, bos: bool = True) -> tuple[list[int], list[bool]]:
        """Token ids of ``(user's text, answer)`` turns, and which of them the model has to say."""
        ids = list(self.pieces("<s>")) if bos else []
        said = [False] * len(ids)
        for text, answer in turns:
            prompt, reply = self.pieces(f"USER: {text} ASSISTANT:"), self.pieces(f" {answer}</s>")
            ids += prompt + reply
            said += [False] * len(prompt) + [True] * len(reply)
        return ids, said


def batch_arrays(encoder: Encoder, conversations, length: int) -> tuple[np.ndarray, np.ndarray]:
    """``(ids, said)``, both ``[B, length]``, of conversations that fit; padded at the end."""
    pad = encoder.tokenizer.token_to_id("<pad>")
    ids = np.full((len(conversations), length), pad, np.int32)
    said = np.zeros((len(conversations), length), bool)
    for row, (tokens, spoken) in enumerate(conversations):
        ids[row, : len(tokens)], said[row, : len(tokens)] = tokens, spoken
    return ids, said


def conversation(encoder: Encoder, pictures, length: int, rng: np.random.Generator, turns: int, ask_one=ask):
    """A random conversation of up to ``turns`` turns about one or two pictures (or none), within ``length`` tokens.

    ``ask_one(picture, rng)`` makes a question about one picture.
    """
    for _ in range(20):  # a long question, in capitals say, may not fit alone
        if (best := _conversation(encoder, pictures, length, rng, turns, ask_one)) is not None:
            return best
    raise ValueError(f"no turn about {len(pictures)} pictures fits in {length} tokens")


def _conversation(encoder: Encoder, pictures, length: int, rng: np.random.Generator, turns: int, ask_one):
    head, taken = "<image>\n" * len(pictures), []
    bos = rng.random() < 0.85  # chat renderers differ in whether they begin with <s>
    best = None
    for number in range(turns):
        if len(pictures) == 2:
            question, answer = ask_about_two(pictures, rng)
        elif pictures:
            question, answer = ask_one(pictures[0], rng)
        else:
            question, answer = _ask_nothing(rng)
        if number == 0 and pictures:
            last = len(pictures) == 1 and rng.random() < 0.06
            question = f"{question}\n<image>" if last else head + question
        taken.append((question, answer))
        tokens, said = encoder.sequence(taken, bos=bos)
        if len(tokens) > length:
            break
        best = tokens, said
    return best


def _ask_nothing(rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < 0.3:
        question, answer = _pick(rng, SMALL_TALK)
        return (question[0].upper() + question[1:] if rng.random() < 0.5 else question), answer
    words = {"thing": _pick(rng, COLORS) + " " + _pick(rng, SHAPES), "any": _pick(rng, COLORS)}
    words |= {"color": _pick(rng, COLORS), "shape": _pick(rng, SHAPES)}
    return reword(_pick(rng, EVERY_QUESTION_FORM).format(**words), rng), NO_PICTURE
