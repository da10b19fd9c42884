"""A device that computes nothing and takes no time, for what the host does: a real engine, on the branches that CUDA takes.

Tensors are tiny ones on the CPU. What would launch a kernel is a function that does nothing: operators, attention, the copies
of kept values, the head, the sampler's kernels, a graph's replay. All else runs as it does beside a GPU: scheduling, rows and
tables, the loop over layers, sampling settings, commit, texts. Copies to the device stay, as copies in host memory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from coserve.compiler import factors
from coserve.core import StepPlan, StepResult
from coserve.engine.device import EngineDevice
from coserve.engine.engine import Engine
from coserve.engine.step import Lookup, StepRunner
from coserve.finetune.optimizer import FlatAdamW
from coserve.kernels import library, native
from coserve.kernels.triton import sampling
from coserve.model.architecture import Architecture
from coserve.model.decoder import MERGED, linear_shapes
from coserve.model.linear import make_head, make_linear
from coserve.model.weights import LayerWeights, ModelWeights
from coserve.ops import run as ops
from coserve.runtime import adapters, cache, fused, graphs, keeping, rows, sampler, sequences, spans
from coserve.runtime.executor import Executor
from coserve.runtime.loaded import LoadedModel
from coserve.text.tokenizer import ChatTokenizer

CPU = torch.device("cpu")
PHASES = ("plan", "rows", "pass", "sampler", "units", "tokens", "commit")
"""What a step consists of, in order: everything up to the plan; ids, rows and tables up to the first launch; the rest of the
pass; the sampler's settings and launches; units, optimizer slices and copies; the tokens' way to Python; commit and texts."""


def played_model(tokenizer: ChatTokenizer, *, layers: int = 32, vocab_size: int = 1 << 16) -> LoadedModel:
    """A model without values: tiny widths, and as many layers as a real one has."""
    arch = Architecture(
        model_type="llama", vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_layers=layers, num_heads=2,
        num_kv_heads=1, head_dim=16, rms_norm_eps=1e-5, max_position_embeddings=4096, tie_word_embeddings=False,
        qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False, sliding_windows=(None,) * layers,
        rope_inv_freq=tuple(1e4 ** (-i / 8) for i in range(8)), rope_scaling=1.0, eos_token_ids=(),
    )
    shapes, dtype = linear_shapes(arch), torch.bfloat16
    table = torch.zeros(vocab_size, arch.hidden_size, dtype=dtype)
    layer_weights = []
    for _ in range(layers):
        linears = {site: make_linear(torch.zeros(*shape, dtype=dtype), None, packed=False) for site, shape in shapes.items()}
        for name, sites in MERGED.items():
            weight = torch.zeros(sum(shapes[site][0] for site in sites), shapes[sites[0]][1], dtype=dtype)
            linears[name] = make_linear(weight, None, packed=False)
        norms = {name: torch.ones(arch.hidden_size, dtype=dtype) for name in ("input_layernorm", "post_attention_layernorm")}
        layer_weights.append(LayerWeights(linears, norms))
    norm = torch.ones(arch.hidden_size, dtype=dtype)
    weights = ModelWeights(arch, table, layer_weights, norm, make_head(table, packed=False))
    return LoadedModel("played", Path("played"), "played", tokenizer, weights, Executor(weights))


def nothing(*_: object, **__: object) -> None:
    """Stands for a launch."""


@dataclass
class Timeline:
    """When each phase of a step ended. clock: of the process's time, in seconds. replays: graphs that were replayed."""

    clock: Callable[[], float] = time.perf_counter
    ends: dict[str, float] = field(default_factory=dict)
    replays: int = 0
    tokens: Sequence[int] = (5,)
    """What is sampled, in turn."""
    drawn: int = 0

    def end(self, phase: str) -> None:
        """A phase is over, if it wasn't before."""
        self.ends.setdefault(phase, self.clock())

    def launched(self, *_: object, **__: object) -> None:
        """Something is launched: the end of the rows, if it is the first."""
        if "rows" not in self.ends:
            self.end("rows")

    def replay(self) -> None:
        """A graph is launched."""
        self.replays += 1
        self.launched()

    def draw(self, logits_BV: Tensor, *_: object, **__: object) -> Tensor:
        """The sampler's kernels."""
        count, known = logits_BV.shape[0], len(self.tokens)
        self.drawn += 1
        return torch.tensor([self.tokens[(self.drawn + row) % known] for row in range(count)])


