"""``python -m aphrodite_jax`` is the command ``aphrodite-jax``."""

import sys

from aphrodite_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
