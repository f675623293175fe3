"""Prompts of PaliGemma and Gemma 3: the order of their parts, crops, and newlines that tokenizers join."""

import hypothesis
import numpy as np
import pytest
import tokenizers
import transformers
from golden_files import read_golden
from hypothesis import strategies as st
from PIL import Image

from aphrodite_jax import LLM, ModelConfig, SamplingParams
from aphrodite_jax.errors import PlaceholderError, RequestError
from aphrodite_jax.inputs import INPUT_REGISTRY, LLMInputs
from aphrodite_jax.modeling.models import gemma3, paligemma
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, InputContext

pytestmark = pytest.mark.once

IMAGE = Image.new("RGB", (28, 28))


def write_tokenizer(directory):
    """Words between blanks, and a token for every run of newlines up to 40; special tokens as in the goldens."""
    runs = {"\n" * count: 60 + count for count in range(1, 41)}
    words = {f"w{index}": index for index in range(3, 50)}
    taken = {"<unk>": 0, "<s>": 1, "</s>": 2, **words, **runs, "Here": 50, "original": 51, "crops": 52}
    special = {"<start_of_image>": 157, "<end_of_image>": 158, "<image>": 159}
    filler = {f"filler{index}": index for index in set(range(157)) - set(taken.values())}
    model = tokenizers.models.WordLevel(taken | filler | special, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    split = tokenizers.pre_tokenizers.Split
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [split(" ", "removed"), split(tokenizers.Regex(r"\n+|w7"), "isolated")]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", additional_special_tokens=list(special)
    )
    fast.save_pretrained(directory)
    return fast


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    names = ("gemma3", "gemma3_crops", "paligemma")
    return {name: read_golden(name).write_checkpoint(tmp_path_factory.mktemp(name)) for name in names}


@pytest.fixture(scope="module")
def tokenizer(directories):
    written = [write_tokenizer(directory) for directory in directories.values()]
    return written[0]


def process(model_config, tokenizer, text, images):
    tokens = tuple(tokenizer(text)["input_ids"])
    inputs = LLMInputs(prompt_token_ids=tokens, prompt=text, multi_modal_data={"image": images})
    return INPUT_REGISTRY.process_input(model_config, inputs)


sides = st.integers(14, 200)
texts = st.text(alphabet="\nw", max_size=5).map(lambda text: text.replace("w", "w7"))


@hypothesis.given(st.lists(st.tuples(texts, sides, sides), min_size=1, max_size=3), texts)
@hypothesis.settings(deadline=None, max_examples=20)
@pytest.mark.parametrize("name", ["gemma3", "gemma3_crops"])
def test_tokens_are_those_of_the_whole_text(directories, tokenizer, name, parts, end):
    """As Hugging Face makes them: the text is expanded, and then tokenized."""
    model_config = ModelConfig(model=directories[name], limit_mm_per_prompt={"image": 3})
    processor = transformers.AutoImageProcessor.from_pretrained(directories[name], backend="pil")
    images = [Image.new("RGB", (width, height)) for _, height, width in parts]
    view = "\n\n<start_of_image>" + "<image>" * 4 + "<end_of_image>\n\n"
    expanded = ""
    for (text, *_), crops in zip(parts, processor(images=images)["num_crops"], strict=True):
        more = f" and here are some crops to help you see better {' '.join([view] * crops)}"
        expanded += text + (f"Here is the original image {view}{more}" if crops else view)
    text = "<start_of_image>".join([text for text, *_ in parts] + [end])
    processed = process(model_config, tokenizer, text, images)
    assert list(processed.prompt_token_ids) == tokenizer(expanded + end)["input_ids"]
    rows = [token for span in processed.placeholders["image"] for token in span.row_tokens]
    assert rows == [i for i, token in enumerate(processed.prompt_token_ids) if token == 159]


@hypothesis.given(st.integers(14, 400), st.integers(14, 400))
@hypothesis.settings(deadline=None, max_examples=20)
def test_as_many_crops_as_in_hugging_face(directories, height, width):
    model_config = ModelConfig(model=directories["gemma3_crops"])
    processor = transformers.AutoImageProcessor.from_pretrained(directories["gemma3_crops"], backend="pil")
    image = Image.new("RGB", (width, height))
    crops = processor(images=[image])["num_crops"][0]
    assert gemma3.num_crops(InputContext(model_config), (height, width)) == crops
    mapped = MULTIMODAL_REGISTRY.map_items(model_config, "image", [image])
    assert mapped["pixel_values"].shape == (1, 1 + crops, 3, 28, 28)
    assert mapped["pixel_values"].dtype == np.float32


@pytest.mark.parametrize(("name", "tokens", "rows"), [("gemma3", 6, 4), ("gemma3_crops", 5 * 6, 5 * 4)])
def test_the_bound_is_reached_by_the_dummy_data(directories, tokenizer, name, tokens, rows):
    model_config = ModelConfig(model=directories[name], limit_mm_per_prompt={"image": 2})
    dummy = INPUT_REGISTRY.dummy_data_for_profiling(model_config, 200)
    inputs = LLMInputs(prompt_token_ids=dummy.prompt_token_ids, multi_modal_data=dummy.multi_modal_data)
    processed = INPUT_REGISTRY.process_input(model_config, inputs)
    assert len(processed.prompt_token_ids) <= 200
    bound = gemma3.max_image_tokens(InputContext(model_config))
    for span in processed.placeholders["image"]:
        assert span.length == bound >= tokens
        assert span.num_rows == rows


def test_the_order_of_a_prompt_of_paligemma(directories, tokenizer):
    model_config = ModelConfig(model=directories["paligemma"], limit_mm_per_prompt={"image": 2})
    rows = paligemma.max_image_tokens(InputContext(model_config))
    image, bos, newline = [159] * rows, 1, 61
    for before in ("", "<s>"):
        processed = process(model_config, tokenizer, f"{before}<image>w3 w4", [IMAGE])
        assert list(processed.prompt_token_ids) == [*image, bos, 3, 4, newline]
    processed = process(model_config, tokenizer, "<image>w3<image> w4", [IMAGE] * 2)
    assert list(processed.prompt_token_ids) == [*image, 3, *image, bos, 4, newline]
    assert [span.offset for span in processed.placeholders["image"]] == [0, rows + 1]
    processed = process(model_config, tokenizer, "<s>w3 w4", [])
    assert list(processed.prompt_token_ids) == [bos, 3, 4]


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_a_placeholder_for_each_image(directories, tokenizer, name):
    model_config = ModelConfig(model=directories[name])
    placeholder = {"gemma3": "<start_of_image>", "paligemma": "<image>"}[name]
    for text, images in (("w3", [IMAGE]), (f"{placeholder}w3{placeholder}", [IMAGE]), (f"{placeholder}w3", [])):
        with pytest.raises(PlaceholderError, match="write one for each"):
            process(model_config, tokenizer, text, images)


def test_what_sees_ahead_fits_in_a_step_by_default_or_is_refused(directories, tokenizer):
    options = {"warm_up": False, "show_progress": False, "max_num_seqs": 1}
    prompt = {"prompt": "<image>w3 w4", "multi_modal_data": {"image": IMAGE}}
    params = SamplingParams(max_tokens=1)
    llm = LLM(directories["paligemma"], max_num_batched_tokens=16, **options)
    with pytest.raises(RequestError, match=r"20 rows of the prompt see each other .* allows 16"):
        llm.generate(prompt, params, on_error="raise", use_tqdm=False)
    llm = LLM(directories["paligemma"], **options)
    assert llm.engine.runner.buckets.prefill_tokens[-1] == llm.model_config.context_length
