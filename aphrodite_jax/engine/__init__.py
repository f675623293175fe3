"""The host side of serving: requests, scheduling, pages, answers."""

from aphrodite_jax.engine.aphrodite_engine import AphroditeEngine

__all__ = ["AphroditeEngine"]
