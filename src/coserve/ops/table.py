"""One row per operator: names, gradient rules and what they read, memory behaviour, cost, and how several ranks share it.

Pruning, rematerialization, memory planning and parallelization read these rows and know no operator by name. A new adapter kind
is written in these operators; a new operator is one row here, one function in `run.py`, and one in `tests/torch_ops.py`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Cost(enum.Enum):
    """What recomputing an operator's output takes."""

    ELEMENTWISE = "element-wise"
    MATMUL = "matrix product"
    ATTENTION = "attention"


class State(enum.Enum):
    """How the ranks of a tensor-parallel group hold a value, and how they hold its gradient."""

    WHOLE = "="
    """Every rank has all of the value, and all of its gradient."""
    ENTERED = "=+"
    """Every rank has all of the value. Its gradient is the sum of the ranks' tensors."""
    SPLIT = "|"
    """Every rank has its own features of the value, and the gradient of these."""
    PARTIAL = "+"
    """The value is the sum of the ranks' tensors. Every rank has all of its gradient."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way in which ranks may share an operator: the states of its inputs and outputs. axis: along which the ranks split its
    parameter [out, in]; None: every rank has all of it, or there is none."""

    inputs: tuple[State, ...]
    outputs: tuple[State, ...]
    axis: int | None = None


@dataclass(frozen=True, slots=True)
class Gradient:
    """One node of an operator's backward rule.

    op: the operator that computes it; "identity" passes the gradient on. takes: "d:NAME" is the gradient of output NAME,
    any other name is a forward input or output that the rule READS. yields: the inputs whose gradients come out, or
    "weight" for the parameter's.
    """

    op: str
    takes: tuple[str, ...]
    yields: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cost: Cost
    gradients: tuple[Gradient, ...] = ()
    products: int = 1
    """How many matrix products it has; in attention, products of queries with keys or values."""
    inplace: bool = False
    """The first output may take the memory of the first input."""
    accumulates: bool = False
    """The kernel can add into its output instead of writing it."""
    whole: tuple[str, ...] = ()
    """Inputs that are read (or gradients that are written) for other tokens than the window's."""
    signs: tuple[str, ...] = ()
    """Inputs of which it is only read whether they are above 0: a bit each would do."""
    packs: bool = False
    """It makes a smaller form of its input, which only backward reads."""
    exact: tuple[str, ...] = ()
    """Inputs whose bits must be the same in backward as in forward, unless backward recomputes the outputs too: the gradient
    combines them with those outputs."""
    ways: tuple[Way, ...] = ()
    """How ranks may share it."""
    moves: int = 0
    """How often (ranks - 1) / ranks of its value's bytes leave each rank. An operator that moves bytes is never run again by
    backward."""


WHOLE, ENTERED, SPLIT, PARTIAL = State.WHOLE, State.ENTERED, State.SPLIT, State.PARTIAL


def _alike(num_inputs: int, *states: State) -> tuple[Way, ...]:
    """One way per state, in which everything has that state."""
    return tuple(Way((state,) * num_inputs, (state,)) for state in states)


def _collective(
    source: State, target: State, gradient: str, *, moves: int = 0, inplace: bool = False, accumulates: bool = False
) -> Operator:
    """An operator that changes only how ranks hold its value."""
    return Operator(
        inputs=("x",), outputs=("out",), cost=Cost.ELEMENTWISE, gradients=(Gradient(gradient, ("d:out",), ("x",)),),
        ways=(Way((source,), (target,)),), moves=moves, inplace=inplace, accumulates=accumulates,
    )


COLLECTIVES: dict[str, Operator] = {
    "enter": _collective(WHOLE, ENTERED, "reduce", inplace=True),
    "reduce": _collective(PARTIAL, WHOLE, "identity", moves=2, inplace=True),
    "gather": _collective(SPLIT, WHOLE, "slice", moves=1),
    "gather_entered": _collective(SPLIT, ENTERED, "scatter", moves=1),
    "scatter": _collective(PARTIAL, SPLIT, "gather", moves=1),
    "slice": _collective(WHOLE, SPLIT, "gather"),
    "slice_entered": _collective(ENTERED, SPLIT, "spread"),
    "spread": _collective(SPLIT, PARTIAL, "slice", accumulates=True),
}
"""Operators whose output is their input, held by the ranks in another state. spread lays a rank's features into zeros."""


