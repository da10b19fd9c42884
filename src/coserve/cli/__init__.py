"""The command `coserve`."""
