"""Flags with which XLA compiles for CPUs in haste: compiling takes most of the tests' time, and so about half of it.

No import of jax, which reads its flags when it starts. What tests start as commands compiles as it does for users.
"""

import importlib.metadata

FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jax").startswith("0.10."):  # newer ones do not know it
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
