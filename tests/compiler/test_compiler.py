"""The compiler's passes on small graphs, and its programs against the decoder under autograd.

T packed tokens, D model width. `check` runs after every pass; memory plans are judged by live ranges counted here, from the
calls alone; programs run in float64 and must agree with `TorchOps` and autograd to 1e-10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coserve.compiler import lower as lowering
from coserve.compiler import plan as planning
from coserve.compiler.differentiate import differentiate
from coserve.compiler.graph import Element, Graph, JointGraph, Node, Value, producers
from coserve.compiler.lower import Draft
from coserve.compiler.passes import run_passes
from coserve.compiler.plan import LayerBypass, ModelPlan, TrainingPlans, plan_fused, plan_inference
from coserve.compiler.program import LayerPlan, Place, Program, Slot, Storage
from coserve.compiler.prune import prune
from coserve.compiler.rematerialize import Rematerialized, rematerialize
from coserve.compiler.trace import Tracer, trace
from coserve.config.settings import LINEAR_SITES, Compression, LoraConfig
from coserve.core import Direction, Example, Unit
from coserve.model.architecture import Architecture
from coserve.model.decoder import MERGED, Bypass, NoBypass, layer, linear_shapes
from coserve.model.linear import FrozenLinear, OutputHead
from coserve.model.weights import LayerWeights, ModelWeights
from coserve.ops.run import JOINED, RUNNERS, Factor
from coserve.ops.table import Cost
from coserve.ops.vocabulary import V, Vocabulary
from coserve.peft.lora import LoraAdapter, LoraBypass, lora_layout
from coserve.runtime.executor import Executor, TrainExecutor
from coserve.runtime.microbatch import InFlight, pack
from coserve.runtime.plans import layer_bypasses, scoring_plan, serving_plan, training_plans
from coserve.runtime.rows import TrainRows, site_key
from tests.compiler.interpreter import Interpreter
from tests.joined_calls import apart
from tests.torch_ops import TorchOps

CPU, F64 = torch.device("cpu"), torch.float64
ATTENTION_SITES = LINEAR_SITES[:4]


def make_arch(
    *, layers: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 4, hidden: int = 12, inner: int = 20,
    qk_norm: bool = False, qkv_bias: bool = False, o_bias: bool = False, mlp_bias: bool = False,
    windows: tuple[int | None, ...] | None = None, score_scale: float = 1.0, nope_layers: frozenset[int] = frozenset(),
) -> Architecture:
    return Architecture(
        model_type="llama", vocab_size=11, hidden_size=hidden, intermediate_size=inner, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=head_dim, rms_norm_eps=1e-5, max_position_embeddings=512, tie_word_embeddings=True,
        qkv_bias=qkv_bias, o_bias=o_bias, mlp_bias=mlp_bias, qk_norm=qk_norm, sliding_windows=windows or (None,) * layers,
        rope_inv_freq=tuple(100.0 ** (-i / head_dim) for i in range(0, head_dim, 2)), rope_scaling=1.0, eos_token_ids=(),
        score_scale=score_scale, nope_layers=nope_layers,
    )


def lora(sites: Iterable[str], rank: int = 2, dropout: float = 0.0) -> tuple[LoraBypass, dict[str, int]]:
    """A bypass with factors {name: out features} that fit `make_arch()`; widths of B come from the tracer's linears."""
    shapes = linear_shapes(make_arch())
    sites = tuple(sites)
    widths = {f"{site}.lora_A": rank for site in sites} | {f"{site}.lora_B": shapes[site][0] for site in sites}
    return LoraBypass(frozenset(sites), dropout), widths


def pruned_layer(
    sites: Iterable[str], *, input_gradient: bool = True, arch: Architecture | None = None, dropout: float = 0.0, rank: int = 2
) -> JointGraph:
    bypass, widths = lora(sites, rank, dropout)
    joint = differentiate(JointGraph.of(trace(arch or make_arch(), bypass, widths)))
    return prune(joint, trainable=widths.__contains__, input_gradient=input_gradient)


def hand_graph(widths: Mapping[str, int], *nodes: Node) -> Graph:
    """A graph whose first value is the input and whose last node makes the output."""
    return Graph({n: Value(n, w) for n, w in widths.items()}, nodes, next(iter(widths)), nodes[-1].outputs[0])


def gated() -> Graph:
    """x -> gate, up -> silu_mul -> y = x + that."""
    return hand_graph(
        {"x": 4, "g": 4, "u": 4, "s": 4, "y": 4},
        Node("linear", ("x",), ("g",), "gate_proj"), Node("linear", ("x",), ("u",), "up_proj"),
        Node("silu_mul", ("g", "u"), ("s",)), Node("add", ("x", "s"), ("y",)),
    )


# --- trace ----------------------------------------------------------------------------------------------------------------


def test_trace_writes_the_bare_layer_down() -> None:
    graph = trace(make_arch(), NoBypass(), {})
    assert [str(node) for node in graph.nodes] == [
        "input_layernorm = rmsnorm[input_layernorm](x)",
        "q_proj = linear[q_proj](input_layernorm)",
        "k_proj = linear[k_proj](input_layernorm)",
        "v_proj = linear[v_proj](input_layernorm)",
        "q_proj.rope = rope(q_proj)",
        "k_proj.rope = rope(k_proj)",
        "attention, log_sum_exp = attention(q_proj.rope, k_proj.rope, v_proj)",
        "o_proj = linear[o_proj](attention)",
        "h = add(x, o_proj)",
        "post_attention_layernorm = rmsnorm[post_attention_layernorm](h)",
        "gate_proj = linear[gate_proj](post_attention_layernorm)",
        "up_proj = linear[up_proj](post_attention_layernorm)",
        "silu_mul = silu_mul(gate_proj, up_proj)",
        "down_proj = linear[down_proj](silu_mul)",
        "y = add(h, down_proj)",
    ]
    assert (graph.input, graph.output) == ("x", "y")
    widths = {name: value.width for name, value in graph.values.items()}
    assert widths == {
        "x": 12, "input_layernorm": 12, "q_proj": 16, "k_proj": 8, "v_proj": 8, "q_proj.rope": 16, "k_proj.rope": 8,
        "attention": 16, "log_sum_exp": 4, "o_proj": 12, "h": 12, "post_attention_layernorm": 12, "gate_proj": 20,
        "up_proj": 20, "silu_mul": 20, "down_proj": 12, "y": 12,
    }
    assert [name for name, value in graph.values.items() if value.element is Element.WIDE] == ["log_sum_exp"]
    assert graph.nodes[0].attrs == {"eps": 1e-5}


