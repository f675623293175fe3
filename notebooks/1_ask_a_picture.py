# %% [markdown]
# # Ask a picture
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/aphrodite-jax/aphrodite_jax/blob/main/notebooks/1_ask_a_picture.ipynb)
#
# Load a vision-language model, show it pictures, ask. The model here is the small LLaVA that comes with the package: it knows one coloured shape or
# handwritten digit a picture, and runs anywhere. A larger one is loaded by its name and asked in the same way.

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
# ## Load
#
# Every program that the model needs is compiled now, and kept on disk for the next time. On a TPU or a GPU nothing here changes.

# %%
import jax

from aphrodite_jax import LLM, SamplingParams

llm = LLM()  # or LLM("Qwen/Qwen2.5-VL-3B-Instruct", max_model_len=8192), any name on the hub, or a directory
print(jax.devices()[0].device_kind, "|", llm.stats()["programs"], "programs compiled")

# %% [markdown]
# ## A picture
#
# Anything that PIL opens will do. This one is drawn.

# %%
from PIL import Image, ImageDraw


def draw(shape: str, color: str, box=(14, 18, 48, 42), ground="#f2efe6") -> Image.Image:
    image = Image.new("RGB", (64, 64), ground)
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = box
    if shape == "triangle":
        pen.polygon([(left, bottom), ((left + right) / 2, top), (right, bottom)], fill=color)
    else:
        {"rectangle": pen.rectangle, "circle": pen.ellipse}[shape](box, fill=color)
    return image


picture = draw("rectangle", "blue")
picture.resize((160, 160))

# %% [markdown]
# ## Generate
#
# `generate` takes a prompt as the model was trained on it, with a placeholder for each picture.

# %%
prompt = {
    "prompt": "USER: <image>\nwhat shape is in the image? ASSISTANT:",
    "multi_modal_data": {"image": picture},
}
[output] = llm.generate(prompt, SamplingParams(temperature=0.0))
print(output.outputs[0].text)

# %% [markdown]
# What else the model thought of: the likeliest first tokens with their probabilities.

# %%
import math

[output] = llm.generate(prompt, SamplingParams(temperature=0.0, logprobs=3))
for logprob in output.outputs[0].logprobs[0].values():
    print(f"{logprob.decoded_token:12} {math.exp(logprob.logprob):.4f}")

# %% [markdown]
# ## Chat
#
# `chat` takes messages in OpenAI's form and lets the model's own template write the prompt.


# %%
def ask(image: Image.Image, question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


[output] = llm.chat(ask(picture, "describe the picture"))
print(output.outputs[0].text)

# %% [markdown]
# ## A batch
#
# A list of prompts is answered in its order. Requests share steps of the device as they come, and one that can't be served has its error in its own place.

# %%
shapes, colors = ("rectangle", "circle", "triangle"), ("red", "teal", "black", "brown")
pictures = [draw(shape, color) for shape in shapes for color in colors]
outputs = llm.chat([ask(image, "describe the picture") for image in pictures])

# %%
from matplotlib import pyplot as plt

figure, axes = plt.subplots(3, 4, figsize=(7, 5.4), dpi=60)
for ax, image, output in zip(axes.flat, pictures, outputs, strict=True):
    ax.imshow(image)
    ax.set_title(output.outputs[0].text, fontsize=9)
    ax.axis("off")
plt.show()

# %%
good, bad = llm.generate([prompt, {"prompt": "no <image> came with this", "multi_modal_data": {}}])
print("good:", good.outputs[0].text)
print("bad: ", bad.error)

# %% [markdown]
# ## As it grows
#
# `stream` yields an answer token by token.

# %%
for output in llm.stream(llm.render_chat(ask(picture, "describe the picture"))):
    print(output.outputs[0].text)

# %% [markdown]
# ## What was done
#
# Prompts that begin alike, and pictures that were seen before, are not computed again.

# %%
stats = llm.stats()
for name in ("requests", "prompt_tokens", "prompt_tokens_cached", "media_items", "media_encoded", "late_compiles"):
    print(f"{name:22} {stats[name]}")

# %% [markdown]
# Next: [what the model sees](2_what_the_model_sees.ipynb).
