"""Policy on integers, without tensors. So far: block accounting."""
