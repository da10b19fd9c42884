"""Running finetuning jobs on tensors."""
