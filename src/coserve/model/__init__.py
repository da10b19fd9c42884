"""What a backbone is and where its weights come from: architecture, checkpoints, GGUF files, locating models."""
