"""How much of a vision tower's work fills shapes up, on photographs of every size."""

import dataclasses
import math

import checkpoints
import pytest
from golden_files import read_golden
from PIL import Image

from aphrodite_jax import LLM, SamplingParams
from aphrodite_jax.modeling.models import pixtral, qwen_vl_inputs

pytestmark = pytest.mark.once

# Height and width of the pictures that scikit-image has: people, animals, text, documents, microscopy.
SIZES = (
    (512, 512), (512, 512), (400, 600), (300, 451), (427, 640), (303, 384), (872, 1000), (191, 384), (172, 448),
    (512, 512), (1411, 1411), (512, 512), (328, 400), (300, 400), (512, 512), (512, 512), (512, 512), (660, 550),
    (922, 922),    (960, 1280), (2019, 1826), (102, 102), (500, 741), (370, 371), (500, 500), (720, 1280),
)  # fmt: skip
MOST = 0.25


def waste(rows, padded):
    return 1 - sum(rows) / sum(padded)


@pytest.mark.parametrize(
    ("side", "least", "most"),
    [(28, 56**2, 28**2 * 1280), (28, 56**2, 28**2 * 16384), (32, 256**2, 4096**2)],
    ids=["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"],
)
def test_of_qwen_vl_at_its_real_sizes(side, least, most):
    limits = qwen_vl_inputs.PixelLimits(side=side, least=least, most=most)
    rows = [math.prod(qwen_vl_inputs.squares_of(limits, size)) for size in SIZES]
    assert waste(rows, list(map(qwen_vl_inputs.padded_rows, rows))) <= MOST


@dataclasses.dataclass
class PixtralConfig:
    """Pixtral-12B's, or Mistral Small's with squares of two patches."""

    spatial_merge_size: int
    vision_config: object


@dataclasses.dataclass
class TowerConfig:
    patch_size: int
    image_size: int


@pytest.mark.parametrize("config", [PixtralConfig(1, TowerConfig(16, 1024)), PixtralConfig(2, TowerConfig(14, 1540))])
def test_of_pixtral_at_its_real_sizes(config):
    most, side = config.vision_config.image_size, pixtral.row_side(config)
    rows = []
    for height, width in SIZES:
        shrink = max(1, height / most, width / most)
        rows.append(-(-int(height / shrink) // side) * -(-int(width / shrink) // side))
    padded = [next(count for count in pixtral.padded_rows(config) if count >= n) for n in rows]
    assert waste(rows, padded) <= MOST


def test_the_stats_tell_it(tmp_path):
    """Some of the photographs, scaled down to a tiny model, through the engine."""
    directory = read_golden("mistral3").write_checkpoint(tmp_path)
    llm = LLM(directory, max_num_seqs=8, warm_up=False, show_progress=False)
    sizes = sorted({(height // 6, width // 6) for height, width in SIZES})[::5]
    prompts = [
        {
            "prompt_token_ids": [1, checkpoints.IMAGE_TOKEN, 5],
            "multi_modal_data": {"image": Image.new("RGB", (width, height), (width % 256, height % 256, 0))},
        }
        for height, width in sizes
    ]
    llm.generate(prompts, SamplingParams(max_tokens=1), on_error="raise", use_tqdm=False)
    stats = llm.stats()
    assert stats["media_encoded"] == len(sizes)
    assert 0 < stats["media_padding"] <= MOST * (stats["media_values"] + stats["media_padding"])
