"""Parallelization: every choice computes what one rank computes, and the search takes the cheapest.

A layer runs in float64 on all ranks in lockstep, operator by operator (`Lockstep`). Every value, its gradient, and every
parameter's gradient are put together from the ranks by the form that the pass says they have, and must agree with one rank's
under autograd to 1e-9.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from coserve.compiler.differentiate import differentiate
from coserve.compiler.graph import Graph, JointGraph
from coserve.compiler.parallelize import Axes, Parallelized, Prices, RankForm, TensorParallel, only_site
from coserve.compiler.passes import run_passes
from coserve.compiler.prune import prune
from coserve.compiler.trace import trace
from coserve.core import ConfigError
from coserve.model.architecture import Architecture
from coserve.model.decoder import ROW_SITES, biased_sites, linear_shapes
from coserve.ops.table import State
from coserve.parallel import Sharding
from coserve.peft.adapter import CompositeBypass
from coserve.peft.bottleneck import BottleneckBypass
from coserve.peft.ia3 import IA3Bypass
from coserve.peft.lora import LoraBypass
from tests.compiler.interpreter import Interpreter, Lockstep
from tests.compiler.test_compiler import make_arch

F64 = torch.float64
ROWS = 5
RANK = 4
NVLINK = Prices(
    flops=6e14, bandwidth=2.7e12, link_bandwidth=3.6e11, link_latency_s=8e-6, itemsize=2, window_tokens=1024, step_tokens=8192,
    update_bytes=30,
)


@dataclass(frozen=True)
class Kind:
    """A kind of adapter at some sites. shapes: of its parameters, [out, in], given those of the sites."""

    name: str
    make: Callable[[frozenset[str], float], object]
    shapes: Callable[[Architecture], dict[str, tuple[int, int]]]
    dropout: float = 0.0

    def graph(self, arch: Architecture) -> Graph:
        shapes = self.shapes(arch)
        bypass = CompositeBypass([self.make(frozenset(shapes), self.dropout)])  # type: ignore[list-item]
        return trace(arch, bypass, {name: num_out for name, (num_out, _) in shapes.items()})


def lora_shapes(arch: Architecture, *, dora: bool = False) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for site, (num_out, num_in) in linear_shapes(arch).items():
        shapes |= {f"{site}.lora_A": (RANK, num_in), f"{site}.lora_B": (num_out, RANK)}
        shapes |= {f"{site}.dora": (num_out, 1)} if dora else {}
    return shapes


def ia3_shapes(arch: Architecture) -> dict[str, tuple[int, int]]:
    sites = linear_shapes(arch)
    outs = {f"{site}.ia3_out": (sites[site][0], 1) for site in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")}
    return {**outs, **{f"{site}.ia3_in": (sites[site][1], 1) for site in ("gate_proj", "down_proj")}}


def bottleneck_shapes(activation: str) -> Callable[[Architecture], dict[str, tuple[int, int]]]:
    def shapes(arch: Architecture) -> dict[str, tuple[int, int]]:
        width = arch.hidden_size
        return {
            f"{site}.{activation}_{part}": shape for site in ("o_proj", "down_proj")
            for part, shape in (("down", (RANK, width)), ("up", (width, RANK)))
        }

    return shapes


KINDS = {
    kind.name: kind for kind in (
        Kind("lora", LoraBypass.of, lora_shapes),
        Kind("lora with dropout", LoraBypass.of, lora_shapes, dropout=0.3),
        Kind("dora", LoraBypass.of, lambda arch: lora_shapes(arch, dora=True)),
        Kind("ia3", IA3Bypass, ia3_shapes),
        Kind("relu bottleneck", BottleneckBypass, bottleneck_shapes("relu")),
        Kind("gelu bottleneck", BottleneckBypass, bottleneck_shapes("gelu")),
    )
}
ARCH = make_arch(hidden=16, inner=24, heads=4, kv_heads=2, qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True)


class Layer:
    """A layer with random weights on one rank, run under autograd."""

    def __init__(self, arch: Architecture, kind: Kind) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=F64, generator=generator)

        self.arch, self.graph = arch, kind.graph(arch)
        shapes = linear_shapes(arch)
        self.linears = {site: draw(*shape) for site, shape in shapes.items()}
        self.biases = {site: draw(shapes[site][0]) for site in biased_sites(arch)}
        norms = {"input_layernorm": arch.hidden_size, "post_attention_layernorm": arch.hidden_size}
        norms |= {"q_norm": arch.head_dim, "k_norm": arch.head_dim} if arch.qk_norm else {}
        self.norms = {name: draw(width) for name, width in norms.items()}
        self.factors = {name: draw(*shape) for name, shape in kind.shapes(arch).items()}
        angles = draw(ROWS, arch.head_dim // 2).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.keys = torch.arange(ROWS) * 7919
        self.x, self.grad = draw(ROWS, arch.hidden_size), draw(ROWS, arch.hidden_size)

        leaves = {name: factor.clone().requires_grad_() for name, factor in self.factors.items()}
        x = self.x.clone().requires_grad_()
        run = Interpreter(
            self.graph, {**self.linears, **self.norms, **leaves}, self.cos, self.sin, biases=self.biases, dropout_keys=self.keys
        )
        run.forward(x)
        self.values = run.env
        inner = [value for value in self.values.values() if value is not x]
        found = torch.autograd.grad(run.env[self.graph.output], [x, *leaves.values(), *inner], self.grad, allow_unused=True)
        self.x_grad, self.factor_grads = found[0], dict(zip(leaves, found[1:], strict=False))
        self.value_grads = dict(zip(
            (name for name, value in self.values.items() if value is not x), found[1 + len(leaves) :], strict=True
        ))

    def on_ranks(self, found: Parallelized, size: int, *, bias_everywhere: bool = False) -> Lockstep:
        """The layer's ranks, each with its slices of all weights."""
        ranks = []
        for rank in range(size):
            weights, biases = dict(self.norms), {}
            for site, weight in self.linears.items():
                parts = min(size, self.arch.num_kv_heads) if site in ("k_proj", "v_proj") else size
                row = site in ROW_SITES
                weights[site] = Sharding(1 if row else 0, parts, False, "|").part(weight, rank, size)
                if site in self.biases and row:
                    biases[site] = self.biases[site] * (rank == 0 or bias_everywhere)
                elif site in self.biases:
                    biases[site] = Sharding(0, parts, False, "|").part(self.biases[site], rank, size)
            weights |= {
                name: found.shardings[name].part(factor, rank, size) for name, factor in self.factors.items()
                if name in found.shardings
            }
            ranks.append(Interpreter(
                found.graph, weights, self.cos, self.sin, biases=biases, dropout_keys=self.keys, first_share=rank
            ))
        return Lockstep(ranks)


