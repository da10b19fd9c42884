"""Kernels: `reference` is the specification, `library` is what runs.

`reference.py` holds plain, differentiable PyTorch for every operator; tests hold `library.py` (library calls writing into
planned memory, forward and backward) against it. Everything else imports `coserve.kernels.library`.
"""
