"""Device tensors without policy: memory, packed batches, running programs, the paged cache, sampling."""
