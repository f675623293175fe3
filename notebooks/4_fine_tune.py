# %% [markdown]
# # Teach a new word
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/aphrodite-jax/aphrodite_jax/blob/main/notebooks/4_fine_tune.ipynb)
#
# The small LLaVA that comes with the package knows circles, triangles and rectangles. Here it learns to tell a **ring**: a shape that it never saw, and a word
# that its tokenizer has to spell. Low-rank updates of its matrices (LoRA) are trained for a minute on a CPU, by the same modules that answer afterwards.

# %%
import glob
import importlib.util
import shutil
import subprocess
import sys

if importlib.util.find_spec("aphrodite_jax") is None:
    has_tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")
    extras = ("tpu," if has_tpu else "cuda," if shutil.which("nvidia-smi") else "") + "notebooks"
    package = f"aphrodite-jax[{extras}] @ git+https://github.com/aphrodite-jax/aphrodite_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)

# %% [markdown]
# ## Pictures and questions
#
# One shape a picture, of any colour, size, place and turn, on a light ground; questions about it in several words. Pictures to learn from and pictures to test
# with are drawn from different seeds.

# %%
import numpy as np
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw

COLORS = ("black", "gray", "red", "green", "blue", "yellow", "brown", "teal")
NEW, OLD = "ring", ("circle", "triangle", "rectangle")
QUESTIONS = {
    "shape": (
        "what shape is in the image?",
        "what shape is present?",
        "what shape does the image contain?",
        "what is the shape?",
        "which shape do you see?",
        "What shape is this?",
        "name the shape",
    ),
    "color": ("what color is the shape?", "what is the color of the shape?", "What color is it?"),
    "both": ("describe the picture", "describe the image"),
}


def draw(shape, color, rng):
    """A picture of 64 x 64 pixels, drawn four times as large for smooth edges."""
    ground, radius = tuple(rng.integers(200, 256, 3).tolist()), rng.uniform(52, 96)
    x, y = rng.uniform(radius + 8, 248 - radius, 2)
    image = Image.new("RGB", (256, 256), ground)
    pen = ImageDraw.Draw(image)
    if shape in ("circle", "ring"):
        pen.circle((x, y), radius, fill=color)
        if shape == "ring":
            pen.circle((x, y), radius * rng.uniform(0.5, 0.65), fill=ground)
    else:
        half = rng.uniform(0.4, 1.1)
        corners = {"triangle": (0, 2.09, 4.19), "rectangle": (half, np.pi - half, np.pi + half, -half)}[shape]
        angles = np.array(corners) + rng.integers(4) * np.pi / 2 + rng.uniform(-0.25, 0.25)
        pen.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles], fill=color)
    return image.resize((64, 64), Image.Resampling.BOX)


def ask(topic, shape, rng):
    """A prompt about a new picture, and its true answer."""
    color = rng.choice(COLORS)
    answer = {"shape": shape, "color": color, "both": f"a {color} {shape}"}[topic]
    prompt = f"USER: <image>\n{rng.choice(QUESTIONS[topic])} ASSISTANT:"
    return {"prompt": prompt, "multi_modal_data": {"image": draw(shape, color, rng)}}, answer


rng = np.random.default_rng(1)
held_out = [(shape, *ask("shape", shape, rng)) for shape in (NEW, *OLD) for _ in range(60)]
held_out += [("colors", *ask("color", shape, rng)) for shape in (NEW, *OLD) for _ in range(15)]

# %% [markdown]
# ## Before
#
# It has no word for a ring, and says one that it knows. The old words are right.

# %%
from aphrodite_jax import LLM, SamplingParams


