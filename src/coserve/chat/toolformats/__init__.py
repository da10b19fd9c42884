"""How models write calls of tools: for each format a reader of an output's text, and a grammar that allows nothing else."""
