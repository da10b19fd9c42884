"""Kept values in fewer bytes: what is packed is what was there (signs exactly, fp8 as closely as its bits can), the passes pack
what they may and nothing else, and backward reads what forward packed."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from coserve.compiler.compress import pack_signs, to_fp8
from coserve.compiler.differentiate import differentiate
from coserve.compiler.graph import Element, Graph, JointGraph, Node, Value
from coserve.compiler.lower import lower
from coserve.compiler.plan import ModelPlan, TrainingPlans
from coserve.compiler.prune import prune
from coserve.compiler.rematerialize import curve, rematerialize
from coserve.config.settings import LINEAR_SITES, Compression, LoraConfig
from coserve.core import Direction, Unit
from coserve.kernels import library
from coserve.model.decoder import MERGED, NoBypass
from coserve.model.weights import ModelWeights
from coserve.ops.vocabulary import Vocabulary
from coserve.peft.adapter import Adapter, Parameter, num_elements
from coserve.planning.budget import JobPlans, Workload, shape_adapter
from coserve.runtime.executor import Executor, TrainExecutor
from coserve.runtime.memory import columns
from coserve.runtime.microbatch import InFlight, pack
from coserve.runtime.plans import layer_bypasses
from tests import oracle
from tests.compiler.test_compiler import assert_arena_is_sound, assert_memory_is_sound, lora_layers, make_arch, pruned_layer
from tests.numerics.test_gradients import TOLERANCE, Case, pair, random_adapter, random_example, train_by_units
from tests.numerics.test_kinds import cases

V = TypeVar("V")
COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)
CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
LLAMA_70B = make_arch(layers=80, heads=64, kv_heads=8, head_dim=128, hidden=8192, inner=28672)


# --- kernels ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8, 9, 64, 577])
def test_signs_come_back(dtype: torch.dtype, width: int) -> None:
    x = torch.randn(5, width + 3, dtype=dtype).relu()[:, 3:]
    bits = torch.full((5, -(-width // 8)), 255, dtype=torch.uint8)
    library.sign_bits(bits, x)
    out = torch.full((5, width), 9, dtype=dtype)
    library.sign_values(out, bits)
    assert torch.equal(out, (x > 0).to(dtype))


def through_fp8(x: Tensor) -> Tensor:
    """Encoded and decoded, between other columns as in an arena."""
    stored = torch.zeros(x.shape[0], x.shape[1] + 5, dtype=torch.uint8)
    bits, exponent = stored[:, 2 : 2 + x.shape[1]], stored[:, -1:]
    library.fp8_encode(bits, exponent, x)
    out = torch.empty_like(x)
    library.fp8_decode(out, bits, exponent)
    return out


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), dtype=st.sampled_from(DTYPES), width=st.integers(1, 40), power=st.integers(-40, 40))
def test_fp8_is_within_half_a_unit(seed: int, dtype: torch.dtype, width: int, power: int) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(4, width, dtype=torch.float64) * 2.0**power * torch.randn(4, 1, dtype=torch.float64).exp()).to(dtype)
    have = through_fp8(x)
    largest = x.abs().amax(1, keepdim=True)
    bound = torch.maximum(x.abs() / 16, largest * 2.0**-17)
    assert torch.all((have - x).abs() <= bound * (1 + 1e-6))
    assert torch.all((have - x).abs().amax(1, keepdim=True) <= largest / 16 * (1 + 1e-6))
    assert torch.equal(through_fp8(have), have), "what fp8 can hold stays"
    rows = torch.stack([through_fp8(row[None])[0] for row in x])
    assert torch.equal(rows, have), "a row's bytes depend on that row"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_read_as_pytorch_reads_it(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    out = torch.empty(1, 256, dtype=dtype)
    library.fp8_decode(out, codes, torch.full((1, 1), 127, dtype=torch.uint8))
    wanted = codes.view(torch.float8_e4m3fn).to(dtype)
    assert torch.equal(out[~wanted.isnan()], wanted[~wanted.isnan()])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), power=st.integers(-12, 12))
def test_fp8_of_float16(seed: int, power: int) -> None:
    """Its rows can't be multiplied by more than its own largest power of two."""
    torch.manual_seed(seed)
    x = (torch.randn(4, 33) * 2.0**power).half()
    bound = torch.maximum(x.abs().float() / 16, x.abs().amax(1, keepdim=True) * 2.0**-17).clamp(min=2.0**-24)
    assert torch.all((through_fp8(x).float() - x.float()).abs() <= bound * (1 + 1e-6))


