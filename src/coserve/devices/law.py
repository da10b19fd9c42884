"""The latency law of a model on a device, from the model's shapes and the device's data: a roofline.

Matrix products of r rows take the longer of reading their weights and of their arithmetic. The ridge is the number of rows for
which both take as long: below it rows beside others are almost free. (Where the device overlaps both only in part, each maximum
below is the longer plus the part of the shorter that is not hidden.) In seconds, with the device's bandwidth B and achieved
FLOP/s F, N parameters in the linears of L layers, hidden width D, widths Q of queries and G of keys, vocabulary V, and b bytes
per weight:

    weights      W = N b / B            row  R = 2 N / F            ridge = W / R = F b / 2 B rows
    pass         launch + max(W, rows R) + head(head rows) + decode context x 2 G b L / B
                 + pairs of prompts and of fused rows x 4 Q L / (attention's share x F)
                 + fused rows x kept widths x D b L / B + fused labels x 4 V D / F
    head         max(V D b / B, rows x 2 V D / F)
    forward      unit + layers (layer + max(W, rows R) / L + pairs x 4 Q / (attention's share x F)) + labels x 4 V D / F
    backward     the same with backward_rows x rows and backward_pairs x pairs, without labels
    optimizer    elements x update_bytes / B
    all-reduce   latency + rows x D b x 2 (n - 1) / (n x bus bandwidth)

Where passes that only decode are replayed as CUDA graphs, their launch is shorter than that of other passes.

On n > 1 devices (tensor parallelism) N, Q, G and V are those of one rank, and every layer has two all-reduces per direction.
Every rank updates all elements of the adapter. A backward unit that runs a share of forward again takes that share of a forward
unit longer (LatencyModel.unit_seconds).

Owns: these formulas. Does not own: the devices' numbers (table.py), what is measured on a real one (profiling/).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from coserve.core import ConfigError
from coserve.devices.table import Device
from coserve.model.architecture import Architecture
from coserve.model.decoder import linear_shapes, tensor_parallel_sizes
from coserve.scheduler.latency import UNCAPTURED, Coefficient, LatencyModel

_PRODUCT = 2
"""FLOPs per weight and row of a product: a multiplication and an addition."""
_PAIR_PRODUCTS = 2
"""Products of attention in forward: scores, and the weighted sum of values."""
_LABEL_PRODUCTS = 2
"""Products of a label row with the output head: its logits, and their gradient."""
_ALL_REDUCES = 2
"""All-reduces per layer and direction under tensor parallelism: after attention, and after the MLP."""


class _Rank(NamedTuple):
    """What one of the ranks holds of a model. parameters: of all layers' linears. queries, keys: widths."""

    parameters: int
    queries: int
    keys: int
    vocabulary: int


