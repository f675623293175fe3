"""What a model takes on devices that need not be there: its real programs, compiled, and what follows from them."""

from aphrodite_jax.planning.bare_config import with_processor
from aphrodite_jax.planning.plan import make_plan
from aphrodite_jax.planning.report import Plan, as_json, as_text
from aphrodite_jax.planning.targets import Target, find_target
from aphrodite_jax.planning.workload import Workload

__all__ = ["Plan", "Target", "Workload", "as_json", "as_text", "find_target", "make_plan", "with_processor"]
