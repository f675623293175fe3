"""Train the small LLaVA-1.5 that ships with the package, in JAX, on two CPU cores.

    python scripts/train_tiny_llava.py --minutes 40 --output aphrodite_jax/assets/tiny_llava

Needs the extra ``test`` (easy-vqa and scikit-learn bring the data). The run saves itself every minute under
``--run``; started again after any kind of end, it goes on from there (``--fresh`` begins anew). The learning rate
follows the share of ``--minutes`` that is spent, so that a slow machine takes fewer steps and not longer.

Three stages, and what keeps each from standing still:

- The vision tower learns alone what each picture is. The patch embedding starts as a whitening of the pictures'
  patches, positions start as waves, and the tower's loss is read from features that are normalised over the batch.
- The language model learns to say whether one thing is there. That is to compare a word with a picture, so the
  rows of a picture are drawn to the embeddings of the words that are true of it, input and output embeddings are one,
  and half of the attention heads start by attending to what is alike.
- All of it learns to answer everything; questions with "not" come in slowly.

What is saved is a running mean of the weights. Pictures are split in `tiny_llava_data`; the test splits are not
read here.
"""

import argparse
import json
import math
import os
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_llava_data as data
import tiny_llava_files as files
from flax import nnx

from aphrodite_jax.modeling.layers.attention import AttentionMetadata
from aphrodite_jax.modeling.loader import save_pretrained
from aphrodite_jax.modeling.models.llava import LlavaForConditionalGeneration
from kernels_pallas.intervals import RowIntervals, causal

STAGES = {"tower": 0.15, "whether": 0.21, "answers": 1.0}  # share of the time at which each ends
NOT_STEPS = 600  # of the last stage, in which the share of questions with "not" grows
PEAK_RATE = 1.5e-3
WARM_UP = 200  # steps
TOWER_BATCH, WHETHER_BATCH = 32, 16  # pictures
DIGIT_SHARE = 0.35
EASE = (300, 2000, 0.3)  # all digits are plain for so many steps, then fewer over so many, down to this share
SAVE_SECONDS = 60
AUXILIARY = 0.2  # weight of the tower's own loss once answers are learnt
ALIGNMENT = 0.3  # weight of drawing rows to words
SHARPNESS = 10.0  # of the cosines between rows and words
CLASSES = {"color": data.COLORS, "shape": data.SHAPES, "digit": tuple("0123456789")}
# Kinds of batches: share, sequences, pictures in each, tokens, turns at most.
BATCHES = {
    "talk": (0.60, 24, 1, 104, 8),
    "question": (0.25, 32, 1, 72, 2),
    "two pictures": (0.10, 16, 2, 152, 4),
    "no picture": (0.05, 32, 0, 48, 3),
}


# --- the objective -----------------------------------------------------------------------------------------------


def encode(model, pixels):
    """Projected rows ``[B, pictures, rows, D]`` of pixels ``[B, pictures, 3, 64, 64]``."""
    rows = model.embed_multimodal(pixel_values=pixels.reshape(-1, *pixels.shape[2:]))["image"]
    return rows.reshape(*pixels.shape[:2], *rows.shape[1:])


def answer_logits(model, ids, rows):
    """Logits ``[B, T, V]`` for token ids ``[B, T]`` and, where there are pictures, their rows."""
    length = ids.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)
    metadata = AttentionMetadata(intervals={"full": RowIntervals(*map(jnp.asarray, causal(length)))})

    def one(ids, rows):
        embeds = None if rows is None else rows
        hidden, _ = model(ids, positions, None, metadata, image_embeds=embeds)
        return model.compute_logits(hidden)

    return jax.vmap(one)(ids, rows)