class PlayedMark:
    """A moment of the device's time, which is the engine's."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.time_s = now()

    def passed(self) -> bool:
        return True

    def wait(self) -> None: ...

    def seconds_since(self, earlier: PlayedMark) -> float:
        return self.time_s - earlier.time_s


class PlayedRunner:
    """A real StepRunner whose iterations take the predicted time on the engine's clock."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline, self.now_s, self.plan = timeline, 0.0, StepPlan(number=0)
        self._mark_s = 0.0
        self._inner: StepRunner | None = None

    def clock(self) -> float:
        """The engine's clock, in seconds."""
        return self.now_s

    def attach(self, engine: Engine) -> None:
        """Runs what the engine plans."""
        self._inner = StepRunner(engine.device, self.clock, lambda: PlayedMark(self._device_clock))
        engine.runner = self

    def _device_clock(self) -> float:
        self._mark_s += self.plan.predicted_s / 2
        return self._mark_s

    def run(self, plan: StepPlan, lookup: Lookup) -> StepResult:
        """Runs one iteration."""
        assert self._inner is not None
        self.timeline.end("plan")
        self.plan, self._mark_s = plan, 0.0
        self._device_clock()
        result = self._inner.run(plan, lookup)
        self.now_s += plan.predicted_s
        self.timeline.end("tokens")
        return result


@contextlib.contextmanager
def played_device(timeline: Timeline) -> Iterator[None]:
    """Inside, engines on the CPU take CUDA's branches, and nothing computes. A model that is used inside may not be used
    outside."""
    pass_run, launch, result = fused.PassExecutor.run, sampler.launch, sampler.result
    pool_init = cache.KeyValuePool.__init__

    def run_pass(self: Any, *args: Any) -> Tensor:
        hidden = pass_run(self, *args)
        timeline.end("pass")
        return hidden

    def launch_sampler(*args: Any) -> Any:
        launched = launch(*args)
        timeline.end("sampler")
        return launched

    def take_tokens(*args: Any) -> Any:
        timeline.end("units")
        return result(*args)

    def make_pool(self: Any, *args: Any) -> None:
        pool_init(self, *args)
        self.scratch = self.num_blocks

    def logits(self: Any, hidden: Tensor) -> Tensor:
        return logits_of(hidden.shape[0])

    made: dict[int, Tensor] = {}

    def logits_of(count: int) -> Tensor:
        if count not in made:
            made[count] = torch.zeros(count, 512, dtype=torch.bfloat16)
        return made[count]

    def yes(*_: object) -> bool:
        return True

    runners: dict[Any, Any] = dict.fromkeys(ops.RUNNERS, nothing)
    joined: dict[Any, Any] = dict.fromkeys(ops.JOINED, nothing)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(ops.RUNNERS, runners))
        stack.enter_context(mock.patch.dict(ops.JOINED, joined))
        for owner, name, value in (
            (factors, "PAIRS", lambda *_: None),
            (ModelWeights, "embed", timeline.launched), (library, "label_rows", nothing), (keeping, "copy_rows", nothing),
            (cache.KeyValuePool, "move", nothing), (cache.KeyValuePool, "__init__", make_pool),
            (FlatAdamW, "update", nothing), (graphs, "record", lambda *_: timeline.replay),
            (sampling, "draw_tokens", timeline.draw), (sampler, "launch", launch_sampler), (sampler, "result", take_tokens),
            (fused.PassExecutor, "run", run_pass), (fused.PassExecutor, "logits", logits),
            (EngineDevice, "is_cuda", property(yes)), (native, "paged_attention_for", nothing),
            *((owner, "kernels_for", nothing) for owner in (library, cache)),
            *((owner, "runs_triton", yes) for owner in (spans, adapters, sampler, fused, sequences, library)),
            *((owner, "packs_attention", yes) for owner in (spans, rows)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
