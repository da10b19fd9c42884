"""What can be told about CUDA without a device: fake tensors have shapes, dtypes and a device, and compute nothing."""

from __future__ import annotations

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from coserve.core import NO_CONTENTS
from coserve.kernels import library
from coserve.ops.run import RUNNERS, Factor, RowContext
from coserve.profiling.measure import Profiler
from coserve.runtime.loaded import resolve_device


class OneFactor(RowContext):
    """All rows have the same adapter."""

    def __init__(self, factor: Factor) -> None:
        self.factor = factor

    def segments(self, name: str):  # noqa: ANN201 mirrors the base
        return [(slice(None), self.factor)]


class Whole:
    """A tensor of which all rows are taken. Slicing a fake one asks for a device."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, part: slice) -> torch.Tensor:
        return self.tensor


@pytest.mark.parametrize("at_once", [False, True])
def test_gradients_of_weights_are_not_rounded_to_bfloat16_on_their_way(
    at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """at_once: whether the library adds a product to memory of a wider type."""
    products: list[torch.dtype] = []
    product = torch.mm

    def watched(*args: torch.Tensor, **options: torch.dtype) -> torch.Tensor:
        result = product(*args, **options)
        products.append(result.dtype)
        return result

    def added(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **options: object) -> None:
        assert options == {"out_dtype": torch.float32, "alpha": 2.0, "out": total}
        products.append(total.dtype)

    monkeypatch.setattr(torch, "mm", watched)
    monkeypatch.setattr(torch, "addmm", added)
    monkeypatch.setattr(library, "_adds_wider", lambda *_: at_once)
    with FakeTensorMode():
        grad, x = (torch.empty(32, width, dtype=torch.bfloat16, device="cuda") for width in (64, 16))
        factor = Factor(torch.empty(64, 16, dtype=torch.bfloat16, device="cuda"), 2.0, torch.zeros(64, 16, device="cuda"))
        RUNNERS["segment_linear_wgrad"](OneFactor(factor), "q_proj.lora_B", {}, False, [], [Whole(grad), Whole(x)])
    assert products == [torch.float32]


def test_deterministic_products_are_possible_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert resolve_device("auto").type == "cuda"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert resolve_device("cuda").type == "cuda"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "what the user has chosen stays"


def test_the_first_run_of_a_point_does_not_count_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles kernels or captures a graph, however long a point takes."""
    profiler = object.__new__(Profiler)
    profiler.device = torch.device("cuda")
    for name in ("begin", "end"):
        monkeypatch.setattr(profiler, name, lambda *_: None)
    for seconds, expected in (((9.0, 0.3), [0.3]), ((9.0, 0.1, 0.11), [0.1, 0.11]), ((9.0, 0.02, 0.01, 0.01), [0.01, 0.01])):
        monkeypatch.setattr(profiler, "once", iter(seconds).__next__)
        assert [took for _, took in profiler._run(NO_CONTENTS)] == expected
