"""Kernels: `reference` is the specification; `library`, `attention`, `cuda_attention`, `triton` and `native` run.

`reference.py` holds plain, differentiable PyTorch for every operator; tests hold the others (library calls writing into planned
memory, forward and backward) against it.
"""
