"""The files around the weights of the shipped model, in the form that the Hugging Face hub has for LLaVA-1.5."""

import json
from pathlib import Path

import tokenizers
import transformers
from tiny_llava_data import (
    COLORS,
    EVERY_QUESTION_FORM,
    IMAGE_SIZE,
    NO_PICTURE,
    ONE_WORD,
    SHAPES,
    SMALL_TALK,
    Encoder,
)
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

PATCH_SIZE = 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
MAX_LENGTH = 1024
SPECIALS = ("<pad>", "<s>", "</s>", "<image>")

# As LLaVA-1.5's: images of a message first, then its texts.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}{{ message['role'] | upper + ': ' }}{%- endif -%}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{ part['text'] }}{%- if not loop.last -%}{{ ' ' }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{ eos_token | default('</s>') }}{%- else -%}{{ ' ' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def train_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE in which the words of the questions and answers are one token each."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Like Llama's, the decoder drops the space before the first word of an answer.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(list(_corpus()) * 2, trainer)
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", begin)]
    )
    return tokenizer


def _corpus():
    """Every sentence form, plain and capitalised, with British spelling, and every answer."""
    things = dict.fromkeys((*COLORS, "grey", *SHAPES, "shape"))
    for form in EVERY_QUESTION_FORM:
        text = form.format(thing="shape", any="gray", color="gray", shape="circle")
        for spelled in (text, text.replace("color", "colour"), text.replace("image", "photo")):
            yield from (f"\n{spelled}", f"\n{spelled[0].upper()}{spelled[1:]}", f": {spelled}")
    yield from (f"is there a {thing}s {thing}" for thing in things)
    yield from (f" {d}" for d in range(10))
    yield "USER: describe the first picture ASSISTANT: yes no the digit and a, second pictures?\nplease" + ONE_WORD
    yield f" {NO_PICTURE}. Please"
    yield from (f": {question} {answer}" for question, answer in SMALL_TALK)


def make_encoder(tokenizer: tokenizers.Tokenizer) -> Encoder:
    return Encoder(tokenizer=tokenizer, image_tokens=IMAGE_TOKENS)


def make_config(tokenizer: tokenizers.Tokenizer) -> transformers.LlavaConfig:
    """A LLaVA-1.5 in small: four layers of width 128 on either side."""
    vision = transformers.CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=128,
        hidden_act="quick_gelu",
    )
    text = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=tokenizer.token_to_id("</s>"),
        pad_token_id=tokenizer.token_to_id("<pad>"),
    )
    return transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.token_to_id("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        architectures=["LlavaForConditionalGeneration"],
        tie_word_embeddings=True,
    )


def write_processor_files(tokenizer: tokenizers.Tokenizer, directory: Path) -> None:
    """Everything that is not the config or the weights."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": False,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": PATCH_SIZE,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # the class token, which "default" drops again
        "image_token": "<image>",
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    _write(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            **special,
            "image_token": "<image>",
            "extra_special_tokens": {"image_token": "<image>"},
            "model_max_length": MAX_LENGTH,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": True,
        },
    )
    _write(directory / "special_tokens_map.json", special | {"image_token": "<image>"})
    _write(directory / "preprocessor_config.json", image_processor | {"processor_class": "LlavaProcessor"})
    _write(directory / "processor_config.json", processor)
    _write(
        directory / "generation_config.json",
        {
            "bos_token_id": tokenizer.token_to_id("<s>"),
            "eos_token_id": tokenizer.token_to_id("</s>"),
            "pad_token_id": tokenizer.token_to_id("<pad>"),
        },
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
