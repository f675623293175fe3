"""Our models on the prompts of the goldens, without an engine."""

import checkpoints
import golden_files
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.engine.admission import map_media, prompt_intervals, prompt_positions
from aphrodite_jax.inputs import INPUT_REGISTRY, LLMInputs
from aphrodite_jax.modeling.layers.attention import AttentionMetadata
from aphrodite_jax.modeling.loader import load_model
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY
from kernels_pallas.intervals import RowIntervals, causal

COMPILE_FAST = {"xla_backend_optimization_level": 0}
"""Compiling takes nearly all of the time of these tests; engine tests compile as users do, with the newest jax."""


def load(directory):
    """The model in float32, and its config."""
    model_config = ModelConfig(model=directory, dtype="float32")
    return load_model(model_config), model_config.hf_config


def metadata(model, config, length, *, placeholders=None, prompt_length=None):
    """All rows of one prompt and its answer; a row of the answer knows the tokens up to its own alone."""
    specs = type(model).mask_specs(config)
    answer = length - (prompt_length or length)
    lengths = None if prompt_length is None else jnp.maximum(jnp.arange(length) + 1, prompt_length)
    prompt = prompt_intervals(specs, length - answer, placeholders or {})
    behind = {kind: causal(answer, offset=length - answer, window=spec.window) for kind, spec in specs.items()}
    return AttentionMetadata(
        intervals={
            kind: RowIntervals(*map(np.concatenate, zip(prompt[kind], behind[kind], strict=True))) for kind in specs
        },
        lengths=lengths,
    )


def logits_of(model, input_ids, positions, attn_metadata, arrays):
    hidden, _ = model(jnp.asarray(input_ids), jnp.asarray(positions), None, attn_metadata, **arrays)
    return model.compute_logits(hidden)


def inputs_of(config, prompt):
    """The golden prompt through the registries: the mappers' arrays, places of the items, positions of the prompt."""
    media = golden_files.media_of(prompt)
    limits = {modality: len(items) for modality, items in media.items()}
    model_config = ModelConfig(model=config.name_or_path, limit_mm_per_prompt=limits)
    inputs = LLMInputs(prompt_token_ids=prompt.prompt.tolist(), multi_modal_data=media)
    inputs = INPUT_REGISTRY.process_input(model_config, inputs)
    np.testing.assert_array_equal(inputs.prompt_token_ids, prompt.input_ids)
    arrays = dict(MULTIMODAL_REGISTRY.map_input(model_config, media))
    if config.model_type == "llava" and config.vision_config.model_type != "pixtral":
        # Mapping is scaling alone: that, for a test of the model alone.
        arrays = {"pixel_values": checkpoints.pixel_values(prompt.images)} if prompt.images else {}
    positions = prompt_positions(model_config, prompt.input_ids, map_media(model_config, inputs))
    return arrays, inputs.placeholders, positions


def positions_of(prompt_positions, length):
    """Of all rows, those of the answer behind those of the prompt."""
    if prompt_positions is None:
        return np.arange(length)
    axes, known = prompt_positions.shape
    behind = prompt_positions.max() + 1 + np.arange(length - known)
    return np.concatenate([prompt_positions, np.broadcast_to(behind, (axes, length - known))], axis=1)


def run(model, *args):
    """`logits_of`, compiled."""
    graphdef, params = nnx.split(model)

    def call(params, *args):
        return logits_of(nnx.merge(graphdef, params), *args)

    return np.asarray(jax.jit(call, compiler_options=COMPILE_FAST)(params, *args))


def prefill_logits(model, config, prompt):
    """Of the prompt alone ``[T, V]``, as a caller without an engine has it."""
    arrays, placeholders, positions = inputs_of(config, prompt)
    ids = prompt.input_ids
    attn_metadata = metadata(model, config, len(ids), placeholders=placeholders)
    return run(model, ids, positions_of(positions, len(ids)), attn_metadata, arrays)


def greedy_logits(model, config, prompt):
    """Of the prompt and the reference's answer but for its last token, in one call.

    Row by row: while the tokens so far are the reference's, greedy decoding would see this very row.
    """
    arrays, placeholders, positions = inputs_of(config, prompt)
    ids, length = prompt.continued, len(prompt.input_ids)
    attn_metadata = metadata(model, config, len(ids), placeholders=placeholders, prompt_length=length)
    return run(model, ids, positions_of(positions, len(ids)), attn_metadata, arrays)