def together(parts: list[Tensor], form: RankForm) -> Tensor:
    """A value put together from what the ranks hold."""
    match form.state:
        case State.PARTIAL:
            return sum(parts, torch.zeros_like(parts[0]))
        case State.SPLIT:
            return torch.cat(parts[:: len(parts) // form.parts], dim=-1)
    for each in parts[1:]:
        assert torch.equal(each, parts[0]), "ranks that hold a whole value differ"
    return parts[0]


def gradient_together(parts: list[Tensor], form: RankForm) -> Tensor:
    """A value's gradient put together from what the ranks hold."""
    match form.state:
        case State.ENTERED:
            return sum(parts, torch.zeros_like(parts[0]))
        case State.SPLIT:
            copies = len(parts) // form.parts
            groups = [sum(parts[i : i + copies], torch.zeros_like(parts[0])) for i in range(0, len(parts), copies)]
            return torch.cat(groups, dim=-1)
    return parts[0]


def parameter_gradient(parts: list[Tensor], sharding: Sharding) -> Tensor:
    """A parameter's gradient put together from what the ranks computed."""
    copies = len(parts) if sharding.axis is None else len(parts) // sharding.parts
    groups = [
        sum(parts[i : i + copies], torch.zeros_like(parts[0])) if sharding.summed else parts[i]
        for i in range(0, len(parts), copies)
    ]
    return groups[0] if sharding.axis is None else torch.cat(groups, dim=sharding.axis)


def close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-9, atol=1e-9 * float(wanted.detach().abs().max()))


def compare(layer: Layer, found: Parallelized, run: Lockstep, joint: JointGraph) -> list[str]:
    """What differs between one rank and several: names of values, of gradients, of parameters."""
    run.forward(layer.x)
    run.backward(joint, layer.grad)
    envs = [rank.env for rank in run.ranks]
    wrong = []
    for name, form in found.forms.items():
        if name in layer.values and not close(together([env[name] for env in envs], form), layer.values[name]):
            wrong.append(name)
    for name, grad in joint.weight_grads.items():
        if name in layer.factor_grads:
            have = parameter_gradient([env[grad] for env in envs], found.shardings[name])
            wrong += [grad] if not close(have, layer.factor_grads[name]) else []
    assert joint.input_grad is not None
    for env in envs:
        wrong += ["d:x"] if not close(env[joint.input_grad], layer.x_grad) else []
    return wrong


def parallel(size: int, *, prices: Prices = NVLINK, forced: Axes | None = None) -> TensorParallel:
    return TensorParallel(size=size, kv_heads=ARCH.num_kv_heads, prices=prices, forced=forced or {})


def whole_backward(found: Parallelized) -> JointGraph:
    return run_passes(JointGraph.of(found.graph), differentiate)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_graph_computes_what_one_rank_computes(kind: str, size: int) -> None:
    layer = Layer(ARCH, KINDS[kind])
    found = parallel(size).parallelize(layer.graph, 0)
    assert found.shardings.keys() == layer.factors.keys()
    assert compare(layer, found, layer.on_ranks(found, size), whole_backward(found)) == []


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.full] if kind == "dora" else []) for kind in KINDS])
def test_every_candidate_computes_what_one_rank_computes(kind: str, size: int) -> None:
    """Also the ones that would never be chosen. Sites take their n-th candidate together."""
    layer = Layer(ARCH, KINDS[kind])
    sites = dict.fromkeys(node.site for node in layer.graph.nodes if node.site is not None)
    listed = {site: parallel(size).candidates(layer.graph, site) for site in sites}
    assert all(listed.values())
    for number in range(max(map(len, listed.values()))):
        forced: dict[str, int | None] = {}
        for candidates in listed.values():
            forced |= candidates[number % len(candidates)].axes
        found = parallel(size, forced=forced).parallelize(layer.graph, 0)
        assert {name: sharding.axis for name, sharding in found.shardings.items()} == forced
        assert compare(layer, found, layer.on_ranks(found, size), whole_backward(found)) == [], forced