def tower_loss(heads, rows, labels):
    """Cross entropy of linear probes on what the rows of each picture have in common; a label of -1 is unknown."""
    rows = rows.reshape(len(rows), -1, rows.shape[-1])
    pooled = jnp.concatenate([rows.mean(axis=1), rows.max(axis=1)], axis=-1)
    pooled, total = (pooled - pooled.mean(axis=0)[None]) / (pooled.std(axis=0)[None] + 1e-3), 0.0
    for name, head in heads.items():
        known = labels[name] >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(pooled @ head, jnp.maximum(labels[name], 0))
        total += jnp.sum(jnp.where(known, losses, 0)) / len(known)
    return total


def word_loss(embeddings, rows, labels):
    """Cross entropy of the words that are true of a picture, by the cosines between their embeddings and its rows.

    ``embeddings`` has ``[words, D]`` for each kind of label.
    """
    rows = _unit(rows.reshape(len(rows), -1, rows.shape[-1]))
    total = 0.0
    for name, words in embeddings.items():
        cosines = rows @ _unit(words).T
        logits = jax.nn.logsumexp(SHARPNESS * cosines, axis=1)  # one row that says it is enough
        known = labels[name] >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels[name], 0))
        total += jnp.sum(jnp.where(known, losses, 0)) / len(known)
    return total


def _unit(x):
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)


def answer_loss(model, ids, said, rows):
    """Mean cross entropy of the tokens that the model has to say."""
    logits = answer_logits(model, ids, rows)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    return jnp.sum(jnp.where(said[:, 1:], losses, 0)) / jnp.sum(said[:, 1:])


def optimizer() -> optax.GradientTransformation:
    """AdamW without its learning rate, which each step is given."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.98),
        optax.add_decayed_weights(0.05, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
    )


def make_steps(graph, encoder: data.Encoder):
    """The two jitted functions of the run: a training step, and the greedy choice at each position."""
    words = {name: jnp.array([encoder.pieces(f" {word}")[0] for word in names]) for name, names in CLASSES.items()}

    @partial(jax.jit, donate_argnums=0)
    def step(state, batch, rate, decay):
        def loss(trained):
            model = nnx.merge(graph, trained["model"])
            rows = encode(model, batch["pixels"]) if "pixels" in batch else None
            total = 0.0
            if "labels" in batch:
                total += (AUXILIARY if "ids" in batch else 1.0) * tower_loss(trained["heads"], rows, batch["labels"])
                table = model.language_model.model.embed_tokens.embedding[...]
                total += ALIGNMENT * word_loss({n: table[ids] for n, ids in words.items()}, rows, batch["labels"])
            if "ids" in batch:
                total += answer_loss(model, batch["ids"], batch["said"], rows)
            return total

        value, gradient = jax.value_and_grad(loss)(state["trained"])
        updates, adam = optimizer().update(gradient, state["adam"], state["trained"])
        trained = jax.tree.map(lambda p, u: p - rate * u, state["trained"], updates)
        mean = jax.tree.map(lambda m, p: decay * m + (1 - decay) * p, state["mean"], trained["model"])
        return {"trained": trained, "adam": adam, "mean": mean}, value

    @jax.jit
    def choose(params, ids, pixels):
        model = nnx.merge(graph, params)
        return answer_logits(model, ids, encode(model, pixels)).argmax(axis=-1)

    return step, choose


# --- batches -----------------------------------------------------------------------------------------------------


class Batches:
    """Random batches; the one of a step depends on the seed and the step's number alone."""

    def __init__(self, encoder: data.Encoder, seed: int):
        self.encoder, self.seed = encoder, seed
        self.shapes, self.digits = data.load_shapes("train"), data.load_digits("train")
        self.known_shapes = [p for p in self.shapes if p.color and p.shape]

    def tower(self, number: int) -> dict:
        """Pictures and what they are."""
        rng = np.random.default_rng((self.seed, abs(number), number < 0))
        pictures = [[self._picture(rng, self.shapes)] for _ in range(TOWER_BATCH)]
        return _pixels_and_labels(pictures, rng, _ease(number))

    def whether(self, number: int) -> dict:
        """Conversations about whether one thing is there."""
        rng = np.random.default_rng((self.seed, abs(number), number < 0))
        pictures = [[self.known_shapes[int(rng.integers(len(self.known_shapes)))]] for _ in range(WHETHER_BATCH)]
        return self._talk(rng, pictures, BATCHES["talk"][3], lambda: 8, number, data.ask_whether)

    def answers(self, number: int, negated: float) -> dict:
        """Conversations of one kind about pictures of any."""
        rng = np.random.default_rng((self.seed, abs(number), number < 0))
        kinds = list(BATCHES.values())
        _, size, per_sequence, length, most = kinds[int(rng.choice(len(kinds), p=[kind[0] for kind in kinds]))]
        source = self.shapes if per_sequence == 1 else self.known_shapes
        pictures = [[self._picture(rng, source) for _ in range(per_sequence)] for _ in range(size)]
        turns = (lambda: most) if most > 4 else (lambda: int(rng.integers(most)) + 1)
        return self._talk(rng, pictures, length, turns, number, partial(data.ask, negated=negated))

    def _talk(self, rng, pictures, length, turns, number, ask) -> dict:
        talks = [data.conversation(self.encoder, group, length, rng, turns(), ask) for group in pictures]
        ids, said = data.batch_arrays(self.encoder, talks, length)
        batch = {"ids": ids, "said": said}
        return batch | _pixels_and_labels(pictures, rng, _ease(number)) if pictures[0] else batch

    def _picture(self, rng, shapes) -> data.Picture:
        source = self.digits if rng.random() < DIGIT_SHARE else shapes
        return source[int(rng.integers(len(source)))]