def test_trace_adds_the_bypass_at_its_site() -> None:
    bypass, widths = lora(["v_proj"], rank=3, dropout=0.25)
    graph = trace(make_arch(), bypass, widths)
    start = next(i for i, node in enumerate(graph.nodes) if node.weight == "v_proj")
    assert [str(node) for node in graph.nodes[start : start + 5]] == [
        "v_proj = linear[v_proj](input_layernorm)",
        "v_proj.dropout = dropout(input_layernorm)",
        "v_proj.lora_A = segment_linear[v_proj.lora_A](v_proj.dropout)",
        "v_proj.lora_B = segment_linear[v_proj.lora_B](v_proj.lora_A)",
        "v_proj+lora = add(v_proj, v_proj.lora_B)",
    ]
    assert graph.nodes[start + 1].attrs == {"site": "v_proj", "p": 0.25}
    assert graph.values["v_proj.lora_A"].width == 3
    assert graph.values["v_proj.lora_B"].width == 8
    attention = next(node for node in graph.nodes if node.op == "attention")
    assert attention.inputs == ("q_proj.rope", "k_proj.rope", "v_proj+lora")


def test_trace_norms_heads_before_rope() -> None:
    graph = trace(make_arch(qk_norm=True), NoBypass(), {})
    make = producers(graph.nodes)
    assert str(make["q_norm"]) == "q_norm = rmsnorm[q_norm](q_proj)"
    assert str(make["k_norm.rope"]) == "k_norm.rope = rope(k_norm)"
    assert graph.values["k_norm"].width == 8


def test_trace_gives_equal_names_apart() -> None:
    tracer = Tracer(make_arch(), {})
    x = tracer.value("x", 4)
    names = [tracer.add(x, x).name, tracer.add(x, x).name, tracer.add(x, x).name]
    assert names == ["sum", "sum'", "sum''"]


# --- differentiate --------------------------------------------------------------------------------------------------------


def test_differentiate_a_gated_product() -> None:
    joint = differentiate(JointGraph.of(gated()))
    joint.check()
    assert [str(node) for node in joint.backward] == [
        "d:g, d:u = silu_mul_dgrad(d:y, g, u)",
        "d:x = linear_dgrad[up_proj](d:u)",
        "d:x' = add(d:y, d:x)",
        "dW:up_proj = linear_wgrad[up_proj](d:u, x)",
        "d:x'' = linear_dgrad[gate_proj](d:g)",
        "d:x''' = add(d:x', d:x'')",
        "dW:gate_proj = linear_wgrad[gate_proj](d:g, x)",
    ]
    assert (joint.output_grad, joint.input_grad) == ("d:y", "d:x'''")
    assert joint.weight_grads == {"up_proj": "dW:up_proj", "gate_proj": "dW:gate_proj"}
    assert joint.saved() == ("x", "g", "u")


def test_differentiate_counts_a_value_that_is_added_to_itself_twice() -> None:
    graph = hand_graph({"x": 4, "a": 4, "y": 4}, Node("linear", ("x",), ("a",), "w"), Node("add", ("a", "a"), ("y",)))
    joint = differentiate(JointGraph.of(graph))
    joint.check()
    assert str(joint.backward[0]) == "d:a = add(d:y, d:y)"


def test_differentiate_refuses_a_parameter_used_twice() -> None:
    graph = hand_graph({"x": 4, "a": 4, "y": 4}, Node("linear", ("x",), ("a",), "w"), Node("linear", ("a",), ("y",), "w"))
    with pytest.raises(AssertionError, match="used once"):
        differentiate(JointGraph.of(graph))


def test_check_refuses_what_is_not_there_or_made_twice() -> None:
    joint = differentiate(JointGraph.of(gated()))
    with pytest.raises(AssertionError, match="not there yet"):
        replace(joint, backward=joint.backward[1:]).check()
    with pytest.raises(AssertionError, match="twice"):
        replace(joint, backward=(*joint.backward, joint.backward[0])).check()
    forward = replace(joint.forward, nodes=tuple(reversed(joint.forward.nodes)))
    with pytest.raises(AssertionError, match="not there yet"):
        replace(joint, forward=forward).check()


def test_the_driver_refuses_what_a_pass_breaks_and_logs_each_pass(caplog: pytest.LogCaptureFixture) -> None:
    def forget(joint: JointGraph) -> JointGraph:
        return replace(joint, backward=joint.backward[1:])

    caplog.set_level("DEBUG", "coserve.compiler")
    joint = run_passes(JointGraph.of(gated()), differentiate, partial(prune, trainable=lambda _: False, input_gradient=True))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["differentiate", "prune"]
    with pytest.raises(AssertionError, match="not there yet"):
        run_passes(joint, forget)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_differentiate_gives_the_gradients_of_autograd_for_frozen_weights_too(qk_norm: bool) -> None:
    torch.manual_seed(0)
    arch = make_arch(qk_norm=qk_norm)
    bypass, widths = lora(LINEAR_SITES)
    shapes = linear_shapes(arch)
    weights = {site: torch.randn(shape, dtype=F64) for site, shape in shapes.items()}
    for site, (num_out, num_in) in shapes.items():
        weights |= {f"{site}.lora_A": torch.randn(2, num_in, dtype=F64), f"{site}.lora_B": torch.randn(num_out, 2, dtype=F64)}
    norms = {"input_layernorm": 12, "post_attention_layernorm": 12} | ({"q_norm": 4, "k_norm": 4} if qk_norm else {})
    weights |= {name: torch.randn(width, dtype=F64) for name, width in norms.items()}
    angles = torch.randn(5, 2, dtype=F64).repeat(1, 2)
    graph = trace(arch, bypass, widths)
    joint = differentiate(JointGraph.of(graph))
    joint.check()
    assert joint.weight_grads.keys() == weights.keys()

    x = torch.randn(5, 12, dtype=F64, requires_grad=True)
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    oracle = Interpreter(graph, leaves, angles.cos(), angles.sin())
    oracle.forward(x)
    grad = torch.randn(5, 12, dtype=F64)
    expected = torch.autograd.grad(oracle.env["y"], [x, *leaves.values()], grad)
    run = Interpreter(graph, weights, angles.cos(), angles.sin())
    run.forward(x.detach())
    run.backward(joint, grad)
    assert joint.input_grad is not None
    found = [run.env[joint.input_grad], *(run.env[joint.weight_grads[name]] for name in leaves)]
    for name, have, want in zip(["x", *leaves], found, expected, strict=True):
        assert torch.allclose(have, want, rtol=1e-10, atol=1e-10 * float(want.abs().max())), name


# --- prune ----------------------------------------------------------------------------------------------------------------


def test_prune_drops_frozen_gradients_and_what_only_they_read() -> None:
    joint = prune(differentiate(JointGraph.of(gated())), trainable=lambda _: False, input_gradient=True)
    joint.check()
    assert [node.op for node in joint.backward] == ["silu_mul_dgrad", "linear_dgrad", "add", "linear_dgrad", "add"]
    assert joint.weight_grads == {}
    assert joint.saved() == ("g", "u"), "x was read by weight gradients only"
    nothing = prune(differentiate(JointGraph.of(gated())), trainable=lambda _: False, input_gradient=False)
    assert (nothing.backward, nothing.saved(), nothing.input_grad) == ((), (), None)


