"""Kernels: `reference` is the specification in plain torch, `triton_*` its CUDA twins, chosen by dispatch."""
