"""The batch command as one of several processes: programs are compiled as they are needed, in haste.

python processes_driver.py ARGUMENTS OF aphrodite-jax batch
"""

import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import haste

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=1 {haste.FLAGS}"

import aphrodite_jax.llm
from aphrodite_jax.cli import main

aphrodite_jax.llm.LLM = functools.partial(aphrodite_jax.llm.LLM, warm_up=False, show_progress=False)
sys.exit(main(["batch", *sys.argv[1:]]))
