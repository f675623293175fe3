"""How checkpoint names become parameter paths: a table of patterns, and what kind of parameter takes what.

A model class carries its table as ``weight_rules``. The rules are tried in order and the first match wins;
its replacement is the parameter's dotted path in the nnx module, ending in the checkpoint's own leaf name
(``weight`` or ``bias``), which the kind of module there turns into ``kernel``, ``scale`` or ``embedding`` and
into a transform of the array. A rule whose ``path`` is None names tensors that the model does not use.
"""

import dataclasses
import re

__all__ = ["WeightRule"]


@dataclasses.dataclass(frozen=True)
class WeightRule:
    """Checkpoint names that match all of ``pattern`` go to ``path``, a `re` template; None drops them."""

    pattern: str
    path: str | None

    def apply(self, name: str) -> tuple[bool, str | None]:
        """``(matched, path)`` for a checkpoint name."""
        match = re.fullmatch(self.pattern, name)
        if match is None:
            return False, None
        return True, None if self.path is None else match.expand(self.path)