def test_lora_has_all_candidates_of_the_paper() -> None:
    layer = Layer(ARCH, KINDS["lora"])
    column = {tuple(c.axes.values()) for c in parallel(2).candidates(layer.graph, "q_proj")}
    assert column >= {(None, 0), (0, 0), (1, 0)}, "C1, C2, C3"
    row = {tuple(c.axes.values()) for c in parallel(2).candidates(layer.graph, "down_proj")}
    assert row >= {(1, None), (1, 0), (1, 1)}, "R1, R2, R3"


# --- what must fail -------------------------------------------------------------------------------------------------------


def test_a_forgotten_reduce_of_a_gradient_is_seen() -> None:
    """The gradient of what column-parallel linears read is a sum over ranks."""
    layer = Layer(ARCH, KINDS["lora"])
    found = parallel(2).parallelize(layer.graph, 0)
    joint = whole_backward(found)
    forgetful = replace(
        joint, backward=tuple(replace(node, op="enter") if node.op == "reduce" else node for node in joint.backward)
    )
    assert "d:x" in compare(layer, found, layer.on_ranks(found, 2), forgetful)


def test_a_bias_that_every_rank_adds_is_seen() -> None:
    layer = Layer(ARCH, KINDS["lora"])
    found = parallel(2).parallelize(layer.graph, 0)
    assert "o_proj" in compare(layer, found, layer.on_ranks(found, 2, bias_everywhere=True), whole_backward(found))


@pytest.mark.parametrize("size", [2, 4])
def test_a_parameter_gradient_that_is_not_summed_is_seen(size: int) -> None:
    """Of 4 ranks two have the same key-value head, so that even k's split factors are summed."""
    layer = Layer(ARCH, KINDS["lora"])
    found = parallel(size).parallelize(layer.graph, 0)
    summed = {name for name, sharding in found.shardings.items() if sharding.summed}
    kept = {name: replace(sharding, summed=False) for name, sharding in found.shardings.items()}
    wrong = compare(layer, replace(found, shardings=kept), layer.on_ranks(found, size), whole_backward(found))
    assert set(wrong) == {f"dW:{name}" for name in summed} and summed
    assert ("k_proj.lora_B" in summed) == (size == 4)


def test_dropout_without_the_number_of_its_first_feature_is_seen() -> None:
    layer = Layer(ARCH, KINDS["lora with dropout"])
    found = parallel(2).parallelize(layer.graph, 0)
    run = layer.on_ranks(found, 2)
    for rank in run.ranks:
        rank.first_share = 0
    assert "o_proj.dropout" in compare(layer, found, run, whole_backward(found))


