"""What a model costs on a device that is known by its numbers: devices, their latency law, the bound on finetuning."""
