"""Which stored tensor fills which parameter, and everything that does not fit, in one error."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from aphrodite_jax.errors import CheckpointError
from aphrodite_jax.modeling.loader.parameters import WantedTensor
from aphrodite_jax.modeling.loader.safetensors_file import FLOAT_DTYPES, StoredTensor
from aphrodite_jax.modeling.loader.weight_rules import WeightRule

__all__ = ["TIED_HEAD", "find_path", "match"]

TIED_HEAD = "lm_head.weight"
"""A checkpoint may carry the output head though the model computes logits with its input embeddings."""
SHOWN = 8
"""Names that a message shows of each kind of problem."""


def match(
    rules: Sequence[WeightRule],
    stored: Mapping[str, StoredTensor],
    wanted: Mapping[str, WantedTensor],
    *,
    source: str,
) -> tuple[dict[str, str], dict[str, str]]:
    """``(chosen, tied)``: names that are wanted to names that are stored; for heads that tied embeddings replace, too.

    Raises:
      CheckpointError: missing, unmatched, ambiguous, misshapen and unreadable tensors, all of them.
    """
    candidates = defaultdict(list)
    problems = defaultdict(list)
    tied = {}
    for name in sorted(stored):
        matched, path = find_path(rules, name)
        if not matched:
            problems["unmatched"].append(f"{name} (no rule)")
        elif path in wanted:
            candidates[path].append(name)
        elif path is not None and (path == TIED_HEAD or path.endswith("." + TIED_HEAD)):
            tied[path] = name
        elif path is not None:
            problems["unmatched"].append(f"{name} (the model has no {path})")
    for path, tensor in wanted.items():
        names = candidates[path]
        if not names:
            problems["missing"].append(path)
        elif len(names) > 1:
            problems["ambiguous"].append(f"{path} from {' and '.join(names)}")
        elif stored[names[0]].shape != tensor.shape:
            expected = list(tensor.shape)
            problems["misshapen"].append(f"{names[0]} is {list(stored[names[0]].shape)}, expected {expected}")
        elif stored[names[0]].dtype not in FLOAT_DTYPES:
            problems["not floating point"].append(f"{names[0]} is {stored[names[0]].dtype}")
    if problems:
        raise CheckpointError(_report(source, problems))
    return {path: candidates[path][0] for path in wanted}, tied


def find_path(rules: Sequence[WeightRule], name: str) -> tuple[bool, str | None]:
    """``(matched, path)`` by the first rule that matches ``name``."""
    for rule in rules:
        matched, path = rule.apply(name)
        if matched:
            return True, path
    return False, None


def _report(source: str, problems: Mapping[str, Sequence[str]]) -> str:
    lines = [f"the checkpoint {source} does not fit its model:"]
    for kind in ("missing", "unmatched", "ambiguous", "misshapen", "not floating point"):
        names = problems.get(kind, ())
        if names:
            more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {kind} ({len(names)}): {'; '.join(names[:SHOWN])}{more}")
    lines.append("Check that config.json belongs to these files and that all of them are there")
    return "\n".join(lines)
