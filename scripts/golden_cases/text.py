"""Language models: Llama, Mistral, Qwen2, Gemma, and every scaling of rotary positions."""

import checkpoints

from golden_cases import Case

TEXT = {
    "vocab_size": checkpoints.VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "dtype": "float32",
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TEXT}
MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    **TEXT,
    "head_dim": 24,  # not hidden_size / num_attention_heads
    "sliding_window": 8,  # shorter than the prompts
}
QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    **TEXT,
    "use_sliding_window": False,
}
QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    **TEXT,
    "head_dim": 24,
    "attention_bias": False,
}
PHI3 = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    **TEXT,
    "sliding_window": 8,
    "original_max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
GEMMA = {
    "model_type": "gemma",
    "architectures": ["GemmaForCausalLM"],
    **TEXT,
    "head_dim": 24,
    "hidden_act": "gelu",  # old files mean the tanh form
    "tie_word_embeddings": True,
}
GEMMA2 = {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    **{name: value for name, value in TEXT.items() if name != "hidden_act"},
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 24,
    "query_pre_attn_scalar": 40,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 10.0,
    "tie_word_embeddings": False,
}


def rope(kind: str, **parameters) -> dict:
    return LLAMA | {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "original_max_position_embeddings": 48,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
}
QWEN2_WINDOWS = QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}

# Name to config and prompts: (tokens of text, images) each. Where lengths cross the trained one of a rope scaling, one
# prompt stands on each side and one crosses it while it is continued.
_CASES = {
    "llama": (LLAMA, [(24, 0)]),
    "llama_biases_mha": (
        LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        [(24, 0)],
    ),
    "llama_tied_mqa": (LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 1}, [(24, 0)]),
    "llama_rope_theta": (rope("default", rope_theta=500000.0), [(24, 0)]),
    "llama_linear": (rope("linear", factor=4.0), [(24, 0)]),
    "llama_dynamic": (
        rope("dynamic", factor=2.0) | {"max_position_embeddings": 48},
        [(12, 0), (30, 0), (60, 0)],
    ),
    "llama_yarn": (rope("yarn", **YARN), [(24, 0)]),
    "llama_yarn_mscale": (
        rope("yarn", **YARN, mscale=0.8, mscale_all_dim=0.4, beta_fast=8, beta_slow=2),
        [(24, 0)],
    ),
    "llama_yarn_no_truncate": (
        rope("yarn", **YARN, truncate=False, attention_factor=1.3, beta_fast=4),
        [(24, 0)],
    ),
    "llama_longrope": (rope("longrope", **LONGROPE), [(12, 0), (30, 0), (60, 0)]),
    "llama_longrope_factor": (
        rope("longrope", **LONGROPE, factor=3.0, attention_factor=1.2),
        [(12, 0), (60, 0)],
    ),
    "llama_llama3": (
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        [(24, 0)],
    ),
    "llama_proportional": (rope("proportional", partial_rotary_factor=0.5, factor=2.0), [(24, 0)]),
    "mistral": (MISTRAL, [(24, 0)]),
    "mistral_no_window": (MISTRAL | {"sliding_window": None}, [(24, 0)]),
    "qwen2": (QWEN2, [(24, 0)]),
    "qwen2_tied": (QWEN2 | {"tie_word_embeddings": True}, [(24, 0)]),
    "qwen2_windows": (QWEN2_WINDOWS, [(24, 0)]),
    "qwen3": (QWEN3, [(24, 0)]),
    "phi3": (PHI3, [(24, 0)]),
    "gemma": (GEMMA, [(24, 0)]),
    "gemma2": (GEMMA2, [(24, 0)]),
    "gemma2_no_caps": (GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None}, [(24, 0)]),
}
_UNLIKE = {
    **{
        name: config | {"rope_parameters": TEXT["rope_parameters"]}
        for name, (config, _) in _CASES.items()
        if config.get("rope_parameters", TEXT["rope_parameters"]) != TEXT["rope_parameters"]
    },
    "mistral": MISTRAL | {"sliding_window": None},
    "phi3": PHI3 | {"sliding_window": None},
    "qwen2_windows": QWEN2,
    "gemma2": GEMMA2 | {"attn_logit_softcapping": None},
    "gemma2_no_caps": GEMMA2 | {"attn_logit_softcapping": None, "layer_types": ["full_attention"] * 2},
}
CASES = {
    name: Case(config=config, prompts=tuple(prompts), unlike=_UNLIKE.get(name))
    for name, (config, prompts) in _CASES.items()
}