def test_fp8_at_the_ends_of_its_range() -> None:
    exact = torch.tensor([[448.0, -448.0, 2.0**-6, 0.0], [449.0, 1.0, 0.5, -0.25], [0.0, 0.0, 0.0, 0.0]])
    have = through_fp8(exact)
    assert torch.equal(have[0], exact[0]) and torch.equal(have[2], exact[2])
    assert torch.equal(have[1], torch.tensor([448.0, 1.0, 0.5, -0.25]))
    tiny, huge = torch.full((1, 3), 1e-40), torch.full((1, 3), 3e38)
    assert torch.all(through_fp8(tiny).isfinite())
    assert torch.allclose(through_fp8(huge), huge, rtol=1 / 16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fp8_keeps_a_bad_row_to_itself(bad: float) -> None:
    x = torch.randn(3, 8)
    clean = through_fp8(x)
    x[1, 4] = bad
    have = through_fp8(x)
    assert torch.equal(have[[0, 2]], clean[[0, 2]])
    assert have[1].isnan().all()


# --- passes ---


def relu_between(readers: str) -> Graph:
    """x -> a -> relu -> y, where the last product's parameter trains if `readers` says so."""
    nodes = (Node("linear", ("x",), ("a",), "w"), Node("relu", ("a",), ("r",)), Node(readers, ("r",), ("y",), "v"))
    return Graph({name: Value(name, 12) for name in ("x", "a", "r", "y")}, nodes, "x", "y")


def test_signs_are_packed_where_nothing_else_is_read() -> None:
    joint = prune(differentiate(JointGraph.of(relu_between("linear"))), trainable=lambda name: name == "w", input_gradient=True)
    packed = pack_signs(joint)
    packed.check()
    assert [str(node) for node in packed.forward.nodes[2:]] == ["r.signs = sign_bits(r)", "y = linear[v](r)"]
    assert [str(node) for node in packed.backward[1:3]] == ["r.sign = sign_values(r.signs)", "d:a = relu_dgrad(d:r, r.sign)"]
    assert {kept.name for kept in rematerialize(joint).kept} == {"x", "r"}
    choice = rematerialize(packed)
    assert {kept.name for kept in choice.kept} == {"x", "r.signs"}
    assert choice.num_bytes == 12 * 4 + 2


def test_signs_are_not_packed_where_the_value_is_read_too() -> None:
    joint = prune(differentiate(JointGraph.of(relu_between("linear"))), trainable=lambda name: name == "v", input_gradient=True)
    assert pack_signs(joint) == joint


@pytest.mark.parametrize("itemsize", [2, 4])
def test_fp8_takes_all_but_what_others_read(itemsize: int) -> None:
    joint = pruned_layer(["down_proj", "q_proj"], arch=LLAMA_70B, rank=16)
    exact, choice = rematerialize(joint, itemsize), rematerialize(joint, itemsize, fp8=True)
    kept = to_fp8(itemsize, choice)
    kept.check()
    names = {entry.name for entry in kept.kept}
    whole = {name for name in names if not name.endswith((".fp8", ".exponent"))}
    assert whole == {"q_proj+lora.rope", "k_proj.rope", "v_proj", "log_sum_exp"}
    assert {entry.name for entry in choice.kept} == whole | {name.removesuffix(".fp8") for name in names if ".fp8" in name}
    assert kept.num_bytes == choice.num_bytes
    covered = sum(joint.values[entry.name].width for entry in exact.kept if entry.name not in whole)
    left = sum(joint.values[name].num_bytes(itemsize) for name in whole)
    assert exact.num_bytes == covered * itemsize + left
    assert kept.num_bytes == covered + left + sum(".fp8" in name for name in names), "a byte each, and one per row"


def test_70b_keeps_half_in_fp8() -> None:
    """2-byte values of LoRA on down_proj: all but q, K, V and log-sum-exp halve."""
    layers = layer_bypasses(LLAMA_70B, shape_adapter(LLAMA_70B, LoraConfig(r=16, target_modules=("down_proj",))))
    exact, small = (TrainingPlans(LLAMA_70B, layers, itemsize=2, compression=how).plan() for how in ("lossless", "fp8"))
    left = (64 + 2 * 8) * 128 * 2 + 64 * 4
    (_, whole, *_), (_, half, *_) = exact.layers, small.layers
    assert 0.5 <= (half.arena_bytes - left) / (whole.arena_bytes - left) < 0.502
    assert small.arena_bytes < 0.57 * exact.arena_bytes
    assert small.recompute_flops == 0


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("sites", [("down_proj",), ("q_proj", "v_proj"), LINEAR_SITES])
def test_q_is_made_again_only_with_what_came_of_it(sites: tuple[str, ...], qk_norm: bool) -> None:
    """Log-sum-exp of another q than backward sees would make rows of probabilities that don't sum to 1."""
    joint = pruned_layer(sites, arch=make_arch(qk_norm=qk_norm), rank=4)
    q, = joint.read_exactly()
    again = []
    for remat in curve(joint, 2, 512.0, fp8=True):
        made = {name for node in remat.recompute for name in node.outputs}
        assert q not in made or {"log_sum_exp", "attention"} <= made
        to_fp8(2, remat).check()
        again.append(q in made)
    assert not again[0] and again[-1]
    assert any(
        q in made and "log_sum_exp" not in made
        for remat in curve(joint, 2, 512.0) for made in [{name for node in remat.recompute for name in node.outputs}]
    ), "values as they are need no such care"


@settings(max_examples=15, deadline=None)
@given(
    sites=st.sets(st.sampled_from(LINEAR_SITES), min_size=1), qk_norm=st.booleans(), dropout=st.sampled_from([0.0, 0.3]),
    itemsize=st.sampled_from([2, 4, 8]), number=st.integers(0, 30),
)
def test_programs_are_sound(sites: set[str], qk_norm: bool, dropout: float, itemsize: int, number: int) -> None:
    arch = make_arch(qk_norm=qk_norm)
    layers = lora_layers(sites, 3, dropout)
    points = TrainingPlans(arch, layers, itemsize=itemsize, compression="fp8").frontier()
    point = points[min(number, len(points) - 1)]
    plan = TrainingPlans(arch, layers, itemsize=itemsize, compression="fp8").plan(point.arena_bytes)
    assert plan.arena_bytes == point.arena_bytes
    for layer in plan.layers:
        layer.joint.check()
        assert_arena_is_sound(layer, itemsize)
        for program in (layer.forward, layer.backward):
            if program is not None:
                assert_memory_is_sound(program, itemsize)
        packed = [storage for storage in layer.arena if storage.element is Element.BYTE]
        assert len(packed) <= 1, "what is packed lies side by side"


def test_settings_choose() -> None:
    arch = make_arch()
    adapter = shape_adapter(arch, LoraConfig(r=4))
    found = {
        how: JobPlans(arch, adapter, Workload(64, 64), itemsize=4, compression=how).fit(1e12)
        for how in ("none", "lossless", "fp8")
    }
    assert found["fp8"].num_bytes < found["lossless"].num_bytes == found["none"].num_bytes
    assert "fp8, which changes gradients" in str(found["fp8"])
    assert "fp8" not in str(found["lossless"])


# --- running ---


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(), budget=st.sampled_from([1.0, 0.7, 0.3, 0.0]))
def test_fp8_gradients_are_the_same_in_any_split(case: Case, budget: float) -> None:
    """A row's bytes don't depend on the windows that it is in."""
    case = replace(case, budget=budget, compression="fp8")
    weights = pair(case.family, case.sliding_window).weights
    num_layers, num_tokens = weights.architecture.num_layers, sum(example.num_tokens for example in case.examples)
    adapters = [random_adapter(weights, case.config, case.seed) for _ in range(2)]
    train_by_units(case, weights, adapters[0])
    whole = [
        [Unit(direction, 0, num_layers, 0, num_tokens)] for direction in (Direction.FORWARD, Direction.BACKWARD)
    ]
    train_by_units(case, weights, adapters[1], *whole)
    own, expected = (oracle.own_gradients(adapter) for adapter in adapters)
    assert oracle.worst_error(own, expected) <= TOLERANCE


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(), number=st.integers(0, 30))
def test_backward_reads_what_fp8_kept(case: Case, number: int) -> None:
    """The same gradients come from a plan that keeps the same values whole, if these are rounded between the passes."""
    weights = pair(case.family, case.sliding_window).weights
    adapter = random_adapter(weights, case.config, case.seed)
    small, whole = twin_plans(weights, adapter, number)
    gradients = []
    for plan in (small, whole):
        assert adapter.grad is not None
        adapter.grad.zero_()
        executor, batch = TrainExecutor(Executor(weights)), pack(case.examples, device=CPU)
        state = executor.begin(batch, plan)
        for direction in (Direction.FORWARD, Direction.BACKWARD):
            executor.run(state, Unit(direction, 0, len(plan.layers), 0, batch.num_tokens), adapter)
            if direction is Direction.FORWARD:
                state.set_coefficients(-0.1 * batch.label_weights)
                if plan is whole:
                    round_kept(state)
        gradients.append(oracle.own_gradients(adapter))
    assert oracle.worst_error(*gradients) <= TOLERANCE


