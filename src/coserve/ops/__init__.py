"""The operator vocabulary: `table` says what each operator is, `run` what runs it."""