def test_prune_keeps_only_the_wanted_branch() -> None:
    joint = prune(differentiate(JointGraph.of(gated())), trainable={"gate_proj"}.__contains__, input_gradient=False)
    joint.check()
    assert [str(node) for node in joint.backward] == [
        "d:g, d:u = silu_mul_dgrad(d:y, g, u)", "dW:gate_proj = linear_wgrad[gate_proj](d:g, x)",
    ]
    assert joint.weight_grads == {"gate_proj": "dW:gate_proj"}


def test_prune_down_proj_only_saves_no_projection_inputs() -> None:
    joint = pruned_layer(["down_proj"])
    joint.check()
    assert joint.weight_grads.keys() == {"down_proj.lora_A", "down_proj.lora_B"}
    assert joint.saved() == (
        "x", "v_proj", "q_proj.rope", "k_proj.rope", "attention", "log_sum_exp", "h", "gate_proj", "up_proj", "silu_mul",
        "down_proj.lora_A",
    )


def test_prune_first_layer_with_down_proj_only_has_no_attention_backward() -> None:
    joint = pruned_layer(["down_proj"], input_gradient=False)
    joint.check()
    assert sorted(node.op for node in joint.backward) == [
        "segment_linear_dgrad", "segment_linear_wgrad", "segment_linear_wgrad",
    ]
    assert joint.saved() == ("silu_mul", "down_proj.lora_A")
    assert joint.input_grad is None


SITE_SETS = st.sets(st.sampled_from(LINEAR_SITES), min_size=0).map(lambda s: [site for site in LINEAR_SITES if site in s])


@settings(max_examples=60, deadline=None)
@given(sites=SITE_SETS, input_gradient=st.booleans(), qk_norm=st.booleans(), dropout=st.sampled_from([0.0, 0.5]))
def test_pruned_graphs_are_whole_and_hold_nothing_useless(
    sites: list[str], input_gradient: bool, qk_norm: bool, dropout: float
) -> None:
    joint = pruned_layer(sites, input_gradient=input_gradient, arch=make_arch(qk_norm=qk_norm), dropout=dropout)
    joint.check()
    assert joint.weight_grads.keys() == {f"{site}.lora_{part}" for site in sites for part in "AB"}
    made = {name for node in joint.backward for name in node.outputs}
    wanted = set(joint.weight_grads.values()) | ({joint.input_grad} if input_gradient else set())
    assert wanted <= made
    read = {name for node in joint.backward for name in node.inputs}
    useless = [str(node) for node in joint.backward if not wanted.union(read).intersection(node.outputs)]
    assert not useless
    assert not any(node.op in ("linear_wgrad", "rmsnorm_wgrad") for node in joint.backward)


# --- rematerialize --------------------------------------------------------------------------------------------------------


def names_kept(remat: Rematerialized) -> list[str]:
    return [kept.name for kept in remat.kept]


def test_rematerialize_a_norm_of_a_saved_value() -> None:
    graph = hand_graph(
        {"x": 4, "n": 4, "a": 2, "b": 4, "y": 4},
        Node("rmsnorm", ("x",), ("n",), "norm", {"eps": 1e-5}), Node("segment_linear", ("n",), ("a",), "A"),
        Node("segment_linear", ("a",), ("b",), "B"), Node("add", ("x", "b"), ("y",)),
    )
    both = prune(differentiate(JointGraph.of(graph)), trainable={"A", "B"}.__contains__, input_gradient=True)
    assert both.saved() == ("x", "n", "a")
    remat = rematerialize(both)
    assert (names_kept(remat), [n.outputs for n in remat.recompute]) == (["x", "a"], [("n",)])
    first = prune(differentiate(JointGraph.of(graph)), trainable={"A", "B"}.__contains__, input_gradient=False)
    assert first.saved() == ("n", "a")
    remat = rematerialize(first)
    assert (names_kept(remat), remat.recompute) == (["n", "a"], ()), "x instead of n would save nothing"


def test_rematerialize_takes_a_product_for_its_factors_only_where_they_are_kept() -> None:
    joint = pruned_layer(["down_proj"], input_gradient=False)
    remat = rematerialize(joint)
    assert names_kept(remat) == ["v_proj", "k_proj.rope", "silu_mul", "down_proj.lora_A"]
    assert remat.recompute == ()
    joint = pruned_layer(["down_proj"])
    remat = rematerialize(joint)
    assert names_kept(remat) == [
        "x", "v_proj", "q_proj.rope", "k_proj.rope", "attention", "log_sum_exp", "h", "gate_proj", "up_proj",
        "down_proj.lora_A",
    ]
    assert [node.outputs for node in remat.recompute] == [("silu_mul",)]


def test_rematerialize_a_chain_from_its_narrow_source() -> None:
    """Two element-wise steps from a value of half the width of both; the chain's middle is not kept either."""
    graph = hand_graph(
        {"x": 4, "p": 8, "s": 8, "t": 8, "a": 2, "y": 4},
        Node("linear", ("x",), ("p",), "w"), Node("rmsnorm", ("p",), ("s",), "norm", {"eps": 1e-5}),
        Node("silu_mul", ("s", "s"), ("t",)), Node("segment_linear", ("t",), ("a",), "A"),
        Node("segment_linear", ("a",), ("y",), "B"),
    )
    joint = prune(differentiate(JointGraph.of(graph)), trainable={"A", "B"}.__contains__, input_gradient=True)
    joint.check()
    assert joint.saved() == ("p", "s", "t", "a")
    remat = rematerialize(joint)
    assert names_kept(remat) == ["p", "a"]
    assert [node.outputs[0] for node in remat.recompute] == ["s", "t"]


@settings(max_examples=80, deadline=None)
@given(
    sites=SITE_SETS, input_gradient=st.booleans(), qk_norm=st.booleans(), dropout=st.sampled_from([0.0, 0.5]),
    itemsize=st.sampled_from([2, 4, 8]), inner=st.sampled_from([4, 20, 40]),
)
def test_rematerialize_in_general(
    sites: list[str], input_gradient: bool, qk_norm: bool, dropout: float, itemsize: int, inner: int
) -> None:
    joint = pruned_layer(
        sites, input_gradient=input_gradient, arch=make_arch(qk_norm=qk_norm, inner=inner), dropout=dropout
    )
    remat = rematerialize(joint, itemsize)
    kept, make = names_kept(remat), producers(joint.forward.nodes)
    assert len(set(kept)) == len(kept)
    attention = next(node for node in joint.forward.nodes if node.op == "attention")
    assert {*attention.inputs[1:]} <= {*kept}, "K and V are read by later windows"
    for name in kept:
        node = make.get(name)
        if node is not None and node.row.cost is Cost.ELEMENTWISE and name not in joint.read_whole():
            assert not {*node.inputs} <= {*kept}, f"{name} could be had from {node.inputs}"

    def size(names: Iterable[str]) -> int:
        return sum(joint.values[name].num_bytes(itemsize) for name in names)

    assert size(kept) <= size({*joint.saved(), *joint.read_whole()})
    there = {*kept}
    for node in remat.recompute:
        assert node.row.cost is Cost.ELEMENTWISE
        assert not node.row.whole
        assert there.issuperset(node.inputs), f"{node} recomputes from what is not kept"
        assert there.isdisjoint(node.outputs), f"{node} recomputes what is kept"
        there.update(node.outputs)
    assert there.issuperset(joint.saved())


