"""Kernels: `reference` is the specification; `library`, `attention`, `cuda_attention` and `triton` are what runs, by `choose`.

`reference.py` holds plain, differentiable PyTorch for every operator; tests hold the others (library calls writing into planned
memory, forward and backward) against it.
"""
