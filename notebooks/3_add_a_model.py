# %% [markdown]
# # Add a model in one cell
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/aphrodite-jax/aphrodite_jax/blob/main/notebooks/3_add_a_model.ipynb)
#
# A model becomes multimodal by implementing `SupportsMultiModal`, keeping keywords of its `__call__` for pixels, and being decorated with four pure functions:
# what maps items to arrays, the most tokens of one item, dummy data of the largest size, and what expands placeholders. Here is a whole model, **Mosaic**, which
# sees a picture as 16 coloured tiles; then what proves its registration right; then an answer.

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
import transformers
from flax import nnx
from PIL import Image

from aphrodite_jax import register_model
from aphrodite_jax.inputs import INPUT_REGISTRY, dummy_prompt, expand_items
from aphrodite_jax.modeling.loader import WeightRule
from aphrodite_jax.modeling.models.interfaces import SupportsMultiModal
from aphrodite_jax.modeling.models.llama import LlamaForCausalLM
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, MultiModalInputs

GRID = 4
TILES = GRID * GRID


def map_images(ctx, images):
    """Opened pictures to the keyword arrays of `__call__`, items first."""
    tiles = [np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), np.float32) / 255 for image in images]
    return MultiModalInputs({"pixel_values": np.stack(tiles).reshape(len(images), TILES, 3)})


def dummy_data(ctx, seq_len, mm_counts):
    """The largest prompt that is legal: memory is planned on it."""
    images = [Image.new("RGB", (GRID, GRID))] * mm_counts["image"]
    return dummy_prompt(seq_len, "image", ctx.model_config.hf_config.image_token_index, images, TILES)


def expand_images(ctx, inputs):
    """One placeholder a picture becomes one a tile."""
    count = len(inputs.multi_modal_data.get("image", ()))
    return expand_items(inputs, "image", ctx.model_config.hf_config.image_token_index, [TILES] * count)


@register_model("MosaicForConditionalGeneration")
@MULTIMODAL_REGISTRY.register_image_input_mapper(map_images)
@MULTIMODAL_REGISTRY.register_max_image_tokens(TILES)
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(expand_images)
class Mosaic(nnx.Module, SupportsMultiModal):
    weight_rules = (WeightRule(r"((?:projector|language_model)\..*)", r"\1"),)
    mask_specs = staticmethod(LlamaForCausalLM.mask_specs)
    kv_cache_shapes = staticmethod(LlamaForCausalLM.kv_cache_shapes)

    def __init__(self, config, *, dtype, rngs):
        self.config = config
        self.projector = nnx.Linear(3, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.language_model = LlamaForCausalLM(config, dtype=dtype, rngs=rngs)

    def embed_multimodal(self, pixel_values):
        return {"image": self.projector(pixel_values)}

    def embed_input_ids(self, input_ids):
        return self.language_model.embed_input_ids(input_ids)

    def __call__(self, input_ids, positions, kv_caches, attn_metadata, pixel_values=None, *, inputs_embeds=None):
        if inputs_embeds is None:
            media = {} if pixel_values is None else self.embed_multimodal(pixel_values)
            inputs_embeds = self.embed_with_media(input_ids, media)  # rows in the places of image_token_index
        return self.language_model(input_ids, positions, kv_caches, attn_metadata, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states):
        return self.language_model.compute_logits(hidden_states)


def tiny_config() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        architectures=["MosaicForConditionalGeneration"],
        image_token_index=70,
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )


# %% [markdown]
# ## Prove it
#
# `check_multimodal_model` asks of a class all that its registration promises, with pictures and prompts that hypothesis makes up: pure functions, as many
# placeholders as rows, a bound that is one, pixels that reach the logits, rows that see what the masks say and nothing else, the same answers in chunks, in
# batches and alone, and nothing compiled late. It says nothing where all of that holds.

# %%
from aphrodite_jax.testing import ConformanceError, check_multimodal_model, images

check_multimodal_model(Mosaic, tiny_config(), strategies={"image": images(most=100)}, max_examples=5)

# %% [markdown]
# What is broken is told in words. Here is one that promises fewer tokens than it takes:


# %%
@MULTIMODAL_REGISTRY.register_image_input_mapper(map_images)
@MULTIMODAL_REGISTRY.register_max_image_tokens(TILES - 1)
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(expand_images)
class TooSure(Mosaic):
    pass


try:
    check_multimodal_model(TooSure, tiny_config(), max_examples=5)
except ConformanceError as error:
    print(error)

# %% [markdown]
# ## Run it
#
# A checkpoint of random weights in Hugging Face's format, beside the tokenizer of the model that ships; it answers like any other model, at random.

# %%
import tempfile

import jax.numpy as jnp

from aphrodite_jax import LLM, SamplingParams
from aphrodite_jax.config import shipped_model_path
from aphrodite_jax.modeling.loader import save_pretrained

directory = tempfile.mkdtemp()
tokenizer = transformers.AutoTokenizer.from_pretrained(shipped_model_path())
tokenizer.save_pretrained(directory)
config = tiny_config()
config.vocab_size, config.image_token_index = len(tokenizer), tokenizer.convert_tokens_to_ids("<image>")
save_pretrained(Mosaic(config, dtype=jnp.float32, rngs=nnx.Rngs(0)), config, directory)

llm = LLM(directory, limit_mm_per_prompt={"image": 2}, warm_up=False, show_progress=False)
picture = Image.linear_gradient("L").convert("RGB")
prompt = {"prompt": "Two pictures: <image> and <image>.", "multi_modal_data": {"image": [picture, picture.rotate(90)]}}
[output] = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=8), use_tqdm=False)
print(output.outputs[0].token_ids)
llm.explain(prompt)

# %% [markdown]
# In a package of its own, an entry point makes a model known, and `pytest --aphrodite-model mosaic.models:Mosaic` checks it: see
# [adding multimodal capabilities](https://github.com/aphrodite-jax/aphrodite_jax/blob/main/docs/adding_a_multimodal_model.md).
#
# Next: [fine-tune](4_fine_tune.ipynb).
