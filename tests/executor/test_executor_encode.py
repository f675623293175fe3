"""Media through the tower: as many together as memory allows, and none for nothing."""

import numpy as np
import pytest
from golden_files import read_golden

from aphrodite_jax import LLM, SamplingParams
from aphrodite_jax.executor import model_programs

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def golden():
    return read_golden("llava_clip_llama")


def answers(golden, tmp_path, images):
    """An image a prompt; the answers, and how many images each encode program took."""
    directory = golden.write_checkpoint(tmp_path)
    llm = LLM(directory, dtype="float32", max_num_seqs=8, warm_up=False, show_progress=False)
    tokens = golden.prompts[1].prompt.tolist()
    prompts = [{"prompt_token_ids": tokens, "multi_modal_data": {"image": image}} for image in images]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    outputs = llm.generate(prompts, params, on_error="raise", use_tqdm=False)
    counts = [program.key[0] for program in llm.engine.runner.programs.table() if program.name == "encode"]
    return [output.outputs[0].token_ids for output in outputs], counts, llm.stats()


def test_parts_fill_their_buckets_and_hold_no_more_rows_than_allowed(golden, tmp_path, monkeypatch):
    """Of seven images of 16 rows, four, two and one; with room for 40 rows, two, two, two and one."""
    images = [np.roll(golden.prompts[1].images[0], 4 * shift, axis=1) for shift in range(7)]
    together, counts, stats = answers(golden, tmp_path, images)
    assert counts == [1, 2, 4]
    assert stats["media_encoded"] == 7
    assert stats["media_padding"] == 0
    monkeypatch.setattr(model_programs, "MAX_ENCODE_ROWS", 40)
    apart, counts, _ = answers(golden, tmp_path, images)
    assert counts == [1, 2]
    assert apart == together
