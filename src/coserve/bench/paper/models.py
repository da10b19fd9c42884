"""The models of the paper's evaluation, and how it served them.

Owns: which models, on how many devices, under which objectives. Their shapes are the published config.json files in models/,
without what a shape doesn't need. Does not own: the paper's results (figures.py), the device (device.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from coserve.bench.metrics import SloInMs
from coserve.model.architecture import Architecture, read_architecture

NUM_PIPELINES = 4
"""Copies of a model that serve one load together. The paper measured one of them and multiplied by this, and so do we."""
TTFT_MS = 5000.0


class PaperModel(NamedTuple):
    """One model as the paper ran it. tensor_parallel_size: devices of one pipeline. tpot_ms: objective."""

    name: str
    tensor_parallel_size: int
    tpot_ms: float

    @property
    def objectives(self) -> SloInMs:
        return SloInMs(ttft_ms=TTFT_MS, tpot_ms=self.tpot_ms)

    @property
    def arch(self) -> Architecture:
        return read_shape(self.name)


MODELS: Mapping[str, PaperModel] = {
    model.name: model for model in (
        PaperModel("Llama-3.1-8B", 1, 45.0), PaperModel("Qwen2.5-14B", 2, 75.0), PaperModel("Qwen2.5-32B", 4, 75.0),
    )
}
"""By name."""
LARGE, LARGE_RANKS = "Llama-3.1-70B", 4
"""The model of the paper's memory figures and of its latency surface, and the devices of the latter."""


def model_directory(name: str) -> Path:
    """The directory of a model's config.json."""
    return Path(__file__).parent / "models" / name


def read_shape(name: str) -> Architecture:
    """The architecture of one of the models."""
    return read_architecture(model_directory(name))
