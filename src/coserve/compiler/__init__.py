"""The compiler: from the decoder layer with its bypass to an execution plan. Source: FlexLLM (NSDI 2026), static compilation.

trace -> differentiate -> prune -> pack_signs -> rematerialize -> to_fp8 -> lower. A compiler pass is a pure function on small
immutable graphs; `passes.run_passes` runs each and verifies what it made.
"""
