"""One process: a loaded model, the verbs of finetuning, and generation. Scheduling both together is the next step."""
