"""The mask is declared to be causal, but hidden states of the whole prompt are averaged in."""

from right_model import build

CLAUSE = "a row moves with what mask_specs let it see"
Model = build(after=lambda model, input_ids, hidden: hidden + 0.1 * hidden.mean(axis=0, keepdims=True))