def test_llama_with_lora_everywhere_keeps_what_the_design_says() -> None:
    joint = pruned_layer(LINEAR_SITES)
    ranks = [f"{site}.lora_A" for site in LINEAR_SITES]
    assert {*names_kept(rematerialize(joint, 2))} == {
        "x", "q_proj+lora.rope", "k_proj+lora.rope", "v_proj+lora", "attention", "log_sum_exp", "h", "gate_proj+lora",
        "up_proj+lora", *ranks,
    }


def test_llama_70b_keeps_15_gigabytes_per_1024_tokens() -> None:
    """DESIGN.md, section 6: 15.1 GB in bfloat16 without recomputing a matrix product (beside log-sum-exps and ranks)."""
    arch = make_arch(layers=80, heads=64, kv_heads=8, head_dim=128, hidden=8192, inner=28672)
    config = LoraConfig(r=16)
    sites = lora_layout(arch, config)
    flat = torch.empty(sites[-1].end, device="meta")
    plan = training_plans(arch, LoraAdapter(config, sites, flat, num_layers=80), itemsize=2).plan()
    others = 64 * 4 + len(LINEAR_SITES) * 16 * 2
    first = 8192 * 2  # layer 0 has no input gradient, so that it keeps its norm's output in the place of x: no less
    assert plan.arena_bytes - 80 * others == pytest.approx(15.1e9 / 1024, rel=2e-3, abs=first)
    assert plan.arena_bytes == 80 * (2 * (4 * 8192 + 2 * 1024 + 2 * 28672) + others)


# --- lower: programs and memory -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Span:
    first: int
    last: int
    written: set[int]


def live_ranges(program: Program) -> dict[int, Span]:
    """{workspace storage: first and last call that touches it}, from the calls alone; every column is written before it is
    read, and an accumulating call finds something to add to."""
    spans: dict[int, Span] = {}
    for index, call in enumerate(apart(program.calls)):
        for number in call.ins:
            slot = program.slots[number]
            if program.storages[slot.storage].place is Place.WORK:
                assert slot.storage in spans, f"call {index} ({call.op}) reads a storage that nothing has written"
                columns = {*range(slot.column, slot.column + slot.width)}
                assert columns <= spans[slot.storage].written, f"call {index} ({call.op}) reads columns nothing has written"
                spans[slot.storage].last = index
        for number in call.outs:
            slot = program.slots[number]
            if program.storages[slot.storage].place is Place.WORK:
                assert slot.storage in spans or not call.accumulate
                span = spans.setdefault(slot.storage, Span(index, index, set()))
                span.last = index
                span.written.update(range(slot.column, slot.column + slot.width))
    return spans


def extent(storage: Storage, itemsize: int) -> tuple[int, int]:
    """First and end byte per row."""
    assert storage.offset % 16 == 0
    return storage.offset, storage.offset + storage.width * storage.element.num_bytes(itemsize)


def assert_memory_is_sound(program: Program, itemsize: int) -> None:
    spans = live_ranges(program)
    for number, span in spans.items():
        low, high = extent(program.storages[number], itemsize)
        assert high <= program.work_bytes
        for other, beside in spans.items():
            if other == number or beside.last < span.first or span.last < beside.first:
                continue
            start, end = extent(program.storages[other], itemsize)
            assert high <= start or end <= low, f"storages {number} and {other} are alive together in one memory"
    for slot in program.slots:
        assert slot.column + slot.width <= program.storages[slot.storage].width


def assert_arena_is_sound(plan: LayerPlan, itemsize: int) -> None:
    parts = [
        extent(storage, itemsize) for storage in plan.arena if storage.place is Place.ARENA
    ]
    if plan.keeps_input:
        parts.append((plan.input_offset, plan.input_offset + plan.arena[0].width * itemsize))
    parts.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(parts))
    assert max((end for _, end in parts), default=0) <= plan.arena_bytes


def plans_of(arch: Architecture, bypass: Bypass, widths: Mapping[str, int], itemsize: int = 4) -> list[LayerPlan]:
    entry = LayerBypass(key=("one",), bypass=bypass, factor_widths=widths)
    layers = [entry] * arch.num_layers
    return [
        *TrainingPlans(arch, layers, itemsize=itemsize).plan().layers,
        *TrainingPlans(arch, layers, itemsize=itemsize, forward_only=True).plan().layers,
        *plan_inference(arch, layers, itemsize=itemsize).layers,
    ]


@settings(max_examples=40, deadline=None)
@given(
    sites=SITE_SETS, qk_norm=st.booleans(), dropout=st.sampled_from([0.0, 0.5]), itemsize=st.sampled_from([2, 4, 8]),
    inner=st.sampled_from([4, 20, 40]), rank=st.integers(1, 9),
)
def test_storages_alive_together_lie_apart(
    sites: list[str], qk_norm: bool, dropout: float, itemsize: int, inner: int, rank: int
) -> None:
    arch = make_arch(qk_norm=qk_norm, inner=inner)
    shapes = linear_shapes(arch)
    widths = {f"{site}.lora_A": rank for site in sites} | {f"{site}.lora_B": shapes[site][0] for site in sites}
    plans = plans_of(arch, LoraBypass(frozenset(sites), dropout), widths, itemsize)
    assert any(plan.backward is not None for plan in plans) == bool(sites)
    for plan in plans:
        assert_arena_is_sound(plan, itemsize)
        for program in (plan.forward, plan.backward):
            if program is not None:
                assert_memory_is_sound(program, itemsize)


def overlapping(spans: Mapping[int, tuple[int, int, int]]) -> tuple[dict[int, int], int]:
    """Every workspace storage at offset 0."""
    return dict.fromkeys(spans, 0), max(size for _, _, size in spans.values())


def shared_anyway(draft: Draft) -> Draft:
    """In-place operators write over their input, whoever reads it later."""
    pairs = [(step.outputs[0], step.node.inputs[0]) for step in draft.steps if step.node.row.inplace]
    roots: dict[str, str] = {}
    for out, source in pairs:
        if out not in draft.slots:
            roots[out] = roots.get(source, source)
    return replace(draft, roots=roots)


def unkept(*args: Any, **options: Any) -> Rematerialized:
    """A choice that forgets the last kept value."""
    choice = rematerialize(*args, **options)
    return replace(choice, kept=choice.kept[:-1])


@pytest.mark.parametrize(("module", "name", "broken", "match"), [
    (lowering, "_place_work", overlapping, "writes over|does not find"),
    (lowering, "share_memory", shared_anyway, "writes over|does not find|read after"),
    (planning, "rematerialize", unkept, "neither kept nor made again"),
])
def test_production_refuses_an_unsound_program(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, broken: Callable[..., Any], match: str
) -> None:
    bypass, widths = lora(LINEAR_SITES)
    entry = LayerBypass(key=("one",), bypass=bypass, factor_widths=widths)
    TrainingPlans(make_arch(), [entry] * 2, itemsize=4).plan()
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError, match=match):
        TrainingPlans(make_arch(), [entry] * 2, itemsize=4).plan()