def test_a_graph_in_which_an_operator_reads_the_wrong_form_is_refused() -> None:
    found = parallel(2).parallelize(Layer(ARCH, KINDS["lora"]).graph, 0)
    found.check()
    forms = {**found.forms, "o_proj": RankForm(State.WHOLE)}
    with pytest.raises(AssertionError, match="can't be shared"):
        replace(found, forms=forms).check()


# --- what is inserted, pruned, chosen ---------------------------------------------------------------------------------------


def collectives(joint: JointGraph) -> tuple[list[str], list[str]]:
    """Collectives that send something: (forward, backward)."""
    forward, backward = (
        [f"{node.op} {node.inputs[0]}" for node in nodes if node.row.moves] for nodes in (joint.forward.nodes, joint.backward)
    )
    return forward, backward


def test_a_bare_layer_has_two_all_reduces_in_each_direction() -> None:
    joint = whole_backward(parallel(2).parallelize(trace(ARCH, CompositeBypass([]), {}), 0))
    forward, backward = collectives(joint)
    assert forward == ["reduce o_proj", "reduce down_proj"]
    assert [each.split()[0] for each in backward] == ["reduce", "reduce"]


def test_pruning_drops_the_all_reduce_below_the_lowest_adapter() -> None:
    """With an adapter at down_proj alone and nothing trained below, no gradient crosses between ranks."""
    shapes = {"down_proj.lora_A": RANK, "down_proj.lora_B": ARCH.hidden_size}
    graph = trace(ARCH, LoraBypass(["down_proj"]), shapes)
    joint = whole_backward(parallel(2).parallelize(graph, 0))
    lowest = prune(joint, trainable=shapes.__contains__, input_gradient=False)
    lowest.check()
    assert collectives(lowest) == (["reduce o_proj", "reduce down_proj+lora"], [])


def test_a_chosen_lora_needs_no_collective_of_its_own() -> None:
    """Megatron's collectives serve C1 and R1 too."""
    graph = Layer(ARCH, KINDS["lora"]).graph
    forward, backward = collectives(whole_backward(parallel(2).parallelize(graph, 0)))
    assert (len(forward), len(backward)) == (2, 2)


LARGE = replace(ARCH, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8, head_dim=128)


def large_lora(rank: int, *sites: str) -> Graph:
    shapes = linear_shapes(LARGE)
    widths = {f"{site}.lora_A": rank for site in sites} | {f"{site}.lora_B": shapes[site][0] for site in sites}
    return trace(LARGE, LoraBypass(sites), widths)


def test_only_the_bypass_of_one_site_is_left() -> None:
    layer = Layer(ARCH, KINDS["ia3"])
    bare = trace(ARCH, CompositeBypass([]), {})
    left = only_site(layer.graph, None)
    assert [(node.op, node.weight) for node in left.nodes] == [(node.op, node.weight) for node in bare.nodes]
    for site in ("q_proj", "gate_proj", "down_proj"):
        JointGraph.of(only_site(layer.graph, site)).check()
        weights = {node.weight for node in only_site(layer.graph, site).nodes if node.site}
        assert weights - {None} == {name for name in layer.factors if name.startswith(site)}


def test_an_adapter_that_lies_somewhere_stays_there() -> None:
    graph = Layer(ARCH, KINDS["lora"]).graph
    lies = parallel(2, forced={"q_proj.lora_A": 0, "down_proj.lora_B": 0}).parallelize(graph, 0).shardings
    assert lies != parallel(2).parallelize(graph, 0).shardings, "it is not the cheapest"
    fixed = parallel(2).fix({(0, name): sharding for name, sharding in lies.items()})
    assert fixed.parallelize(graph, 0).shardings == lies
    assert fixed.parallelize(graph, 1).shardings != lies, "of another layer nothing is known"


def test_a_sharding_that_cannot_be_had_is_refused_by_name() -> None:
    graph = large_lora(12, "q_proj")  # 12 is no multiple of 8 ranks
    forced: dict[str, int | None] = {"q_proj.lora_A": 0}
    with pytest.raises(ConfigError, match=r"adapter_sharding: q_proj\.lora_A out can't be had with 8 ranks"):
        TensorParallel(size=8, kv_heads=8, prices=NVLINK, forced=forced).parallelize(graph, 0)
