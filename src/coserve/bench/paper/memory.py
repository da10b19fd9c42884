"""Activation memory of a 70B model by the compiler's stages, beside the paper's.

Owns: which training. Does not own: the estimate (planning/estimate.py), the paper's figures (figures.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from coserve.bench.paper.figures import MEMORY_GB, STAGES
from coserve.bench.paper.models import LARGE, read_shape
from coserve.bench.simulated import ITEMSIZE
from coserve.compiler.report import report
from coserve.config.settings import AdapterConfig, BottleneckConfig, IA3Config, LoraConfig
from coserve.planning.budget import shape_adapter
from coserve.planning.estimate import Shape, estimate
from coserve.runtime.plans import layer_bypasses

SEQUENCE_LENGTH, WINDOW_TOKENS = 1024, 256
KINDS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=16, target_modules=("down_proj",)), "bottleneck": BottleneckConfig(), "ia3": IA3Config(),
}
"""By kind, in the order of the paper."""


def memory_rows() -> Iterator[dict[str, Any]]:
    """One per kind of adapter and stage. bytes: kept activations, gradients, workspace and loss at the peak; for `none`, every
    forward value is kept instead. paper_gb: what the paper's figure has."""
    arch = read_shape(LARGE)
    for kind, settings in KINDS.items():
        adapter = shape_adapter(arch, settings)
        shape = Shape(
            arch=arch, itemsize=ITEMSIZE, num_tokens=SEQUENCE_LENGTH, sequence_length=SEQUENCE_LENGTH,
            window_tokens=WINDOW_TOKENS, num_parameters=adapter.flat.numel(),
        )
        found = estimate(shape, layer_bypasses(arch, adapter, dropout=adapter.dropout), None)
        stages = {stage.name: stage for stage in found.stages}
        every = sum(len(entry.layers) * entry.all_bytes for entry in report(found.plan, itemsize=ITEMSIZE)) * SEQUENCE_LENGTH
        pruned = stages["prune"]
        sizes = {"none": pruned.total_bytes - pruned.parts["kept activations"] + every}
        sizes |= {name: stage.total_bytes for name, stage in stages.items()}
        for name, paper_gb in zip(STAGES, MEMORY_GB[kind], strict=True):
            yield {"experiment": "memory", "model": LARGE, "adapter": kind, "stage": name, "bytes": sizes[name],
                   "paper_gb": paper_gb}
