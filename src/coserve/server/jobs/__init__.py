"""Finetuning jobs, from the body of a request to a tuned model."""
