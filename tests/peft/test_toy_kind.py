"""A kind of adapter made here: a gated bottleneck with a scaled output. It trains, prunes, plans and is served beside LoRA with
the package as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch

from coserve.config.settings import LoraConfig, OptimizerConfig
from coserve.core import InvalidRequest
from coserve.finetune.optimizer import FlatAdamW
from coserve.model.architecture import Architecture
from coserve.model.decoder import NoBypass
from coserve.ops.vocabulary import Vocabulary
from coserve.peft.adapter import Adapter, Parameter, num_elements
from coserve.peft.format import save_adapter
from coserve.peft.lora import LoraAdapter
from coserve.runtime.adapters import AdapterSlots
from coserve.runtime.plans import layer_bypasses, serving_plan, training_plans
from tests.compiler.test_compiler import CPU, F64, assert_memory_is_sound, compare_with_autograd, make_arch, random_weights
from tests.numerics.test_gradients import Case, pair, random_example, train_by_units

V = TypeVar("V")

# --- the kind ---


class ToyBypass(NoBypass):
    """(1 + s) (out + down(r silu(gate(x)) up(x))) at the MLP's first product; s and r are vectors, r of the adapter's size."""

    def __init__(self, names: frozenset[str], dropout: float) -> None:
        self.names = names

    def apply(self, ops: Vocabulary[V], site: str, x: V, out: V) -> V:
        if f"{site}.toy_gate" not in self.names:
            return out
        gate, up = (ops.segment_linear(x, f"{site}.toy_{part}") for part in ("gate", "up"))
        inner = ops.segment_scale(ops.silu_mul(gate, up), f"{site}.toy_inner")
        delta = ops.segment_linear(inner, f"{site}.toy_down")
        out = ops.add(out, delta)
        return ops.add(out, ops.segment_scale(out, f"{site}.toy_scale"))


def toy_adapter(arch: Architecture, size: int, site: str = "up_proj") -> Adapter:
    parameters: list[Parameter] = []
    for layer in range(arch.num_layers):
        for part, shape, axis in (
            ("gate", (size, arch.hidden_size), 0), ("up", (size, arch.hidden_size), 0),
            ("inner", (size, 1), 0), ("down", (arch.intermediate_size, size), 1), ("scale", (arch.intermediate_size, 1), None),
        ):
            offset = num_elements(parameters)
            parameters.append(Parameter(
                layer=layer, name=f"{site}.toy_{part}", shape=shape, offset=offset, rank_axis=axis, bound=0.3
            ))
    flat = torch.empty(num_elements(parameters), dtype=F64)
    return Adapter(None, ToyBypass, parameters, flat, num_layers=arch.num_layers).start(0).trainable()


# --- what it gets ---


def test_gradients_and_serving_equal_autograd() -> None:
    arch = make_arch(qkv_bias=True)
    adapter = toy_adapter(arch, 3)
    weights = random_weights(arch, torch.Generator().manual_seed(1))
    plan = training_plans(arch, adapter, itemsize=8).plan()
    wider = toy_adapter(arch, 5)  # as if it were in the batch
    widths = [wider.factor_widths(layer) for layer in range(arch.num_layers)]
    serving = serving_plan(arch, [adapter.kind], widths, itemsize=8)
    compare_with_autograd(weights, plan, layer_bypasses(arch, adapter), adapter, [6, 3], [4], [5], 0, serving)


def test_it_prunes_and_plans() -> None:
    arch = make_arch()
    plan = training_plans(arch, toy_adapter(arch, 3), itemsize=2).plan()
    for layer in plan.layers:
        layer.joint.check()
        assert set(layer.joint.weight_grads) == {f"up_proj.toy_{part}" for part in ("gate", "up", "inner", "down", "scale")}
        assert layer.backward is not None
        assert_memory_is_sound(layer.backward, 2)
    kept = {value.name for value in plan.layers[0].kept}
    assert {"up_proj.toy_gate", "up_proj.toy_up"} <= kept, "silu_mul reads them"
    assert "down_proj" not in kept, "what only frozen weights' gradients would read"
    assert plan.layers[0].joint.input_grad is None, "nothing trains below"


def test_it_trains() -> None:
    weights = pair("llama", None).weights
    adapter = toy_adapter(weights.architecture, 4)
    assert adapter.grad is not None
    optimizer = FlatAdamW(OptimizerConfig(), adapter.flat, adapter.grad, changed=adapter.refresh)
    examples = (random_example(np.random.default_rng(0), 0, 12),)
    case = Case("llama", None, LoraConfig(), examples, "sft", 256, 1)
    losses = []
    for _ in range(12):
        losses.append(-float(train_by_units(case, weights, adapter).logprobs.mean()))
        optimizer.step(2e-2)
    assert losses[-1] < 0.7 * losses[0]


def test_it_has_a_slot_beside_lora() -> None:
    arch = make_arch()
    slots = AdapterSlots(arch, F64, CPU, max_slots=2, max_rank=8)
    lora = LoraAdapter.create(arch, LoraConfig(r=2), dtype=F64, device=CPU, seed=0)
    slots.place("lora", lora)
    toy = toy_adapter(arch, 3)
    slot = slots.place("toy", toy)
    assert slots.kinds == (lora.kind, ToyBypass)
    matrix = slots.factor(1, "up_proj.toy_down")
    factor = toy.factor(1, "up_proj.toy_down")
    assert matrix is not None
    assert factor is not None
    assert torch.equal(matrix[slot, :3], factor.matrix.T)


def test_a_kind_without_a_file_format_is_not_written(tmp_path: Path) -> None:
    toy = toy_adapter(make_arch(), 2)
    with pytest.raises(InvalidRequest, match="no file format"):
        save_adapter(tmp_path, toy, toy.flat, base_name="x", fingerprint="x")
