"""Iterations of an engine on the device that computes nothing (`fake_cuda`), at the shapes of real models.

Models have their true widths and few layers: what a layer launches does not depend on how many there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import coserve.bench.paper
from coserve.compiler.plan import ModelPlan
from coserve.config.settings import AdapterConfig, LoraConfig, SamplingConfig
from coserve.core import Direction, Example, Unit
from coserve.engine.device import DeviceSetup, EngineDevice
from coserve.model.architecture import read_architecture
from coserve.model.checkpoint import expected_shapes
from coserve.model.weights import load_weights
from coserve.peft.adapter import Adapter
from coserve.peft.kinds import new_adapter
from coserve.planning.budget import JobPlans, Workload
from coserve.runtime.executor import Executor
from coserve.runtime.fused import TrainWindow
from coserve.runtime.loaded import LoadedModel
from coserve.runtime.microbatch import InFlight, microbatch_layout, pack
from coserve.runtime.sampler import SamplerRow
from coserve.runtime.spans import NO_ADAPTER, RowSpan
from tests.fake_cuda import FakeSource

LAYERS = 2
BLOCK = 16
MODELS = Path(coserve.bench.paper.__file__).parent / "models"


def fake_model(name: str, layers: int = LAYERS, dtype: torch.dtype = torch.bfloat16) -> LoadedModel:
    """A model of the widths of `Llama-3.1-8B` and its like, on the device, with so many layers."""
    arch = read_architecture(MODELS / name)
    arch = dataclasses.replace(arch, num_layers=layers, sliding_windows=arch.sliding_windows[:layers])
    source: Any = FakeSource(arch, expected_shapes(arch))
    weights = load_weights(source, dtype=dtype, device=torch.device("cuda"))
    tokenizer: Any = SimpleNamespace(eos_token_id=None)
    return LoadedModel(name, Path(name), "fake", tokenizer, weights, Executor(weights))


def fake_device(model: LoadedModel, *, blocks: int = 1 << 15, graphs: bool = False) -> EngineDevice:
    setup = DeviceSetup(
        num_blocks=blocks, block_tokens=BLOCK, max_adapters=128, max_lora_rank=64, max_graph_rows=64 if graphs else 0,
        group=None,
    )
    device = EngineDevice(model, setup)
    while device.capture_next():
        pass
    return device


def adapters(device: EngineDevice, configs: Sequence[AdapterConfig]) -> list[int]:
    """Slots of one new adapter each."""
    made = [new_adapter(device.model.weights, config, seed=number) for number, config in enumerate(configs)]
    return [device.slots.place(number, adapter) for number, adapter in enumerate(made)]


def spans(
    decode: int, prefill: Sequence[tuple[int, int]] = (), slots: Sequence[int] = (NO_ADAPTER,), context: int = 640
) -> tuple[list[RowSpan], list[RowSpan]]:
    """Rows of requests, in the order that an engine gives them. prefill: (start, end) per prompt. slots: taken in turn."""
    blocks = iter(range(10**6))

    def span(number: int, start: int, end: int) -> RowSpan:
        table = [next(blocks) for _ in range(-(-end // BLOCK))]
        return RowSpan(start, end, table, slots[number % len(slots)])

    first = [span(number, context - 1, context) for number in range(decode)]
    second = [span(number, *part) for number, part in enumerate(prefill)]
    return sorted(first, key=lambda s: s.slot), sorted(second, key=lambda s: s.slot)


def run_pass(
    device: EngineDevice, decode: Sequence[RowSpan], prefill: Sequence[RowSpan] = (), window: TrainWindow | None = None
) -> torch.Tensor:
    """A pass and the logits of all decode rows and of each prompt's last row."""
    rows = sum(span.end - span.start for span in (*decode, *prefill))
    device.run_pass([number % 97 for number in range(rows)], decode, prefill, window)
    chosen, end = list(range(len(decode))), len(decode)
    for span in prefill:
        end += span.end - span.start
        chosen.append(end - 1)
    return device.logits(chosen)


class FakeJob:
    """A micro-batch of examples of such lengths, every token of which is a label, with a new adapter that is trained."""

    def __init__(
        self, device: EngineDevice, config: AdapterConfig | None = None, lengths: Sequence[int] = (2048, 2048), *,
        dropout: float = 0.0, **options: Any,
    ) -> None:
        self.device, model = device, device.model
        config = config or LoraConfig(r=16, alpha=32, dropout=dropout)
        self.adapter: Adapter = new_adapter(model.weights, config, seed=0).trainable()
        arch, itemsize = model.architecture, model.dtype.itemsize
        plans = JobPlans(arch, self.adapter, Workload(sum(lengths), max(lengths)), itemsize=itemsize, **options)
        self.plan: ModelPlan = plans.fastest().plan
        examples = [
            Example(index=n, token_ids=np.arange(size) % 97, weights=np.ones(size, np.float32))
            for n, size in enumerate(lengths)
        ]
        self.batch = pack(examples, device=model.device)
        layout = microbatch_layout(self.plan, self.batch.num_tokens, arch, itemsize, forward_only=False)
        needed = -(-layout.total // device.pool.block_bytes)
        first = device.pool.num_blocks - needed
        assert first > 0, "a larger pool is needed"
        self.state: InFlight = device.train.begin(
            self.batch, self.plan, buffer=device.arena(first, device.pool.num_blocks)
        )
        self.layers = arch.num_layers

    def forward(self, start: int, end: int) -> Unit:
        """The forward unit of a window over all layers."""
        return Unit(Direction.FORWARD, 0, self.layers, start, end)

    def window(self, start: int, end: int) -> TrainWindow:
        """The same, to be fused into a pass."""
        return TrainWindow(self.state, self.forward(start, end), self.adapter)

    def run(self, unit: Unit, *, deterministic: bool = False) -> None:
        self.device.run_unit(self.state, unit, self.adapter, deterministic=deterministic)

    def sweep(self, window: int, *, deterministic: bool = False) -> None:
        """Forward and backward in windows of so many tokens."""
        tokens = self.batch.num_tokens
        for start in range(0, tokens, window):
            self.run(self.forward(start, min(start + window, tokens)), deterministic=deterministic)
        self.backward(window, deterministic=deterministic)

    def backward(self, window: int, *, deterministic: bool = False) -> None:
        """Backward in windows of so many tokens, layer by layer, after forward."""
        tokens = self.batch.num_tokens
        self.state.coefficients_set = True
        for layer in reversed(range(self.plan.lowest_trained, self.layers)):
            for start in reversed(range(0, tokens, window)):
                unit = Unit(Direction.BACKWARD, layer, layer + 1, start, min(start + window, tokens))
                self.run(unit, deterministic=deterministic)


def sampler_rows(samplings: Sequence[SamplingConfig]) -> list[SamplerRow]:
    """One row for each of some settings."""
    return [
        SamplerRow(sampling, seed=number, position=12, prompt=[1, 2, 3], output=[4, 5], ending=frozenset({2}))
        for number, sampling in enumerate(samplings)
    ]