def test_workspace_is_reused() -> None:
    bypass, widths = lora(LINEAR_SITES)
    for plan in plans_of(make_arch(), bypass, widths):
        spans = live_ranges(plan.forward)
        assert plan.forward.work_bytes < sum(-(-plan.forward.storages[n].width * 4 // 16) * 16 for n in spans)


def calls_of(program: Program | None) -> list[tuple[str, str | None, bool]]:
    assert program is not None
    return [(call.op, call.weight, call.accumulate) for call in apart(program.calls)]


def test_frozen_linears_of_one_input_become_one_product() -> None:
    bypass, widths = lora(LINEAR_SITES)
    plans = plans_of(make_arch(), bypass, widths)
    for plan in (*plans[:2], *plans[4:]):  # scoring keeps K and V without Q, and so has three products
        frozen = [weight for op, weight, _ in calls_of(plan.forward) if op == "linear"]
        assert frozen == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        for call in plan.forward.calls:
            if call.weight in MERGED:
                (out,) = (plan.forward.slots[number] for number in call.outs)
                shapes = linear_shapes(make_arch())
                assert (out.column, out.width) == (0, sum(shapes[site][0] for site in MERGED[call.weight]))


def test_linears_whose_outputs_go_to_different_places_stay_apart() -> None:
    """Layer 0 with down_proj alone keeps K and V but not Q, and one matrix product can't write to two places."""
    bypass, widths = lora(["down_proj"])
    plan = plans_of(make_arch(), bypass, widths)[0]
    frozen = [weight for op, weight, _ in calls_of(plan.forward) if op == "linear"]
    assert frozen == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]


def test_adds_become_accumulating_products() -> None:
    bypass, widths = lora(LINEAR_SITES)
    plan = plans_of(make_arch(), bypass, widths)[1]
    forward, backward = calls_of(plan.forward), calls_of(plan.backward)
    added = [weight for op, weight, accumulate in forward if accumulate]
    # h and y are new values beside ones that stay, so they are written; down_proj's LoRA adds into down_proj's memory
    assert added == [f"{site}.lora_B" for site in LINEAR_SITES]
    assert [op for op, _, _ in forward].count("add") == 1, "h is written together with its norm"
    assert "add" not in [op for op, _, _ in backward]
    assert [(op, weight) for op, weight, accumulate in backward if accumulate] == [
        ("linear_dgrad", "down_proj"), ("segment_linear_dgrad", "gate_proj.lora_A"), ("linear_dgrad", "gate_up_proj"),
        ("rmsnorm_dgrad", "post_attention_layernorm"), ("linear_dgrad", "o_proj"), ("segment_linear_dgrad", "k_proj.lora_A"),
        ("segment_linear_dgrad", "q_proj.lora_A"), ("linear_dgrad", "qkv_proj"), ("rmsnorm_dgrad", "input_layernorm"),
    ]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_gradients_towards_one_input_are_one_product_of_what_lies_side_by_side(qk_norm: bool) -> None:
    """Frozen linears alone are below: nothing else is added up, so that the product writes."""
    arch = make_arch(qk_norm=qk_norm)
    for bypass, widths, adds in ((*lora(LINEAR_SITES), True), (*lora(["down_proj"]), False)):
        program = plans_of(arch, bypass, widths)[1].backward
        assert program is not None
        found = {call.weight: call for call in program.calls if call.op == "linear_dgrad" and call.weight in MERGED}
        assert found.keys() == MERGED.keys()
        for name, call in found.items():
            (grads,) = (program.slots[number] for number in call.ins)
            widths_of = [linear_shapes(arch)[site][0] for site in MERGED[name]]
            assert (grads.column, grads.width) == (0, sum(widths_of)) and call.accumulate == adds
            made = [program.slots[n] for each in program.calls[: program.calls.index(call)] for n in each.outs]
            column = 0
            for width in widths_of:
                assert Slot(grads.storage, column, width) in made
                column += width


def test_the_last_sum_is_part_of_a_product_where_nothing_is_kept() -> None:
    """Not in training, where some plans keep its first term and others don't: all have the same bits."""
    plans = plans_of(make_arch(), *lora(["q_proj"]))
    serving, training = plans[-1].forward, [plan for plan in plans if plan.backward is not None]
    assert serving.calls[-1].weight == "down_proj" and serving.calls[-1].accumulate
    assert serving.storages[serving.slots[serving.calls[-1].outs[0]].storage].place is Place.OUTPUT
    assert training and all(plan.forward.calls[-1].op == "add" for plan in training)


def test_attention_gradients_are_turned_back_in_one_call() -> None:
    for qk_norm in (False, True):
        program = plans_of(make_arch(qk_norm=qk_norm), *lora(LINEAR_SITES))[1].backward
        assert program is not None and "rope_dgrad" not in [call.op for call in program.calls]
        (call,) = [call for call in program.calls if call.run is JOINED["attention_dgrad", "rope_dgrad"]]
        d_q, d_k, _, *rotated = (program.slots[number] for number in call.outs)
        assert rotated in ([Slot(d_q.storage, d_q.column, d_q.width + d_k.width)], [d_k, d_q])


def test_rope_turns_in_place_in_one_call_with_attention() -> None:
    bypass, widths = lora(LINEAR_SITES)
    programs = [p for plan in plans_of(make_arch(), bypass, widths) for p in (plan.forward, plan.backward) if p is not None]
    joined = [call for program in programs for call in program.calls if call.run is JOINED["rope", "attention"]]
    assert len(joined) >= 3
    assert not [call.op for plan in plans_of(make_arch(), bypass, widths) for call in plan.forward.calls if call.op == "rope"]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_what_attention_rotates_is_its_q_and_k(qk_norm: bool) -> None:
    for program in (plan.forward for plan in plans_of(make_arch(qk_norm=qk_norm), NoBypass(), {})):
        (call,) = [call for call in program.calls if call.op == "attention"]
        q, k, _, *rotated = (program.slots[number] for number in call.ins)
        if len(rotated) == 1:
            assert rotated == [Slot(q.storage, q.column, q.width + k.width)] and k.column == q.column + q.width
        else:
            assert {*rotated} == {q, k}
        assert call.attrs == {"scale": 1.0}
    assert qk_norm or len(rotated) == 1, "beside each other in the last plan, which is a serving one"


def test_layers_without_rotary_embedding_have_plain_attention() -> None:
    plan = plans_of(make_arch(nope_layers=frozenset({0})), NoBypass(), {})[0]
    (call,) = [call for call in plan.forward.calls if call.op == "attention"]
    assert call.run is RUNNERS["attention"] and len(call.ins) == 3


def test_a_sum_and_its_norm_are_one_step_that_writes_over_nothing_it_reads() -> None:
    """A kernel for both reads other rows of the sum's inputs after it has written rows of the norm: these lie apart, or row by
    row in one place."""
    for plan in plans_of(make_arch(), *lora(LINEAR_SITES)):
        program = plan.forward
        (call,) = [call for call in program.calls if call.run is JOINED["add", "rmsnorm"]]
        assert call.weight == "post_attention_layernorm" and (len(call.outs), len(call.ins)) == (2, 2)
        places = [program.storages[program.slots[number].storage] for number in (*call.outs, *call.ins)]
        work = sorted({extent(storage, 4) for storage in places if storage.place is Place.WORK})
        assert all(end <= start for (_, end), (start, _) in pairwise(work))


def test_plans_name_keys_and_values_and_the_lowest_trained_layer() -> None:
    arch = make_arch(layers=3)
    bypass, widths = lora(["down_proj"])
    layers = [LayerBypass(key=(), bypass=NoBypass(), factor_widths={})] * 2
    layers.append(LayerBypass(key=("down",), bypass=bypass, factor_widths=widths))
    plan = TrainingPlans(arch, layers, itemsize=4).plan()
    assert plan.lowest_trained == 2
    assert [p.backward is None for p in plan.layers] == [True, True, False]
    assert plan.layers[0] is plan.layers[1], "equal layers share a plan"
    for each in plan.layers:
        assert each.keys is not None
        assert each.values is not None
        assert each.keys.width == each.values.width == 8
        assert all(each.arena[slot.storage].place is Place.ARENA for slot in (each.keys, each.values))
    assert plan.arena_bytes == sum(each.arena_bytes for each in plan.layers)
    everywhere = TrainingPlans(arch, [*layers[2:], *layers[:2]], itemsize=4).plan()
    assert everywhere.lowest_trained == 0
    assert everywhere.layers[1].backward is not None, "a layer above an adapter passes the gradient on"
    nothing = TrainingPlans(arch, layers, itemsize=4, forward_only=True).plan()
    assert nothing.lowest_trained == 3
    assert all(p.backward is None and names == ["v_proj", "k_proj.rope"] for p in nothing.layers
               for names in [[kept.name for kept in p.kept]])
    assert all(p.keys is None and p.arena_bytes == 0 for p in plan_inference(arch, layers, itemsize=4).layers)


def lora_layers(sites: Iterable[str], rank: int, dropout: float) -> list[LayerBypass]:
    """LoRA at the same sites of two layers."""
    shapes = linear_shapes(make_arch())
    widths = {f"{site}.lora_{part}": rank if part == "A" else shapes[site][0] for site in sites for part in "AB"}
    return [LayerBypass(key=(), bypass=LoraBypass(frozenset(sites), dropout), factor_widths=widths)] * 2


@settings(max_examples=100, deadline=None)
@given(
    own=st.sets(st.sampled_from(LINEAR_SITES)), others=st.sets(st.sampled_from(LINEAR_SITES)), qk_norm=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3]), itemsize=st.sampled_from([2, 4, 8]), forward_only=st.booleans(),
    compression=st.sampled_from(["none", "fp8"]),
)
def test_fused_programs_hold_what_training_keeps(
    own: set[str], others: set[str], qk_norm: bool, dropout: float, itemsize: int, forward_only: bool, compression: Compression
) -> None:
    """All that the training rows' plan keeps is there, whole, when the program has ended; rows without an adapter at a site
    never read what only other rows wrote."""
    arch = make_arch(qk_norm=qk_norm)
    training = TrainingPlans(
        arch, lora_layers(own, 3, dropout), itemsize=itemsize, forward_only=forward_only, compression=compression
    ).plan()
    fused = plan_fused(arch, lora_layers(own | others, 5, dropout), training, itemsize=itemsize)
    for plan, (program, keeps) in zip(training.layers, [(f.program, f.keeps) for f in fused], strict=True):
        assert_memory_is_sound(program, itemsize)
        for call in apart(program.calls):
            assert call.op != "segment_linear" or call.accumulate or (call.weight or "").endswith("lora_A")
        wanted = {slot for slot in plan.kept_slots.values() if slot not in (plan.keys, plan.values)}
        assert {slot for keep in keeps for slot in keep.targets} == wanted
        spans = live_ranges(program)
        for keep in keeps:
            work, storage = keep.source, program.storages[keep.source.storage]
            assert work.width >= keep.width == keep.targets[0].width
            if keep.pack is not None and storage.place is Place.INPUT:
                continue
            assert storage.place is Place.WORK
            for number, span in spans.items():
                low, high = extent(program.storages[number], itemsize)
                first, end = extent(storage, itemsize)
                disjoint = high <= first or end <= low
                assert number == work.storage or span.last < spans[work.storage].first or disjoint


