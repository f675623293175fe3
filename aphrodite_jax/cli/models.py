"""List the architectures that can be served, and what they take."""

import argparse

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from aphrodite_jax.architectures import known_architectures, resolve_architecture
    from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY

    rows = [("ARCHITECTURE", "TAKES", "CLASS", "TRAITS")]
    for name in known_architectures():
        architecture, _, tower = name.partition("/")
        model_cls = resolve_architecture([architecture], tower=tower or None)
        takes = ", ".join(["text", *MULTIMODAL_REGISTRY.modalities(model_cls)])
        traits = "; ".join(getattr(model_cls, "traits", ()))
        rows.append((name, takes, f"{model_cls.__module__}.{model_cls.__qualname__}", traits))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
