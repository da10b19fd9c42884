"""Finetuning jobs: datasets, objectives, optimizer, cursor, checkpoints."""
