"""The dummy picture is a small one: what is planned for it is too little for others."""

from PIL import Image
from right_model import IMAGE_TOKEN, MOST, build

from aphrodite_jax.inputs import dummy_prompt

CLAUSE = "the dummy data hold as many items as allowed"


def small(ctx, seq_len, mm_counts):
    return dummy_prompt(seq_len, "image", IMAGE_TOKEN, [Image.new("RGB", (4, 4))] * mm_counts["image"], MOST)


Model = build(dummy=small)
