"""Compilers of hardware that is not there: TPU (`libtpu`) and GPU (the CUDA plugin)."""