# --- programs against autograd --------------------------------------------------------------------------------------------


def random_weights(arch: Architecture, generator: torch.Generator) -> ModelWeights:
    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=F64, generator=generator)

    shapes = linear_shapes(arch)
    biased = dict.fromkeys(LINEAR_SITES[:3], arch.qkv_bias) | {"o_proj": arch.o_bias}
    layers = []
    for _ in range(arch.num_layers):
        linears: dict[str, FrozenLinear] = {}
        groups = MERGED | {"o_proj": ("o_proj",), "down_proj": ("down_proj",)}
        for name, sites in groups.items():
            rows, width = sum(shapes[site][0] for site in sites), shapes[sites[0]][1]
            bias = noise(rows) if biased.get(sites[0], arch.mlp_bias) else None
            linears[name] = whole = FrozenLinear(noise(rows, width) / width**0.5, bias)
            start = 0
            for site in sites if name in MERGED else ():
                linears[site] = whole.rows(start, start + shapes[site][0])
                start += shapes[site][0]
        norms = {name: 1 + 0.3 * noise(arch.hidden_size) for name in ("input_layernorm", "post_attention_layernorm")}
        if arch.qk_norm:
            norms |= {name: 1 + 0.3 * noise(arch.head_dim) for name in ("q_norm", "k_norm")}
        layers.append(LayerWeights(linears, norms))
    embedding = noise(arch.vocab_size, arch.hidden_size)
    return ModelWeights(arch, embedding, layers, noise(arch.hidden_size), OutputHead(embedding))


def examples_of(lengths: Sequence[int], seed: int) -> list[Example]:
    """Examples without labels, so that no loss head runs."""
    rng = np.random.default_rng(seed)
    return [
        Example(index=i, token_ids=rng.integers(0, 11, n), weights=np.zeros(n, np.float32)) for i, n in enumerate(lengths)
    ]


def windows_of(cuts: Iterable[int], num_tokens: int) -> list[tuple[int, int]]:
    edges = [0, *sorted({c for c in cuts if 0 < c < num_tokens}), num_tokens]
    return list(pairwise(edges))


