"""What the server measures and tells of itself."""
