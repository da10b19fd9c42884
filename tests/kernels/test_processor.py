"""Whether the CPU multiplies bfloat16 is told from its units and from oneDNN's cap, and how fast by timing it; 'auto' follows
both and says so."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from coserve.bench.paper.models import read_shape
from coserve.core import ConfigError
from coserve.kernels import processor
from coserve.kernels.processor import CAPS, bfloat16_products, bfloat16_speed
from coserve.model.memory import weight_bytes
from coserve.runtime import loaded
from coserve.runtime.loaded import check_dtype, resolve_dtype

CPU, ARCH = torch.device("cpu"), read_shape("Llama-3.1-8B")


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A processor with AVX512-BF16 and no cap, whatever this one is."""
    for name in CAPS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(loaded, "bfloat16_speed", lambda: 1.6)
    monkeypatch.setattr(loaded, "device_bytes", lambda device: weight_bytes(ARCH, 4) * 2.1)
    return monkeypatch


def auto() -> tuple[torch.dtype, str]:
    """What 'auto' is, and the line that is said about it."""
    lines: list[str] = []
    found = resolve_dtype("auto", CPU, ARCH, lines.append)
    (line,) = lines
    return found, line


def test_a_processor_with_units(units: pytest.MonkeyPatch) -> None:
    assert auto() == (
        torch.bfloat16, "bfloat16: this processor multiplies it (AVX512-BF16), 1.6 times as fast as float32")
    units.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert auto() == (
        torch.bfloat16, "bfloat16: this processor multiplies it (AMX, AVX512-BF16), 1.6 times as fast as float32")


def test_a_processor_with_slow_units(units: pytest.MonkeyPatch) -> None:
    units.setattr(loaded, "bfloat16_speed", lambda: 0.52)
    assert auto() == (
        torch.float32, "float32: this processor multiplies it (AVX512-BF16), but at 0.5 times the speed of float32")
    units.setattr(loaded, "device_bytes", lambda device: weight_bytes(ARCH, 4) * 1.9)
    assert auto() == (
        torch.bfloat16, "bfloat16: this processor multiplies it (AVX512-BF16), but at 0.5 times the speed of float32, whose "
        "weights would take more than 50% of the memory")


@pytest.mark.skipif(not bfloat16_products().supported, reason="this processor does not multiply bfloat16")
def test_the_speed_is_a_ratio_of_the_shortest_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three and two seconds here, among longer ones: float32's products and bfloat16's take turns."""
    durations = iter([9.0, 9.0, 3.0, 2.0, *([7.0] * 6)])
    now, begun = 0.0, False

    def clock() -> float:
        nonlocal now, begun
        begun = not begun
        now += 0.0 if begun else next(durations)
        return now

    monkeypatch.setattr(processor, "time", SimpleNamespace(perf_counter=clock))
    bfloat16_speed.cache_clear()
    try:
        assert bfloat16_speed() == 1.5
    finally:
        bfloat16_speed.cache_clear()


def test_a_processor_without(units: pytest.MonkeyPatch) -> None:
    units.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert auto() == (torch.float32, "float32: this processor does not multiply bfloat16 (no AVX512-BF16, no AMX)")


def test_a_build_without_onednn(units: pytest.MonkeyPatch) -> None:
    units.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert auto() == (torch.float32, "float32: this PyTorch has no oneDNN, which multiplies bfloat16")


@pytest.mark.parametrize("name", CAPS)
@pytest.mark.parametrize(("cap", "supported"), [
    ("AVX512_CORE", False), ("avx512_core_vnni", False), ("AVX2", False), ("SSE41", False), ("avx512_core_bf16", True),
    ("AVX512_CORE_AMX", True), ("AVX10_1_512", True), ("DEFAULT", True), ("", True), ("no such name", True),
])
def test_a_capped_library(units: pytest.MonkeyPatch, name: str, cap: str, supported: bool) -> None:
    units.setenv(name, cap)
    found = bfloat16_products()
    assert found.supported == supported
    if not supported:
        assert auto() == (torch.float32, f"float32: {name}={cap} keeps oneDNN from multiplying bfloat16")


def test_the_first_cap_that_is_not_empty_counts(units: pytest.MonkeyPatch) -> None:
    units.setenv(CAPS[1], "AVX512_CORE")
    units.setenv(CAPS[0], "")
    assert not bfloat16_products().supported
    units.setenv(CAPS[0], "ALL")
    assert bfloat16_products().supported


_VERBOSE = """
import torch
from coserve.kernels.processor import bfloat16_products
torch.ops.mkldnn._reorder_linear_weight(torch.ones(64, 64), None)
print("SUPPORTED", bfloat16_products().supported)
"""


@pytest.mark.full
@pytest.mark.skipif(not bfloat16_products().supported, reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize("env", [
    {"ONEDNN_MAX_CPU_ISA": "nonsense"}, {"ONEDNN_MAX_CPU_ISA": "", "DNNL_MAX_CPU_ISA": "AVX512_CORE"},
    {"ONEDNN_MAX_CPU_ISA": "avx512_core_bf16", "DNNL_MAX_CPU_ISA": "AVX2"},
])
def test_the_caps_mean_what_onednn_takes_them_for(env: dict[str, str]) -> None:
    """oneDNN itself says which instruction set it uses."""
    ran = subprocess.run(
        [sys.executable, "-c", _VERBOSE], env={**os.environ, **env, "ONEDNN_VERBOSE": "1"}, capture_output=True, text=True,
        check=True, timeout=120,
    )
    isa = next(line for line in ran.stdout.splitlines() if ",info,cpu,isa:" in line)
    assert f"SUPPORTED {'bfloat16' in isa or 'AVX 10' in isa}" in ran.stdout, isa


def test_other_names_are_taken_as_they_are() -> None:
    lines: list[str] = []
    assert resolve_dtype("float64", CPU, ARCH, lines.append) is torch.float64
    assert resolve_dtype("bfloat16", CPU, ARCH, lines.append) is torch.bfloat16
    assert not lines, "there was nothing to choose"
    with pytest.raises(ConfigError, match="dtype: must be auto or one of float32, bfloat16, float64, got 'int8'"):
        check_dtype("int8")


def test_cuda_takes_bfloat16() -> None:
    lines: list[str] = []
    assert resolve_dtype("auto", torch.device("cuda"), ARCH, lines.append) is torch.bfloat16
    assert lines == ["bfloat16: CUDA devices multiply it"]
