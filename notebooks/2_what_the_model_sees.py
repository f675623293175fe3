# %% [markdown]
# # What the model sees
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/aphrodite-jax/aphrodite_jax/blob/main/notebooks/2_what_the_model_sees.ipynb)
#
# A picture becomes rows among the tokens of a prompt. This notebook shows where they stand, what each row may look at, where an answer looks, and what the
# model would say at each patch, layer by layer.

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

# %%
import numpy as np
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw

from aphrodite_jax import LLM

llm = LLM(warm_up=False, show_progress=False)  # a few requests: programs are compiled as they come

picture = Image.new("RGB", (64, 64), "#f2efe6")
ImageDraw.Draw(picture).ellipse((30, 8, 56, 34), fill="green")
prompt = {
    "prompt": "USER: <image>\nwhat color is the shape? ASSISTANT:",
    "multi_modal_data": {"image": picture},
}
[output] = llm.generate(prompt, use_tqdm=False)
print(output.outputs[0].text)

# %% [markdown]
# ## Placeholders over the tokens
#
# `explain` tells what becomes of a request, without running it: its tokens (those of the picture in colour), the steps in which it would be computed, and
# the mask. Tokens that stand in the cache already are dim; point at one to see what it may look at.

# %%
llm.explain(prompt)

# %% [markdown]
# The same in a terminal:

# %%
print(llm.explain(prompt))

# %% [markdown]
# ## Masks are row intervals
#
# A row sees one run of keys, `[start, stop)`, in every mask that these models use: two whole numbers a row say all. Here are some families' masks of one
# prompt with a picture in it (the red frame).

# %%
from kernels_pallas import intervals
from kernels_pallas.mask_picture import picture as draw_mask

length, span = 24, (6, 14)
causal = intervals.causal(length)
masks = {
    "LLaVA: causal": causal,
    "Mistral: window of 8": intervals.causal(length, window=8),
    "Gemma 3: the picture sees itself": intervals.bidirectional_spans(causal, [span]),
    "PaliGemma: the prompt sees itself": intervals.prefix(causal, 18),
}
figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), dpi=60)
for ax, (name, rows) in zip(axes, masks.items(), strict=True):
    draw_mask(rows, num_keys=length, spans=[span], ax=ax).get_legend().remove()
    ax.set_title(name, fontsize=10)
plt.show()

# %% [markdown]
# A kernel computes blocks of such a mask: it skips those that no row sees, and masks only those that an edge runs through.

# %%
figure, ax = plt.subplots(figsize=(4, 3.4), dpi=60)
draw_mask(masks["Gemma 3: the picture sees itself"], num_keys=length, spans=[span], block_q=4, block_k=4, ax=ax)
plt.show()

# %% [markdown]
# ## Where an answer looks
#
# `capture` runs the prompt and the answer through the model and keeps what is asked for: here the attention of the row from which the answer's first token was
# chosen, over the patches of the picture.

# %%
answer = output.outputs[0].token_ids
seen = llm.capture(prompt, answer, attention=range(llm.engine.runner.num_layers), attention_rows=[-len(answer) - 1])

figure, axes = plt.subplots(1, len(seen.attention), figsize=(3 * len(seen.attention), 3), dpi=60)
for ax, layer in zip(np.atleast_1d(axes), seen.attention, strict=True):
    ax.imshow(picture)
    ax.imshow(seen.attention_map(layer=layer), alpha=0.6, cmap="magma", extent=(0, 64, 64, 0), interpolation="bilinear")
    ax.set_title(f"layer {layer}", fontsize=10)
    ax.axis("off")
plt.show()

# %% [markdown]
# ## What each patch says
#
# The logit lens reads the hidden state of a row as if the model ended there. Over the patches of the picture it tells what the model has understood of each,
# layer by layer.

# %%
layers = range(1, llm.engine.runner.num_layers + 1)
seen = llm.capture(prompt, logit_lens=layers)

side = int(len(seen.item_tokens[0]) ** 0.5)
figure, axes = plt.subplots(1, len(layers), figsize=(3.6 * len(layers), 3.6), dpi=60)
for ax, layer in zip(np.atleast_1d(axes), layers, strict=True):
    ax.imshow(picture, extent=(0, side, side, 0), alpha=0.35)
    for place, token in enumerate(seen.item_tokens[0]):
        text = seen.logit_lens[layer].texts[token][0].strip()
        ax.text(place % side + 0.5, place // side + 0.5, text[:7], ha="center", va="center", fontsize=7)
    ax.set_title(f"after layer {layer - 1}", fontsize=10)
    ax.axis("off")
plt.show()

# %% [markdown]
# And the words before the answer: what would come next after each, with its probability.

# %%
lens = seen.logit_lens[layers[-1]]
for place in range(seen.item_tokens[0][-1] + 1, seen.num_prompt_tokens):
    print(f"{seen.tokens[place]!r:14} {lens.texts[place][0]!r:14} {lens.probabilities[place, 0]:.3f}")

# %% [markdown]
# Next: [add a model](3_add_a_model.ipynb).
