"""What the server remembers: rows, files, manifests, and whose they are."""
