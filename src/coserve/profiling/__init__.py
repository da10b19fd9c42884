"""What rows and units cost on this machine: measuring and fitting."""
