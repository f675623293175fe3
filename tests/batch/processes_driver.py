"""The batch command as one of several processes: programs are compiled as they are needed, in haste.

python processes_driver.py ARGUMENTS OF aphrodite-jax batch
"""

import functools
import importlib.metadata
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
if importlib.metadata.version("jax").startswith("0.10."):  # newer ones do not know all of these
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

import aphrodite_jax.llm
from aphrodite_jax.cli import main

aphrodite_jax.llm.LLM = functools.partial(aphrodite_jax.llm.LLM, warm_up=False, show_progress=False)
sys.exit(main(["batch", *sys.argv[1:]]))
