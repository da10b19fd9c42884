"""Passes from the decoder and its bypasses to an execution plan: trace, differentiate, prune, rematerialize, lower.

Every pass is a pure function on small immutable graphs. Source: FlexLLM (NSDI 2026), static compilation.
"""