TABLE: dict[str, Operator] = {
    "rmsnorm": Operator(
        inputs=("x",), outputs=("out",), cost=Cost.ELEMENTWISE,
        gradients=(Gradient("rmsnorm_dgrad", ("d:out", "x"), ("x",)), Gradient("rmsnorm_wgrad", ("d:out", "x"), ("weight",))),
        ways=_alike(1, WHOLE, SPLIT),
    ),
    "linear": Operator(
        inputs=("x",), outputs=("out",), cost=Cost.MATMUL, accumulates=True,
        gradients=(Gradient("linear_dgrad", ("d:out",), ("x",)), Gradient("linear_wgrad", ("d:out", "x"), ("weight",))),
        ways=(Way((ENTERED,), (SPLIT,), 0), Way((SPLIT,), (PARTIAL,), 1)),
    ),
    "segment_linear": Operator(
        inputs=("x",), outputs=("out",), cost=Cost.MATMUL, accumulates=True,
        gradients=(
            Gradient("segment_linear_dgrad", ("d:out",), ("x",)),
            Gradient("segment_linear_wgrad", ("d:out", "x"), ("weight",)),
        ),
        ways=(
            *_alike(1, WHOLE, ENTERED, PARTIAL), Way((ENTERED,), (SPLIT,), 0), Way((SPLIT,), (PARTIAL,), 1),
        ),
    ),
    "rope": Operator(
        inputs=("x",), outputs=("out",), cost=Cost.ELEMENTWISE, inplace=True,
        gradients=(Gradient("rope_dgrad", ("d:out",), ("x",)),),
        ways=_alike(1, SPLIT),
    ),
    "attention": Operator(
        inputs=("q", "k", "v"), outputs=("out", "lse"), cost=Cost.ATTENTION, products=2, whole=("k", "v"), exact=("q",),
        gradients=(Gradient("attention_dgrad", ("d:out", "q", "k", "v", "out", "lse"), ("q", "k", "v")),),
        ways=(Way((SPLIT,) * 3, (SPLIT,) * 2),),
    ),
    "silu_mul": Operator(
        inputs=("gate", "up"), outputs=("out",), cost=Cost.ELEMENTWISE,
        gradients=(Gradient("silu_mul_dgrad", ("d:out", "gate", "up"), ("gate", "up")),),
        ways=_alike(2, SPLIT),
    ),
    "add": Operator(
        inputs=("a", "b"), outputs=("out",), cost=Cost.ELEMENTWISE, inplace=True,
        gradients=(Gradient("identity", ("d:out",), ("a",)), Gradient("identity", ("d:out",), ("b",))),
        ways=_alike(2, WHOLE, ENTERED, SPLIT, PARTIAL),
    ),
    # inplace and accumulates: it may add into the memory of its own input
    "segment_scale": Operator(
        inputs=("x",), outputs=("out",), cost=Cost.ELEMENTWISE, inplace=True, accumulates=True,
        gradients=(
            Gradient("segment_scale_wgrad", ("d:out", "x"), ("weight",)),
            Gradient("segment_scale_dgrad", ("d:out",), ("x",)),
        ),
        ways=(*_alike(1, WHOLE, ENTERED, PARTIAL), Way((SPLIT,), (SPLIT,), 0)),
    ),
    "relu": Operator(
        inputs=("x",), outputs=("out",), cost=Cost.ELEMENTWISE, inplace=True,
        gradients=(Gradient("relu_dgrad", ("d:out", "out"), ("x",)),),
        ways=_alike(1, WHOLE, ENTERED, SPLIT),
    ),
    "gelu": Operator(
        inputs=("x",), outputs=("out",), cost=Cost.ELEMENTWISE, inplace=True,
        gradients=(Gradient("gelu_dgrad", ("d:out", "x"), ("x",)),),
        ways=_alike(1, WHOLE, ENTERED, SPLIT),
    ),
    "dropout": Operator(
        inputs=("x",), outputs=("out",), cost=Cost.ELEMENTWISE, accumulates=True,
        gradients=(Gradient("dropout_dgrad", ("d:out",), ("x",)),),
        ways=_alike(1, WHOLE, ENTERED, SPLIT, PARTIAL),
    ),
    **COLLECTIVES,
    # smaller forms of kept values, and what backward makes of them (compiler/compress.py)
    "sign_bits": Operator(inputs=("x",), outputs=("bits",), cost=Cost.ELEMENTWISE, packs=True, signs=("x",)),
    "sign_values": Operator(inputs=("bits",), outputs=("x",), cost=Cost.ELEMENTWISE),
    "fp8_encode": Operator(inputs=("x",), outputs=("bits", "exponent"), cost=Cost.ELEMENTWISE, packs=True),
    "fp8_decode": Operator(inputs=("bits", "exponent"), outputs=("x",), cost=Cost.ELEMENTWISE),
    # backward operators
    "rmsnorm_dgrad": Operator(inputs=("grad", "x"), outputs=("out",), cost=Cost.ELEMENTWISE, accumulates=True),
    "rmsnorm_wgrad": Operator(inputs=("grad", "x"), outputs=("weight",), cost=Cost.ELEMENTWISE),
    "linear_dgrad": Operator(inputs=("grad",), outputs=("out",), cost=Cost.MATMUL, accumulates=True),
    "linear_wgrad": Operator(inputs=("grad", "x"), outputs=("weight",), cost=Cost.MATMUL),
    "segment_linear_dgrad": Operator(inputs=("grad",), outputs=("out",), cost=Cost.MATMUL, accumulates=True),
    "segment_linear_wgrad": Operator(inputs=("grad", "x"), outputs=("weight",), cost=Cost.MATMUL),
    "rope_dgrad": Operator(inputs=("grad",), outputs=("out",), cost=Cost.ELEMENTWISE, inplace=True),
    "attention_dgrad": Operator(
        inputs=("grad", "q", "k", "v", "out", "lse"), outputs=("d_q", "d_k", "d_v"), cost=Cost.ATTENTION, products=5,
        whole=("k", "v", "d_k", "d_v"),
    ),
    "silu_mul_dgrad": Operator(inputs=("grad", "gate", "up"), outputs=("d_gate", "d_up"), cost=Cost.ELEMENTWISE),
    "segment_scale_wgrad": Operator(inputs=("grad", "x"), outputs=("weight",), cost=Cost.ELEMENTWISE),
    "segment_scale_dgrad": Operator(inputs=("grad",), outputs=("out",), cost=Cost.ELEMENTWISE, inplace=True, accumulates=True),
    "relu_dgrad": Operator(inputs=("grad", "out"), outputs=("d_x",), cost=Cost.ELEMENTWISE, inplace=True, signs=("out",)),
    "gelu_dgrad": Operator(inputs=("grad", "x"), outputs=("d_x",), cost=Cost.ELEMENTWISE, inplace=True),
    "dropout_dgrad": Operator(inputs=("grad",), outputs=("out",), cost=Cost.ELEMENTWISE, accumulates=True),
}
