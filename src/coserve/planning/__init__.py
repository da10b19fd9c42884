"""How much memory training takes, and the plan that fits."""
