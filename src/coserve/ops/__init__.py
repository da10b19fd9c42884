"""The operator vocabulary: `table` says what each operator is, `kernels_for` what runs it, `torch_ops` is the oracle."""
