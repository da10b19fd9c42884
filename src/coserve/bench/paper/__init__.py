"""The paper's evaluation by arithmetic: its models, loads and policies on a law of its devices."""