def answers(llm):
    outputs = llm.generate([prompt for _, prompt, _ in held_out], SamplingParams(temperature=0.0), use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def accuracy(given):
    """Share of exact answers."""
    right = {}
    for (name, _, true), text in zip(held_out, given, strict=True):
        right.setdefault(name, []).append(text == true)
    return {name: np.mean(hits) for name, hits in right.items()}


llm = LLM(warm_up=False, show_progress=False)  # programs are compiled as they are needed
print("ring, as the tokenizer spells it:", llm.tokenizer.tokenize(" ring"))
before = answers(llm)
for name, share in accuracy(before).items():
    print(f"{name:9} {share:7.1%}")

# %% [markdown]
# ## Examples
#
# A prompt as `LLM.generate` takes it, and the answer as it follows, with its space. A third of the pictures are rings; the others, and the questions about
# colours, are there so that what was known stays.

# %%
from aphrodite_jax.tuning import Example

rng = np.random.default_rng(2)
examples = []
for _ in range(1800):
    topic = rng.choice(["shape", "color", "both"], p=[0.6, 0.25, 0.15])
    shape = rng.choice([NEW, *OLD], p=[0.34, 0.22, 0.22, 0.22])
    prompt, answer = ask(topic, shape, rng)
    examples.append(Example(**prompt, answer=f" {answer}"))

# %% [markdown]
# ## Training
#
# `add_lora` puts updates of rank 16 on all matrices, those of the vision tower and the projector included: a new shape has to be seen before it can be named.
# (By default they go on the language model alone.) Each step is one call of the model on 512 rows, in which some ten examples stand behind one another;
# their masks keep them apart. With `checkpoint_dir` an interrupted run would go on where it was.

# %%
import jax
import optax
from flax import nnx

from aphrodite_jax import ModelConfig
from aphrodite_jax.tuning import add_lora, fine_tune, load_model

NUM_STEPS = 200
model_config = ModelConfig()  # the model that ships; or ModelConfig(model=...), a directory or a name on the hub
model = load_model(model_config)
paths = add_lora(model, rank=16, targets=".*", rngs=nnx.Rngs(0))
trained = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
print(f"{trained:,} parameters are trained, on {len(paths)} matrices")

rate = optax.warmup_cosine_decay_schedule(0.0, 5e-3, warmup_steps=10, decay_steps=NUM_STEPS)
optimizer = optax.chain(optax.clip_by_global_norm(0.3), optax.adam(rate))
history = fine_tune(model, model_config, examples, optimizer=optimizer, num_steps=NUM_STEPS, row_length=512)

# %%
figure, ax = plt.subplots(figsize=(6, 2.4), dpi=60)
ax.semilogy(history.losses)
ax.set_xlabel("step")
ax.set_ylabel("loss, nats a token")
plt.show()

# %% [markdown]
# ## After
#
# `save_merged` folds the updates into the matrices and writes a checkpoint in Hugging Face format, tokenizer and all. Nothing of LoRA is left in it: `LLM` and
# transformers load it as any other.

# %%
import tempfile

from aphrodite_jax.tuning import save_merged

directory = tempfile.mkdtemp()
save_merged(model, model_config, directory)
after = answers(LLM(directory, warm_up=False, show_progress=False))
print("           before   after")
for name, share in accuracy(after).items():
    print(f"{name:9} {accuracy(before)[name]:7.1%} {share:7.1%}")

# %%
assert accuracy(before)[NEW] == 0
assert min(accuracy(after).values()) >= 0.95

# %% [markdown]
# What it said before, and says now:

# %%
figure, axes = plt.subplots(2, 8, figsize=(12, 4.2), dpi=60)
for ax, index in zip(axes.flat, [*range(8), *range(60, 300, 30)], strict=True):
    _, prompt, true = held_out[index]
    ax.imshow(prompt["multi_modal_data"]["image"])
    ax.set_title(f"{before[index]}\n→ {after[index]}", fontsize=9, color="green" if after[index] == true else "red")
    ax.axis("off")
plt.show()

# %% [markdown]
# Your own model learns in the same way: [docs/tuning.md](https://github.com/aphrodite-jax/aphrodite_jax/blob/main/docs/tuning.md) tells what is trained, what it
# costs, and where the limits are. Next: [run a batch job](5_batch_job.ipynb).