def _ease(number: int) -> float:
    begin, length, least = EASE
    return max(least, min(1.0, 1 - (number - begin) / length))


def _pixels_and_labels(pictures, rng, ease) -> dict:
    pixels = np.stack([np.stack([data.augment(p, rng, ease) for p in group]) for group in pictures])
    batch = {"pixels": data.normalize(pixels)}
    if len(pictures[0]) == 1:
        first = [group[0] for group in pictures]
        labels = {
            "color": [data.COLORS.index(p.color) if p.color else -1 for p in first],
            "shape": [data.SHAPES.index(p.shape) if p.shape else -1 for p in first],
            "digit": [-1 if p.digit is None else p.digit for p in first],
        }
        batch["labels"] = {name: np.array(values, np.int32) for name, values in labels.items()}
    return batch


# --- where training starts ---------------------------------------------------------------------------------------


def initialize(model, pixels: np.ndarray) -> None:
    """Start patches as white noise, positions as waves, keys as queries, from example ``pixels [n, 3, 48, 48]``.

    The kernel's rows are the principal components of the patches, scaled to one variance and turned at random, so
    that an edge counts as much as the background; the first positions take away the mean patch.
    """
    embeddings = model.vision_tower.vision_model.embeddings
    n, channels, size, _ = pixels.shape
    patch, width = files.PATCH_SIZE, model.config.vision_config.hidden_size
    grid = size // patch
    patches = pixels.reshape(n, channels, grid, patch, grid, patch).transpose(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(-1, channels * patch * patch)
    variances, components = np.linalg.eigh(np.cov(patches.T))
    variances, components = variances[::-1][:width], components[:, ::-1][:, :width]
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))
    kernel = (components / np.sqrt(variances + 1e-4 * variances[0])) @ turn  # [channels * patch * patch, width]
    waves = _waves(grid, width // 2)
    positions = np.concatenate([np.repeat(waves, grid, axis=0), np.tile(waves, (grid, 1))], axis=1) / 2
    positions = np.concatenate([np.zeros((1, width)), positions - patches.mean(axis=0) @ kernel])
    nnx.update(embeddings.patch_embedding, {"kernel": jnp.asarray(kernel, jnp.float32)})
    nnx.update(embeddings.position_embedding, {"embedding": jnp.asarray(positions, jnp.float32)})
    for layer in model.language_model.model.layers:
        _attend_to_alike(layer.self_attn)


def _attend_to_alike(attention) -> None:
    """The keys of each group of heads start as the queries of its first."""
    width, head_dim = attention.q_proj.kernel.shape[0], attention.head_dim
    queries = attention.q_proj.kernel[...].reshape(width, -1, head_dim)
    keys = attention.k_proj.kernel.shape[1] // head_dim
    nnx.update(attention.k_proj, {"kernel": queries[:, :: queries.shape[1] // keys].reshape(width, -1)})


def _waves(length: int, width: int) -> np.ndarray:
    """Sines and cosines ``[length, width]`` of up to two periods."""
    angles = np.arange(length)[:, None] * (4 * np.pi / length) * 20.0 ** -(np.arange(width // 2) / (width // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


# --- measuring ---------------------------------------------------------------------------------------------------


def exact_match(choose, params, encoder: data.Encoder, pixels, asked, size: int = 64, length: int = 96) -> float:
    """Share of ``(picture's index, question, answer)`` that are answered right, word for word and to the end.

    A greedy answer equals the true one exactly where each true token is the first choice after those before it.
    """
    talks = [encoder.sequence([("<image>\n" + question, answer)]) for _, question, answer in asked]
    ids, said = data.batch_arrays(encoder, talks, length)
    right = 0
    for start in range(0, len(asked), size):
        rows = np.minimum(np.arange(start, start + size), len(asked) - 1)
        images = data.normalize(pixels[[asked[row][0] for row in rows]])[:, None]
        hits = (np.asarray(choose(params, ids[rows], images))[:, :-1] == ids[rows, 1:]) | ~said[rows, 1:]
        right += int(hits.all(axis=1)[: len(asked) - start].sum())
    return right / len(asked)


def validate(choose, params, encoder: data.Encoder) -> dict[str, float]:
    """Exact match on the validation pictures: the data set's questions, digits both ways, descriptions."""
    shapes, digits = data.load_shapes("validation"), data.load_digits("validation")
    shape_pixels = np.stack([data.plain(p) for p in shapes])
    digit_pixels = np.stack([data.plain(p, inverted=i) for i in (False, True) for p in digits])
    questions = [(i, q, a) for i, p in enumerate(shapes) for q, a in p.asked]
    described = [(i, "describe the picture", data.describe(p)) for i, p in enumerate(shapes) if p.color and p.shape]
    read = [(i, "which digit is this?", str(p.digit)) for i, p in enumerate(digits * 2)]
    match = partial(exact_match, choose, params, encoder)
    return {
        "easy-vqa": match(shape_pixels, questions),
        "descriptions": match(shape_pixels, described),
        "digits": match(digit_pixels, read),
    }


# --- the run -----------------------------------------------------------------------------------------------------


def save_run(path: Path, state, progress: dict) -> None:
    """Write the run's state so that a kill at any moment leaves the old file or the new one."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, progress=json.dumps(progress), **{str(i): leaf for i, leaf in enumerate(leaves)})
    os.replace(temporary, path)


def load_run(path: Path, state) -> tuple[dict, dict]:
    """The state and progress in ``path``; ``state`` gives the structure."""
    leaves, structure = jax.tree.flatten(state)
    with np.load(path) as stored:
        found = [stored[str(i)] for i in range(len(stored.files) - 1)]
        progress = json.loads(str(stored["progress"]))
    if [x.shape for x in found] != [x.shape for x in leaves]:
        raise SystemExit(f"{path} is of a model of another size; begin anew with --fresh, or give another --run")
    return jax.tree.unflatten(structure, [jnp.asarray(x) for x in found]), progress


def learning_rate(spent: float, step: int) -> float:
    """The rate after the share ``spent`` of the time: flat up to the last stage, then a cosine to zero."""
    warm = min(1.0, (step + 1) / WARM_UP)
    begin = STAGES["whether"]
    return PEAK_RATE * warm * 0.5 * (1 + math.cos(math.pi * max(0.0, spent - begin) / (1 - begin)))


def train(minutes: float, run: Path, seed: int, fresh: bool, validate_every: float):
    """Train to the end of ``minutes``; returns the model with the mean weights, its config, and the tokenizer."""
    run.mkdir(parents=True, exist_ok=True)
    tokenizer = files.train_tokenizer()
    encoder, config = files.make_encoder(tokenizer), files.make_config(tokenizer)
    model = LlavaForConditionalGeneration(config, dtype=jnp.float32, rngs=nnx.Rngs(seed))
    batches = Batches(encoder, seed)
    initialize(model, np.concatenate([batches.tower(-number)["pixels"][:, 0] for number in range(1, 25)]))
    graph, params = nnx.split(model)
    probes, width = nnx.Rngs(seed + 1), 2 * config.text_config.hidden_size
    heads = {name: 0.05 * jax.random.normal(probes.params(), (width, len(n))) for name, n in CLASSES.items()}
    trained = {"model": params, "heads": heads}
    state = {"trained": trained, "adam": optimizer().init(trained), "mean": jax.tree.map(jnp.copy, params)}
    progress = {"step": 0, "seconds": 0.0, "validated": 0.0, "answered": 0}
    checkpoint = run / "checkpoint.npz"
    if checkpoint.exists() and not fresh:
        state, progress = load_run(checkpoint, state)
        print(f"going on from step {progress['step']}, {progress['seconds'] / 60:.1f} minutes", flush=True)
    print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters", flush=True)

    step, choose = make_steps(graph, encoder)
    base, began, saved, losses = progress["seconds"], time.monotonic(), time.monotonic(), []
    pending = None
    while (spent := progress["seconds"] / (60 * minutes)) < 1:
        number = progress["step"]
        stage = next(name for name, end in STAGES.items() if spent < end)
        if stage == "answers":
            progress["answered"] += 1
            batch = batches.answers(number, data.NEGATED * min(1.0, progress["answered"] / NOT_STEPS))
        else:
            batch = getattr(batches, stage)(number)
        if pending is not None:
            losses.append(float(pending))  # waits: the batch above was made while the step ran
        decay = min(0.998, (number + 1) / (number + 10))
        state, pending = step(state, batch, learning_rate(spent, number), decay)
        progress |= {"step": number + 1, "seconds": base + time.monotonic() - began}
        if len(losses) == 50:
            print(
                f"step {number + 1}  {progress['seconds'] / 60:.1f} min  {stage}  loss {np.mean(losses):.4f}",
                flush=True,
            )
            losses.clear()
        if stage == "answers" and progress["seconds"] - progress["validated"] > 60 * validate_every:
            scores = validate(choose, state["mean"], encoder)
            print("validation", "  ".join(f"{k} {v:.4f}" for k, v in scores.items()), flush=True)
            progress["seconds"] = progress["validated"] = base + time.monotonic() - began
        if time.monotonic() - saved > SAVE_SECONDS:
            save_run(checkpoint, state, progress)
            saved = time.monotonic()
    save_run(checkpoint, state, progress)
    scores = validate(choose, state["mean"], encoder)
    print("validation", "  ".join(f"{k} {v:.4f}" for k, v in scores.items()), "at the end", flush=True)
    return nnx.merge(graph, state["mean"]), config, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=40, help="time to train in all, over all starts")
    parser.add_argument("--run", type=Path, default=Path("runs/tiny_llava"), help="where the run saves itself")
    parser.add_argument("--output", type=Path, help="where the model goes; <run>/model by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="begin anew even where a run could go on")
    parser.add_argument("--validate-every", type=float, default=5, metavar="MINUTES")
    args = parser.parse_args()
    model, config, tokenizer = train(args.minutes, args.run, args.seed, args.fresh, args.validate_every)
    output = args.output or args.run / "model"
    output.mkdir(parents=True, exist_ok=True)
    save_pretrained(model, config, output)
    files.write_processor_files(tokenizer, output)
    print(f"saved in {output}", flush=True)


if __name__ == "__main__":
    main()
