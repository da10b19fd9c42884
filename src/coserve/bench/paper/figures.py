"""What the paper reports, as data. None of these numbers is ours, and none of them enters a simulation.

FlexLLM: Token-Level Co-Serving of LLM Inference and Finetuning with SLO Guarantees, NSDI 2026, arXiv 2402.18789. Sources:

    text       said in the abstract or on the project's page
    figure     read off a figure, to about two digits
    scripts    outputs stored in the authors' repository of benchmarks
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

PAPER = "FlexLLM, NSDI 2026, arXiv 2402.18789"
Source = Literal["text", "figure", "scripts"]


class Reported(NamedTuple):
    """A number of the paper. quantity: a key of a result row, or a latency. model, rate: what it is of, in requests/s of four
    pipelines."""

    model: str
    rate: float
    quantity: str
    value: float
    source: Source


REPORTED: tuple[Reported, ...] = (
    Reported("Llama-3.1-8B", 4, "finetune_tokens_per_s", 9400, "figure"),
    Reported("Llama-3.1-8B", 20, "finetune_tokens_per_s", 7200, "figure"),
    Reported("Llama-3.1-8B", 20, "retained_share", 0.76, "figure"),
    Reported("Llama-3.1-8B", 20, "slo_attainment", 0.975, "figure"),
    Reported("Llama-3.1-8B", 20, "inference_tokens_per_s", 5200, "figure"),
    Reported("Llama-3.1-8B", 20, "tpot_mean_ms", 36.7, "scripts"),
    Reported("Llama-3.1-8B", 20, "tpot_p99_ms", 48.6, "scripts"),
    Reported("Llama-3.1-8B", 20, "ttft_mean_ms", 268, "scripts"),  # 181 in the queue, and 87 from there
    Reported("Qwen2.5-14B", 4, "finetune_tokens_per_s", 3800, "figure"),
    Reported("Qwen2.5-14B", 20, "finetune_tokens_per_s", 2200, "figure"),
    Reported("Qwen2.5-14B", 20, "retained_share", 0.59, "figure"),
    Reported("Qwen2.5-14B", 20, "slo_attainment", 0.965, "figure"),
    Reported("Qwen2.5-14B", 20, "inference_tokens_per_s", 5200, "figure"),
    Reported("Qwen2.5-32B", 4, "finetune_tokens_per_s", 3200, "figure"),
    Reported("Qwen2.5-32B", 20, "finetune_tokens_per_s", 2200, "figure"),
    Reported("Qwen2.5-32B", 20, "retained_share", 0.70, "figure"),
    Reported("Qwen2.5-32B", 20, "slo_attainment", 0.89, "figure"),
    Reported("Qwen2.5-32B", 20, "inference_tokens_per_s", 5200, "figure"),
)
"""Of co-serving, at 4 and at 20 requests/s."""

OVER_SEPARATE: Mapping[float, tuple[float, float]] = {4: (2.5, 6.8), 20: (1.9, 4.8)}
"""Finetuning of co-serving over three pipelines for inference and one for finetuning, by requests/s: least and most over
models. Source: text."""
OVER_DYNAMIC = (1.0, 1.7)
"""Finetuning of co-serving over dynamic temporal sharing: least and most over models and rates. Source: text."""

STAGES = ("none", "prune", "rematerialize", "token-level")
"""Of the compiler, in order; each has those before it too."""
MEMORY_GB: Mapping[str, tuple[float, ...]] = {
    "lora": (84.6, 21.5, 16.1, 12.5), "bottleneck": (84.6, 21.5, 21.5, 12.8), "ia3": (98.0, 28.2, 20.1, 12.8),
}
"""Activation memory of a 70B model at 1,024 tokens, by kind of adapter and in the order of STAGES. Source: figure."""

SURFACE_ROWS_MS: Mapping[int, float] = {0: 47, 8: 58, 56: 63, 120: 84, 248: 118, 504: 202}
"""A pass of a 70B model on four A100: 8 decode rows and so many forward rows of finetuning. Source: scripts."""
SURFACE_DECODE_ROWS, SURFACE_BACKWARD_TOKENS = 8, 1024
SURFACE_BACKWARD_MS = (53.0, 5.2)
"""The same decode rows beside a backward window of 1,024 tokens: a constant, and per layer. Source: scripts."""


def reported(model: str, rate: float) -> dict[str, float]:
    """{quantity: value} of a model at a rate of four pipelines."""
    return {entry.quantity: entry.value for entry in REPORTED if (entry.model, entry.rate) == (model, rate)}