def oracle_layer(
    state: InFlight, weights: ModelWeights, index: int, factors: Mapping[str, tuple[Tensor, float]], rows: TrainRows
) -> TorchOps:
    arch = weights.architecture
    linears, root = weights.layers[index].linears, math.sqrt(arch.score_scale)
    return TorchOps(
        eps=arch.rms_norm_eps, norms=weights.layers[index].norms,
        linears={site: (linears[site].weight, linears[site].bias) for site in LINEAR_SITES}, factors=factors,
        cos=rows.cos * root, sin=rows.sin[:, arch.head_dim // 2 :].repeat(1, 2) * root,
        starts=tuple(begin for begin, _ in state.batch.bounds),
        window=arch.sliding_windows[index], dropout_keys=state.batch.dropout_keys,
        site_keys={site: site_key(index, site) for site in LINEAR_SITES},
    )


def assert_close(have: Tensor, want: Tensor, what: str, scale: float = 0.0) -> None:
    """Equal to 1e-10, plus rounding that comes from other tensors of size `scale`: some gradients are 0 (q where each query
    sees one key) or nearly."""
    error = float((have - want).norm())
    allowed = 1e-10 * float(want.norm()) + 1e-13 * scale
    assert error < allowed, f"{what}: error {error:.2e} of {float(want.norm()):.2e}"


class ServedRows(TrainRows):
    """Training rows that take K and V from the call: a serving program has no arena."""

    def attention(self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.keys, self.values = k, v
        super().attention(out, lse, q, k, v)


def serve(train: TrainExecutor, state: InFlight, plan: ModelPlan, adapter: Any) -> Tensor:
    """The last hidden rows of a micro-batch by a serving plan, all rows at once."""
    weights, batch = train.weights, state.batch
    rows = train.rows(state, Unit(Direction.FORWARD, 0, 2, 0, batch.num_tokens), adapter)
    served = ServedRows(
        adapter, batch.bounds, 0, batch.num_tokens, rows.cos, rows.sin, batch.dropout_keys, train.arch.sliding_windows
    )
    hidden = weights.embedding[batch.token_ids]
    for index, each in enumerate(plan.layers):
        served.layer = index
        ends = {Place.INPUT: hidden, Place.OUTPUT: torch.empty_like(hidden)}
        train.executor.execute(each.forward, index, served, batch.num_tokens, lambda _, storage, ends=ends: ends[storage.place])
        hidden = ends[Place.OUTPUT]
    return hidden


def compare_with_autograd(
    weights: ModelWeights, plan: ModelPlan, bypasses: Sequence[LayerBypass], adapter: Any, lengths: Sequence[int],
    forward: Iterable[int], backward: Iterable[int], seed: int, serving: ModelPlan | None = None,
) -> None:
    """Runs a two-layer model's programs window by window, and the decoder under autograd; compares the output, the gradient of
    layer 1's input, every factor's gradient, and the output of a serving plan. `adapter` has factor(layer, name)."""
    arch = weights.architecture
    assert arch.num_layers == 2
    train = TrainExecutor(Executor(weights))
    batch = pack(examples_of(lengths, seed), device=CPU, seed=seed, step=3)
    state = train.begin(batch, plan)
    num_tokens = batch.num_tokens
    for start, end in windows_of(forward, num_tokens):
        train.run(state, Unit(Direction.FORWARD, 0, 2, start, end), adapter)
    state.set_coefficients(torch.zeros(0, dtype=F64))
    output = state.hidden(2).clone()
    grad = torch.randn(num_tokens, arch.hidden_size, dtype=F64, generator=torch.Generator().manual_seed(seed))
    state.grad_TD.copy_(grad)
    between = None
    for index in (1, 0):
        for start, end in reversed(windows_of(backward, num_tokens)):
            train.run(state, Unit(Direction.BACKWARD, index, index + 1, start, end), adapter)
        if index == 1 and plan.lowest_trained == 0:
            between = state.grad_TD.clone()

    rows = train.rows(state, Unit(Direction.FORWARD, 0, 2, 0, num_tokens), adapter)
    leaves: dict[tuple[int, str], Tensor] = {}
    hidden = [weights.embedding[batch.token_ids].requires_grad_()]
    for index, bypass in enumerate(bypasses):
        factors = {}
        for name in bypass.factor_widths:
            factor = adapter.factor(index, name)
            leaves[index, name] = factor.matrix.clone().requires_grad_()
            factors[name] = (leaves[index, name], factor.scale)
        ops = oracle_layer(state, weights, index, factors, rows)
        hidden.append(layer(ops, arch, bypass.bypass, hidden[-1], rotary=index not in arch.nope_layers))
    assert_close(output, hidden[2].detach(), "output")
    if serving is not None:
        assert_close(serve(train, state, serving, adapter), hidden[2].detach(), "served output")
    wanted = torch.autograd.grad(hidden[2], [hidden[1], *leaves.values()], grad, materialize_grads=True)
    if between is not None:
        assert_close(between, wanted[0], "gradient of layer 1's input")
    scale = max(float(want.norm()) for want in wanted)
    for (index, name), want in zip(leaves, wanted[1:], strict=True):
        assert_close(adapter.factor(index, name).grad, want, f"layer {index} {name}", scale)


ARCHS = st.builds(
    make_arch, heads=st.sampled_from([2, 4]), kv_heads=st.sampled_from([1, 2]), head_dim=st.sampled_from([2, 4, 6]),
    inner=st.sampled_from([6, 20]), qk_norm=st.booleans(), qkv_bias=st.booleans(), o_bias=st.booleans(),
    mlp_bias=st.booleans(), windows=st.tuples(*[st.sampled_from([None, 1, 3, 7])] * 2), score_scale=st.sampled_from([1.0, 0.4]),
) | st.builds(make_arch, nope_layers=st.sampled_from([frozenset({0}), frozenset({1}), frozenset({0, 1})]))
CUTS = st.lists(st.integers(1, 30), max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    arch=ARCHS, targets=st.sets(st.tuples(st.integers(0, 1), st.sampled_from(LINEAR_SITES)), min_size=1),
    rank=st.integers(1, 3), other_rank=st.integers(1, 3), rslora=st.booleans(), dropout=st.sampled_from([0.0, 0.3]),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3), forward=CUTS, backward=CUTS, seed=st.integers(0, 10**6),
)
def test_lora_programs_agree_with_autograd(
    arch: Architecture, targets: set[tuple[int, str]], rank: int, other_rank: int, rslora: bool, dropout: float,
    lengths: list[int], forward: list[int], backward: list[int], seed: int,
) -> None:
    modules = sorted(f"{index}.{'self_attn' if site in ATTENTION_SITES else 'mlp'}.{site}" for index, site in targets)
    of_others = {"o_proj": "o_proj", "layers.1.mlp.*": "1.mlp."}  # a pattern must match a module that there is
    config = LoraConfig(
        r=rank, alpha=3.0, dropout=dropout, use_rslora=rslora, target_modules=tuple(modules),
        rank_pattern={key: other_rank for key, part in of_others.items() if any(part in module for module in modules)},
    )
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(arch, generator)
    sites = lora_layout(arch, config)
    assert {site.key for site in sites} == targets
    flat = 0.4 * torch.randn(sites[-1].end, dtype=F64, generator=generator)
    adapter = LoraAdapter(config, sites, flat, num_layers=2).trainable()
    plan = training_plans(arch, adapter, itemsize=8).plan()
    assert plan.lowest_trained == min(index for index, _ in targets)
    bypasses = layer_bypasses(arch, adapter, dropout=dropout)
    widths = [adapter.factor_widths(index) for index in range(2)]
    serving = serving_plan(arch, [adapter.kind], widths, itemsize=8) if dropout == 0 else None
    compare_with_autograd(weights, plan, bypasses, adapter, lengths, forward, backward, seed, serving)


def test_scoring_and_serving_programs_compute_the_same_rows_as_training() -> None:
    arch = make_arch(qk_norm=True, qkv_bias=True)
    weights = random_weights(arch, torch.Generator().manual_seed(1))
    adapter = LoraAdapter.create(arch, LoraConfig(r=2, alpha=4.0), dtype=F64, device=CPU, seed=0).trainable()
    adapter.flat.uniform_(-1, 1, generator=torch.Generator().manual_seed(2))
    train = TrainExecutor(Executor(weights))
    outputs = []
    for plan in (training_plans(arch, adapter, itemsize=8).plan(), scoring_plan(arch, adapter, itemsize=8)):
        state = train.begin(pack(examples_of([7, 4], 0), device=CPU), plan, forward_only=plan.lowest_trained == 2)
        for start, end in ((0, 5), (5, 11)):
            train.run(state, Unit(Direction.FORWARD, 0, 2, start, end), adapter)
        outputs.append(state.hidden(2).clone())
    assert torch.allclose(outputs[0], outputs[1], rtol=1e-13, atol=1e-12)

    plan = serving_plan(arch, [adapter.kind], [adapter.factor_widths(index) for index in range(2)], itemsize=8)
    served = serve(train, state, plan, adapter)
    assert torch.allclose(served, outputs[0], rtol=0, atol=1e-12)


# --- other bypasses: the same passes, no other change ---------------------------------------------------------------------


class Script(NoBypass):
    """A bypass at one site as a list of steps. Each but "up" makes a value of width `rank`, which later steps name by number:

    ("x",), ("out",): a factor of the site's input or output. ("mix", i): a factor of value i. ("gate", i, j): silu(i) * j.
    ("sum", i, j): i + j. ("up", i): a factor of value i as wide as the output, which is added to it at the end.
    """

    def __init__(self, site: str, steps: Sequence[tuple[Any, ...]], rank: int, arch: Architecture) -> None:
        self.site, self.steps, self.rank = site, steps, rank
        num_out, num_in = linear_shapes(arch)[site]
        self.shapes: dict[str, tuple[int, int]] = {}
        for number, step in enumerate(steps):
            if step[0] in ("x", "out"):
                self.shapes[f"{site}.f{number}"] = (rank, num_in if step[0] == "x" else num_out)
            elif step[0] == "mix":
                self.shapes[f"{site}.f{number}"] = (rank, rank)
            elif step[0] == "up":
                self.shapes[f"{site}.f{number}"] = (num_out, rank)

    @property
    def widths(self) -> dict[str, int]:
        return {name: shape[0] for name, shape in self.shapes.items()}

    def apply(self, ops: Vocabulary[V], site: str, x: V, out: V) -> V:
        if site != self.site:
            return out
        inner: list[V] = []
        deltas: list[V] = []
        for number, (kind, *places) in enumerate(self.steps):
            name = f"{site}.f{number}"
            if kind in ("x", "out"):
                inner.append(ops.segment_linear(x if kind == "x" else out, name))
                continue
            taken = [inner[place % len(inner)] for place in places]
            if kind == "mix":
                inner.append(ops.segment_linear(taken[0], name))
            elif kind == "up":
                deltas.append(ops.segment_linear(taken[0], name))
            elif kind == "gate":
                inner.append(ops.silu_mul(taken[0], taken[1]))
            else:
                inner.append(ops.add(taken[0], taken[1]))
        for delta in deltas:
            out = ops.add(out, delta)
        return out


class Factors:
    """Factors of a `Script`, the same in every layer but with values and gradients of their own."""

    def __init__(self, script: Script, generator: torch.Generator) -> None:
        def factor(shape: tuple[int, int]) -> Factor:
            matrix = 0.4 * torch.randn(shape, dtype=F64, generator=generator)
            return Factor(matrix, 0.5, torch.zeros(shape, dtype=F64))

        self._layers = [{name: factor(shape) for name, shape in script.shapes.items()} for _ in range(2)]

    def factor(self, index: int, name: str) -> Factor | None:
        return self._layers[index].get(name)


PLACE = st.integers(0, 7)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["x", "out"])), st.tuples(st.sampled_from(["mix", "up"]), PLACE),
        st.tuples(st.sampled_from(["gate", "sum"]), PLACE, PLACE),
    ), max_size=6,
)


