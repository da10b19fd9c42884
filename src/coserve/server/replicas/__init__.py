"""One address over several engines on several machines: what they share, and how they find each other."""