def twin_plans(weights: ModelWeights, adapter: Adapter, number: int) -> tuple[ModelPlan, ModelPlan]:
    """A plan of fp8's curve, and the one that keeps the same values as they are."""
    arch = weights.architecture
    plans = TrainingPlans(arch, layer_bypasses(arch, adapter), itemsize=8, compression="fp8")
    small, whole = {}, {}
    for key, joint in plans.graphs.items():
        choices = curve(joint, 8, plans.contexts[key], fp8=True)
        remat = choices[min(number, len(choices) - 1)]
        small[key], whole[key] = plans.lower(key, remat), lower(remat, merged=MERGED, itemsize=8)
    return tuple(ModelPlan(layers=tuple(twin[key] for key in plans.keys)) for twin in (small, whole))  # type: ignore[return-value]


def round_kept(state: InFlight) -> None:
    """Rounds what a micro-batch keeps as fp8 would."""
    for number, layer in enumerate(state.plan.layers):
        whole = layer.joint.read_whole() if layer.backward is not None else layer.joint.forward.values.keys()
        for name, slot in layer.kept_slots.items():
            if name not in whole and layer.joint.values[name].element is Element.MODEL:
                rows = columns(state.arena.storage(number, slot.storage), slot)
                rows.copy_(through_fp8(rows))
        rows = state.arena.input(number)
        if rows is not None:
            rows.copy_(through_fp8(rows))


