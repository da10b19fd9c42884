"""Kernels: `reference` is the specification, `library` and `attention` are what runs.

`reference.py` holds plain, differentiable PyTorch for every operator; tests hold the others (library calls writing into planned
memory, forward and backward) against it.
"""
