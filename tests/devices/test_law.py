"""The law of a model on a device against its formulas, written out here in plain numbers, and devices as text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coserve.core import ConfigError, Contents, PassCost, UnitCost
from coserve.devices.law import device_law, even_sizes, ridge_rows
from coserve.devices.table import DEVICES, LINKS, Device, find_device
from coserve.model.architecture import Architecture

H100 = DEVICES["H100"]
B, F = 2.9e12, 0.62 * 989e12
N, L, D, Q, G, V = 6_979_321_856, 32, 4096, 4096, 1024, 128256  # Llama-3.1-8B; N: 32 x 218103808
W, R = 2 * N / B, 2 * N / F
LAUNCH = 1.5e-3
DECODE = PassCost(8, 8, 8, 8 * 350, 0, 0, 0, 0, 0)
FUSED = PassCost(8 + 220 + 300, 9, 8, 8 * 350, 220 * 221 // 2, 300, 45150, 300, 0, 1)


def test_a_pass(archs: Mapping[str, Architecture]) -> None:
    law = device_law(archs["llama-8b"], H100)
    head = max(V * D * 2 / B, 8 * 2 * V * D / F)
    assert law.pass_seconds(DECODE) == pytest.approx(LAUNCH + W + head + 8 * 350 * 2 * G * 2 * L / B, rel=1e-12)
    pair, rows = 4 * Q * L / (0.7 * F), 528
    assert law.pass_seconds(FUSED) == pytest.approx(
        LAUNCH + max(W, rows * R) + max(V * D * 2 / B, 9 * 2 * V * D / F) + 8 * 350 * 2 * G * 2 * L / B
        + (24310 + 45150) * pair + 300 * 10 * D * 2 * L / B + 300 * 4 * V * D / F, rel=1e-12,
    )
    assert 6.5e-3 < law.pass_seconds(DECODE) < 7e-3


def test_only_passes_that_decode_are_captured(archs: Mapping[str, Architecture]) -> None:
    law, captured = (device_law(archs["llama-8b"], H100, captured=captured) for captured in (False, True))
    assert law.pass_seconds(DECODE) - captured.pass_seconds(DECODE) == pytest.approx(1.2e-3)
    prompt, ridden = DECODE._replace(rows=9, prefill_spans=1), DECODE._replace(rows=9, fused_rows=1)
    for cost in (FUSED, prompt, ridden):
        assert captured.pass_seconds(cost) == pytest.approx(law.pass_seconds(cost), rel=1e-12)
    unit = UnitCost(True, 100, 4, 1000, 0)
    assert captured.unit_seconds(unit) == law.unit_seconds(unit)
    assert law.uncaptured_seconds == 0.0 and ("inference", "uncaptured", 0) not in law.coefficients
    slow = device_law(archs["llama-8b"], replace(H100, captured_launch_s=2e-3), captured=True)
    assert slow.pass_seconds(DECODE) == law.pass_seconds(DECODE), "nobody captures what then takes longer"


@pytest.mark.parametrize("rows", [1, 2, 8, 200, 201, 202, 211, 212, 300, 4096])
def test_every_number_of_rows(archs: Mapping[str, Architecture], rows: int) -> None:
    law = device_law(archs["llama-8b"], H100)
    prompt = PassCost(rows, 0, 0, 0, 0, 0, 0, 0, 0)
    assert law.pass_seconds(prompt) == pytest.approx(LAUNCH + max(W, rows * R), rel=1e-12)
    heads = law.pass_seconds(prompt._replace(head_rows=rows)) - law.pass_seconds(prompt)
    assert heads == pytest.approx(max(V * D * 2 / B, rows * 2 * V * D / F), rel=1e-9)
    forward, backward = UnitCost(False, rows, 4, 1000, 7), UnitCost(True, rows, 4, 1000, 0)
    pairs = 4 * 1000 * 4 * Q / (0.7 * F)
    ahead = 30e-6 + 4 * (40e-6 + max(W, rows * R) / L) + pairs + 7 * 4 * V * D / F
    back = 30e-6 + 4 * (40e-6 + max(W, 1.05 * rows * R) / L) + 2.5 * pairs
    assert law.unit_seconds(forward) == pytest.approx(ahead, rel=1e-12)
    assert law.unit_seconds(backward) == pytest.approx(back, rel=1e-12)
    again = law.unit_seconds(backward._replace(recompute_fraction=0.4))
    assert again == pytest.approx(back + 0.4 * (ahead - 7 * 4 * V * D / F), rel=1e-12)


@pytest.mark.parametrize("rows", [1, 100, 211, 212, 700])
def test_an_overlap_in_part(archs: Mapping[str, Architecture], rows: int) -> None:
    law = device_law(archs["llama-8b"], replace(H100, overlap=0.25))
    both = max(W, rows * R) + 0.75 * min(W, rows * R)
    assert law.pass_seconds(PassCost(rows, 0, 0, 0, 0, 0, 0, 0, 0)) == pytest.approx(LAUNCH + both, rel=1e-12)
    assert law.unit_seconds(UnitCost(False, rows, 2, 0, 0)) == pytest.approx(30e-6 + 2 * (40e-6 + both / L), rel=1e-12)


def test_the_rest(archs: Mapping[str, Architecture]) -> None:
    law = device_law(archs["llama-8b"], replace(H100, iteration_s=2e-3))
    assert law.optimizer_seconds(10**6) == pytest.approx(30e6 / B)
    assert law.seconds(Contents(DECODE, (), 0)) == pytest.approx(2e-3 + law.pass_seconds(DECODE))


def test_the_knots_are_at_the_ridge(archs: Mapping[str, Architecture]) -> None:
    assert {name: round(ridge_rows(device)) for name, device in DEVICES.items()} == {
        "A100-80GB": 121, "H100": 211, "H200": 153, "B200": 199, "L40S": 299, "RTX 4090": 117,
    }
    law = device_law(archs["llama-8b"], H100)
    assert law.knots("inference", "rows") == (1, 211, 212)
    assert law.knots("forward", "rows") == (0, 1, 211, 212) and law.knots("backward", "rows") == (0, 1, 201, 202)
    assert law.knots("inference", "decode_context") == (0,)
    with pytest.raises(KeyError):
        law.knots("inference", "colour")
    slow = device_law(archs["llama-8b"], replace(H100, peak_flops=1e12))
    assert ridge_rows(replace(H100, peak_flops=1e12)) < 1 and slow.knots("inference", "rows") == (1,)
    assert slow.pass_seconds(PassCost(3, 0, 0, 0, 0, 0, 0, 0, 0)) == pytest.approx(LAUNCH + 3 * 2 * N / 0.62e12)


def test_tensor_parallel(archs: Mapping[str, Architecture]) -> None:
    arch = archs["qwen-32b"]
    layer = 2 * 5120 * 5120 + 2 * 1024 * 5120 + 3 * 5120 * 27648
    parameters, device = 64 * layer // 4, DEVICES["A100-80GB"]
    bandwidth, flops = 1.6e12, 0.62 * 312e12
    law, rows = device_law(arch, device, tensor_parallel_size=4), 300
    reduce = 8e-6 + rows * 5120 * 2 * 2 * 3 / 4 / 235e9
    products = max(2 * parameters / bandwidth, rows * 2 * parameters / flops)
    cost = PassCost(rows, 1, 0, 0, 1000, 0, 0, 0, 0)
    head, pairs = 152064 // 4 * 5120 * 2 / bandwidth, 1000 * 4 * 5120 // 4 * 64 / (0.7 * flops)
    assert law.pass_seconds(cost) == pytest.approx(LAUNCH + products + head + pairs + 2 * 64 * reduce, rel=1e-12)
    unit = UnitCost(True, rows, 3, 0, 0)
    layer_s = max(2 * parameters / bandwidth, 1.05 * rows * 2 * parameters / flops) / 64 + 40e-6 + 2 * reduce
    assert law.unit_seconds(unit) == pytest.approx(30e-6 + 3 * layer_s, rel=1e-12)
    decode = PassCost(1, 0, 1, 1000, 0, 0, 0, 0, 0)
    context = law.pass_seconds(decode) - law.pass_seconds(decode._replace(decode_context=0))
    assert context == pytest.approx(1000 * 2 * 1024 // 4 * 2 * 64 / bandwidth)
    slow = device_law(arch, replace(device, link=LINKS["pcie4"]), tensor_parallel_size=4)
    assert slow.pass_seconds(cost) > law.pass_seconds(cost)


def test_which_degrees_are_possible(archs: Mapping[str, Architecture]) -> None:
    assert even_sizes(archs["llama-8b"]) == [1, 2, 4, 8]
    with pytest.raises(ConfigError, match="1, 2, 4 or 8 devices, not by 3") as caught:
        device_law(archs["llama-8b"], H100, tensor_parallel_size=3)
    assert caught.value.param == "tensor_parallel_size"
    with pytest.raises(ConfigError, match="by 1 devices, not by 0"):
        device_law(replace(archs["llama-8b"], num_kv_heads=1), H100, tensor_parallel_size=0)


COSTS = st.builds(
    PassCost, st.integers(600, 5000), st.integers(0, 600), st.integers(0, 300), st.integers(0, 10**6), st.integers(0, 10**6),
    st.integers(0, 300), st.integers(0, 10**6), st.integers(0, 300), st.integers(0, 4), st.integers(0, 4),
)


@given(COSTS, st.sampled_from(PassCost._fields), st.integers(1, 1000), st.sampled_from(list(DEVICES.values())))
def test_more_of_anything_takes_no_less(
    archs: Mapping[str, Architecture], cost: PassCost, field: str, more: int, device: Device
) -> None:
    law = device_law(archs["llama-8b"], device)
    larger = cost._replace(**{field: getattr(cost, field) + more})
    assert law._inference(larger) >= law._inference(cost)


def test_a_faster_device_takes_less(archs: Mapping[str, Architecture]) -> None:
    order = [device_law(archs["llama-8b"], DEVICES[name]) for name in ("A100-80GB", "H100", "H200", "B200")]
    for slower, faster in itertools.pairwise(order):
        assert slower.pass_seconds(FUSED) > faster.pass_seconds(FUSED)
        assert slower.unit_seconds(UnitCost(True, 8192, 32, 0, 0)) >= faster.unit_seconds(UnitCost(True, 8192, 32, 0, 0))


# Devices as text.


@pytest.mark.parametrize(("text", "name"), [
    ("h100", "H100"), (" H100 ", "H100"), ("a100", "A100-80GB"), ("A100-80gb", "A100-80GB"), ("A100-SXM4-80GB", "A100-80GB"),
    ("l40s", "L40S"), ("rtx4090", "RTX 4090"), ("RTX 4090", "RTX 4090"), ("4090", "RTX 4090"), ("b200", "B200"),
    ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA H200", "H200"),
])
def test_spellings(text: str, name: str) -> None:
    assert find_device(text) == DEVICES[name]


def test_other_numbers() -> None:
    assert find_device("h100,efficiency=0.4, launch_s=3e-4") == replace(H100, efficiency=0.4, launch_s=3e-4)
    assert find_device("l40s,link=NVLink4").link is LINKS["nvlink4"]
    assert find_device("l40s,link=5e10").link.bandwidth == 5e10
    custom = find_device("bandwidth=2.9e12,flops=989e12,memory=80e9,link=nvlink4")
    assert custom == replace(H100, name=custom.name)


@pytest.mark.parametrize(("text", "complaint"), [
    ("h10", r"'h10' is not known \(did you mean H100\?\); known are A100-80GB, H100, "),
    ("toaster", r"'toaster' is not known; known are"),
    ("", "'' is not known"),
    ("bandwidth=1e12", "needs peak_flops, memory_bytes too"),
    ("h100,colour=3", "'colour=3' is not FIELD=NUMBER; the fields are memory_bytes, bandwidth"),
    ("h100,efficiency", "'efficiency' is not FIELD=NUMBER"),
    ("h100,efficiency=1.2", "efficiency is a share, at most 1, got 1.2"),
    ("h100,overlap=-0.1", "overlap must be a finite number 0 or more"),
    ("h100,efficiency=much", "efficiency must be a number, got 'much'"),
    ("h100,efficiency=nan", "efficiency must be a finite number above 0, got nan"),
    ("h100,bandwidth=0", "bandwidth must be a finite number above 0"),
    ("h100,launch_s=-1", "launch_s must be a finite number 0 or more"),
    ("h100,flops=1,peak_flops=2", "peak_flops is given twice"),
    ("h100,link=rope", "link must be one of nvlink3, nvlink4, nvlink5, pcie4, or a number, got 'rope'"),
    ("h100,link=0", "link must be a positive number"),
])
def test_what_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        find_device(text)
    assert caught.value.param == "device"