class OutwardBypass(NoBypass):
    """out + relu(W x): what comes out of the ReLU is only added."""

    def __init__(self, names: frozenset[str], dropout: float) -> None:
        self.names = names

    def apply(self, ops: Vocabulary[V], site: str, x: V, out: V) -> V:
        name = f"{site}.outward"
        return ops.add(out, ops.relu(ops.segment_linear(x, name))) if name in self.names else out


def test_sign_bits_change_no_bit_of_the_gradients() -> None:
    weights = pair("llama", None).weights
    arch, rng = weights.architecture, np.random.default_rng(3)
    shape = (arch.intermediate_size, arch.hidden_size)
    parameters: list[Parameter] = []
    for layer in range(arch.num_layers):
        offset = num_elements(parameters)
        parameters.append(Parameter(layer=layer, name="up_proj.outward", shape=shape, offset=offset, rank_axis=0, bound=0.3))
    flat = torch.empty(num_elements(parameters), dtype=torch.float64)
    adapter = Adapter(None, OutwardBypass, parameters, flat, num_layers=arch.num_layers).start(0).trainable()
    examples = tuple(random_example(rng, index, length) for index, length in enumerate([9, 5]))
    found = {}
    for how in COMPRESSIONS[:2]:
        for budget in (1.0, 0.0):
            case = Case("llama", None, LoraConfig(), examples, "sft", 256, 3, budget, how)
            assert adapter.grad is not None
            adapter.grad.zero_()
            state = train_by_units(case, weights, adapter)
            kept = {entry.name for layer in state.plan.layers for entry in layer.kept}
            found[how, budget] = adapter.grad.clone(), state.plan.arena_bytes, kept
    for budget in (1.0, 0.0):
        (exact, most, _), (grad, least, kept) = (found[how, budget] for how in COMPRESSIONS[:2])
        assert torch.equal(grad, exact) and float(exact.abs().max()) > 0
        assert (least < most and "up_proj.outward.relu.signs" in kept) or budget == 0.0
