"""The model that ships: right answers, a small directory, and the same answers from Hugging Face's own LLaVA."""

import subprocess
import sys
from pathlib import Path

import evaluate_tiny_llava
import numpy as np
import pytest
import tiny_llava_data as data
from PIL import Image

from aphrodite_jax import LLM, SamplingParams
from aphrodite_jax.config import shipped_model_path

EXAMPLE = Path(__file__).parent.parent / "docs" / "assets" / "example.png"


@pytest.fixture(scope="module")
def llm():
    return LLM(max_num_seqs=32, max_model_len=128, max_num_batched_tokens=1024, warm_up=False, show_progress=False)


def question_about(picture, text):
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


def test_the_directory_is_small():
    files = [path for path in shipped_model_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6


@pytest.mark.once
def test_the_command_of_the_readme():
    command = ["generate", "--image", str(EXAMPLE), "what color is the shape?"]
    done = subprocess.run([sys.executable, "-m", "aphrodite_jax", *command], capture_output=True, text=True, check=True)
    assert done.stdout == "blue\n"


@pytest.mark.once
def test_answers_about_pictures_it_never_saw(llm):
    """A part of what `scripts/evaluate_tiny_llava.py` asks."""
    shapes = [(p, question, answer) for p in data.load_shapes("test") for question, answer in p.asked]
    digits = [(p, "which digit is this?", str(p.digit)) for p in data.load_digits("test")]
    assert evaluate_tiny_llava.report("easy-vqa", llm, shapes[::64]) >= 0.98
    assert evaluate_tiny_llava.report("digits", llm, digits[::6]) >= 0.94


def test_splits_do_not_overlap():
    """No picture of a test split is trained on, nor chosen by: the very pixels differ."""
    for load in (data.load_shapes, data.load_digits):
        seen = {p.pixels.tobytes() for split in ("train", "validation") for p in load(split)}
        assert not any(p.pixels.tobytes() in seen for p in load("test"))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_any_mode_of_picture(llm, mode):
    picture = Image.open(EXAMPLE).convert("RGB").convert(mode)
    [output] = llm.chat(question_about(picture, "what shape is it?"), on_error="raise", use_tqdm=False)
    assert output.outputs[0].text == "rectangle"


def test_hugging_face_gives_the_same_answers(llm):
    """transformers loads the same directory with its own model and processor, and greedily says the same."""
    torch = pytest.importorskip("torch", reason="Hugging Face's model classes need PyTorch")
    import transformers

    model = transformers.LlavaForConditionalGeneration.from_pretrained(shipped_model_path(), dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(shipped_model_path())
    image_processor = transformers.AutoImageProcessor.from_pretrained(shipped_model_path(), backend="pil")
    processor = transformers.LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    rng = np.random.default_rng(0)
    pictures = [*data.load_shapes("test")[:12], *data.load_digits("test")[:8]]
    asked = [(picture, *data.ask(picture, rng)) for picture in pictures]
    ours = evaluate_tiny_llava.ask_all(llm, asked)
    for (picture, question, _), answer in zip(asked, ours, strict=True):
        inputs = processor(
            images=picture.image().convert("RGB"), text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt"
        )
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(ids, skip_special_tokens=True) == answer


def test_chat_and_generate_make_one_prompt(llm):
    picture = Image.open(EXAMPLE)
    [chat] = llm.chat(question_about(picture, "which color is it?"), use_tqdm=False)
    prompt = {"prompt": "USER: <image>\nwhich color is it? ASSISTANT:", "multi_modal_data": {"image": picture}}
    [generated] = llm.generate([prompt], SamplingParams(temperature=0.0), use_tqdm=False)
    assert chat.prompt_token_ids == generated.prompt_token_ids
    assert chat.outputs[0].text == generated.outputs[0].text == "blue"
