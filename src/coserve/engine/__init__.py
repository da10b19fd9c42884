"""The live engine: requests and finetuning jobs on one loaded model, in one process."""