def device_law(
    arch: Architecture, device: Device, *, itemsize: int = 2, tensor_parallel_size: int = 1, captured: bool = False
) -> LatencyModel:
    """The latency law of a model on a device, or on several of them.

    itemsize: bytes per weight, activation and cached key or value; `device.peak_flops` is for that dtype. captured: whether
    passes that only decode are replayed as CUDA graphs, so that they take `captured_launch_s` instead of `launch_s`.
    Curves are exact at whole numbers of rows: their knots are the two around the ridge.
    Raises ConfigError (param `tensor_parallel_size`) for a number of devices that can't share the model evenly.
    """
    rank = _rank(arch, tensor_parallel_size)
    layers, width, bandwidth, flops = arch.num_layers, arch.hidden_size, device.bandwidth, device.flops
    weights, row = rank.parameters * itemsize / bandwidth, _PRODUCT * rank.parameters / flops
    head, head_row = (size * rank.vocabulary * width for size in (itemsize / bandwidth, _PRODUCT / flops))
    pair = _PRODUCT * _PAIR_PRODUCTS * rank.queries / (device.attention_efficiency * flops)
    label = _PRODUCT * _LABEL_PRODUCTS * rank.vocabulary * width / flops
    reduce_s, reduce_row = _all_reduces(device, tensor_parallel_size, width * itemsize)

    rows, heads = _Products(weights, row, device.overlap), _Products(head, head_row, device.overlap)
    first = rows(1) + layers * (reduce_s + reduce_row)
    launch = min(device.captured_launch_s, device.launch_s) if captured else device.launch_s
    terms: dict[Coefficient, float] = {
        ("iteration", "once", 0): device.iteration_s,
        ("inference", "once", 0): first + launch,
        ("inference", "decode_context", 0): 2 * rank.keys * itemsize * layers / bandwidth,
        ("inference", "prefill_pairs", 0): layers * pair,
        ("inference", "fused_pairs", 0): layers * pair,
        ("inference", "fused_rows", 0): device.kept_widths * width * itemsize * layers / bandwidth,
        ("inference", "fused_labels", 0): label,
        ("forward", "labels", 0): label,
        ("optimizer", "elements", 0): device.update_bytes / bandwidth,
    }
    if captured:
        terms["inference", UNCAPTURED, 0] = device.launch_s - launch
    terms |= {("inference", "rows", knot): slope + layers * reduce_row for knot, slope in rows.further().items()}
    terms |= {("inference", "head_rows", knot): slope for knot, slope in heads.curve().items()}
    for group, products, pairs in (("forward", 1.0, 1.0), ("backward", device.backward_rows, device.backward_pairs)):
        curve = _Products(weights / layers, products * row / layers, device.overlap).curve()
        terms |= {
            (group, "once", 0): device.unit_s,
            (group, "layers", 0): device.unit_layer_s + reduce_s,
            (group, "pairs", 0): pairs * pair,
        } | {(group, "rows", knot): slope + reduce_row for knot, slope in curve.items()}
    return LatencyModel(terms)


def ridge_rows(device: Device, *, itemsize: int = 2) -> float:
    """Rows whose products take as long as reading the weights, whatever the model is."""
    return device.flops * itemsize / (_PRODUCT * device.bandwidth)


def even_sizes(arch: Architecture) -> list[int]:
    """The numbers of devices that can share a model evenly: attention heads, key-value heads and the MLP's width."""
    return [size for size in tensor_parallel_sizes(arch) if arch.num_kv_heads % size == 0]


def _rank(arch: Architecture, size: int) -> _Rank:
    """One rank's part. A vocabulary that does not divide is padded."""
    possible = even_sizes(arch)
    if size not in possible:
        *others, last = map(str, possible)
        raise ConfigError(
            f"tensor_parallel_size: the model's {arch.num_heads} heads, {arch.num_kv_heads} key-value heads and MLP of "
            f"{arch.intermediate_size} can be shared by {' or '.join([*([', '.join(others)] if others else []), last])} "
            f"devices, not by {size}", param="tensor_parallel_size",
        )
    parameters = arch.num_layers * sum(map(math.prod, linear_shapes(arch).values()))
    heads, keys = arch.num_heads // size, arch.num_kv_heads // size
    return _Rank(parameters // size, heads * arch.head_dim, keys * arch.head_dim, -(-arch.vocab_size // size))


def _all_reduces(device: Device, size: int, row_bytes: int) -> tuple[float, float]:
    """Seconds of one layer's all-reduces in one direction: whatever they hold, and per row."""
    if size == 1:
        return 0.0, 0.0
    moved = 2 * (size - 1) / size * row_bytes
    return _ALL_REDUCES * device.link.latency_s, _ALL_REDUCES * moved / device.link.bandwidth


class _Products(NamedTuple):
    """Seconds of matrix products as a function of their rows. shared: of reading the weights. each: of a row's arithmetic.
    overlap: as Device's."""

    shared: float
    each: float
    overlap: float

    def __call__(self, rows: int) -> float:
        """Seconds of a number of rows, at least 1."""
        arithmetic = rows * self.each
        return max(self.shared, arithmetic) + (1 - self.overlap) * min(self.shared, arithmetic)

    def further(self) -> dict[int, float]:
        """{knot: slope} beyond one row, exact for every whole number of rows."""
        ridge = int(self.shared / self.each)
        if ridge < 1:
            return {1: self.each}
        return {1: (1 - self.overlap) * self.each, ridge: max(0.0, self(ridge + 1) - self(ridge)), ridge + 1: self.each}

    def curve(self) -> dict[int, float]:
        """{knot: slope} from one row on; without rows there is no time."""
        return {0: self(1), **self.further()}
