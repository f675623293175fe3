# %% [markdown]
# # A batch job
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/aphrodite-jax/aphrodite_jax/blob/main/notebooks/5_batch_job.ipynb)
#
# Many pictures, one command, nothing lost: what a job will need, the mesh, the run, a kill in the middle of it, and how it goes on.

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
# ## The requests
#
# A file in OpenAI's batch form: a line for each picture. Two of the pictures here are the same, and one line asks for a file that is not there.

# %%
import json
import random
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

job = Path(tempfile.mkdtemp())
draw_at = random.Random(0)
COLORS = ("red", "blue", "teal", "black", "brown", "green")


def line(index: int, image: Path) -> str:
    parts = [
        {"type": "image_url", "image_url": {"url": image.as_uri()}},
        {"type": "text", "text": "describe the picture"},
    ]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 8, "temperature": 0}
    return json.dumps({"custom_id": f"{index}", "method": "POST", "url": "/v1/chat/completions", "body": body})


lines = []
for index in range(120):
    image = Image.new("RGB", (64, 64), "#f2efe6")
    left, top, size = draw_at.randrange(4, 24), draw_at.randrange(4, 24), draw_at.randrange(24, 36)
    shape = draw_at.choice((ImageDraw.ImageDraw.ellipse, ImageDraw.ImageDraw.rectangle))
    shape(ImageDraw.Draw(image), (left, top, left + size, top + size), fill=draw_at.choice(COLORS))
    image.save(job / f"{index}.png")
    lines.append(line(index, job / f"{index}.png"))
lines[7] = line(7, job / "0.png")
lines[11] = line(11, job / "nowhere.png")
(job / "requests.jsonl").write_text("\n".join(lines) + "\n")
print(lines[0][:160], "...")

# %% [markdown]
# ## The plan
#
# What one request takes, and where the memory of the device goes: known before the first answer.

# %%
import jax

from aphrodite_jax import LLM

llm = LLM(max_num_seqs=4, max_model_len=128)
example = llm.render_chat(json.loads(lines[0])["body"]["messages"])
told = llm.explain(example)
print(len(jax.devices()), "x", jax.devices()[0].device_kind)
print(len(told.token_ids), "tokens a prompt,", told.items[0].info.num_rows, "of them rows of the picture")
print(llm.engine.runner.memory_budget())

# %% [markdown]
# ## The mesh
#
# A model that is too large for one chip is divided over several of a TPU slice: `--tensor-parallel-size 4`. Which part of each parameter a chip would have is
# known without the chips: here for four of them.

# %%
import math

import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh

from aphrodite_jax.modeling.loader.load import abstract_model
from aphrodite_jax.modeling.sharding import place_parameters
from aphrodite_jax.multimodal.context import model_class

mesh = AbstractMesh((4,), ("model",))
model = abstract_model(model_class(llm.model_config), llm.model_config.hf_config, jnp.float32)
lie = place_parameters(model, mesh)
shapes = {path: variable.get_value().shape for path, variable in nnx.to_flat_state(nnx.state(model))}
layer = ("language_model", "model", "layers", 0)
for path in (
    (*layer, "self_attn", "q_proj", "kernel"),
    (*layer, "mlp", "down_proj", "kernel"),
    (*layer, "input_layernorm", "scale"),
):
    print(
        f"{'.'.join(map(str, path[-3:])):28} {shapes[path]} -> {lie[path].shard_shape(shapes[path])} on each, {lie[path].sharding.spec}"
    )
of_all = sum(map(math.prod, shapes.values()))
of_one = sum(math.prod(lie[path].shard_shape(shape)) for path, shape in shapes.items())
print(f"of {of_all:,} parameters a chip has {of_one:,}")

# %% [markdown]
# ## The run
#
# The command is one line in a shell: `aphrodite-jax batch requests.jsonl -o answers.jsonl`. Here it is started, and killed as soon as some answers are there.

# %%
import signal
import subprocess
import sys
import time

command = [sys.executable, "-m", "aphrodite_jax", "batch", "requests.jsonl", "-o", "answers.jsonl"]
command += ["--max-num-seqs", "4", "--max-model-len", "128"]  # groups of 32 lines
answers = job / "answers.jsonl"


def written() -> int:
    return answers.read_bytes().count(b"\n") if answers.exists() else 0


process = subprocess.Popen(command, cwd=job, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
while written() < 10 and process.poll() is None:
    time.sleep(0.02)
process.send_signal(signal.SIGKILL)
process.wait()
before = answers.read_bytes()
print("killed with", written(), "of", len(lines), "lines written")

# %% [markdown]
# The same command again goes on where it was: what is written stays, and no line is answered twice.

# %%
done = subprocess.run(command, cwd=job, capture_output=True, text=True)
print(done.stderr.strip().splitlines()[-1])
print("exit status", done.returncode, "| lines:", written())
print("what was there is kept:", answers.read_bytes().startswith(before[: before.rfind(b"\n") + 1]))

# %% [markdown]
# ## The answers
#
# One line each, in the order of the requests. A bad line has its error in its own place and stops nothing.

# %%
from matplotlib import pyplot as plt

results = [json.loads(text) for text in answers.read_text().splitlines()]
assert [result["custom_id"] for result in results] == [str(index) for index in range(len(lines))]
print(results[11]["error"])

figure, axes = plt.subplots(2, 5, figsize=(9, 3.6), dpi=60)
for ax, index in zip(axes.flat, range(20, 30), strict=True):
    ax.imshow(Image.open(job / f"{index}.png"))
    ax.set_title(results[index]["response"]["body"]["choices"][0]["message"]["content"], fontsize=8)
    ax.axis("off")
plt.show()

# %% [markdown]
# [Batch jobs](https://github.com/aphrodite-jax/aphrodite_jax/blob/main/docs/batch_jobs.md) has the options, and what each exit status means.