def compare_script(site: str, steps: Sequence[tuple[Any, ...]], seed: int = 0) -> None:
    """A bypass at one site of both layers; its sound memory and its gradients."""
    arch = make_arch()
    script = Script(site, steps, 3, arch)
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(arch, generator)
    bypasses = [LayerBypass(key=("script",), bypass=script, factor_widths=script.widths)] * 2
    plan = TrainingPlans(arch, bypasses, itemsize=8).plan()
    serving = plan_inference(arch, bypasses, itemsize=8)
    for each in (*plan.layers, *serving.layers):
        each.joint.check()
        for program in (each.forward, each.backward):
            if program is not None:
                assert_memory_is_sound(program, 8)
    compare_with_autograd(weights, plan, bypasses, Factors(script, generator), [6, 3], [4], [5], seed, serving)


@pytest.mark.parametrize("site", LINEAR_SITES)
@pytest.mark.parametrize("steps", [
    [("out",), ("up", 0)],  # an adapter behind the linear (Houlsby)
    [("x",), ("x",), ("gate", 0, 1), ("up", 2)],  # a gated bottleneck
    [("x",), ("up", 0), ("out",), ("up", 1)],  # before and behind
    [("x",), ("mix", 0), ("sum", 0, 1), ("up", 2)],  # a residual inside the bypass
], ids=["serial", "gated", "both", "residual"])
def test_other_adapter_kinds_need_no_change(site: str, steps: list[tuple[Any, ...]]) -> None:
    compare_script(site, steps)


@pytest.mark.parametrize("steps", [
    [("x",), ("up", 0), ("x",), ("sum", 0, 1), ("up", 2)],  # wrong when served
    [("x",), ("gate", 0, 0), ("up", 1), ("sum", 1, 0), ("up", 0)],  # wrong in training too
])
def test_a_fused_product_still_finds_its_input(steps: list[tuple[Any, ...]]) -> None:
    compare_script("q_proj", steps)


@settings(max_examples=60, deadline=None)
@given(site=st.sampled_from(LINEAR_SITES), first=st.sampled_from(["x", "out"]), steps=STEPS, seed=st.integers(0, 10**6))
def test_any_bypass_trains_exactly(site: str, first: str, steps: list[tuple[Any, ...]], seed: int) -> None:
    script = [(first,), *steps, ("up", len(steps))]
    compare_script(site, script, seed)
