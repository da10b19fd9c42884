"""Which library serves PyTorch's flash operators on a CUDA device, with devices and packages played."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import attention as torch_attention

from coserve.kernels import choose, cuda_attention
from tests.played_flash import play_flash

DEVICE = torch.device("cpu")
"""Plays the part of a CUDA device."""


class Flash3:
    """An installed FlashAttention 3, and what PyTorch has for it. factor: by which its gradients are wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, factor: float = 1.0, error: Exception | None = None) -> None:
        self.active: str | None = None
        self.calls = Counter[str]()
        play_flash(monkeypatch)
        own = cuda_attention._flash_backward

        def backward(*inputs: Any, **edges: Any) -> list[torch.Tensor]:
            self.calls[self.active or "own"] += 1
            return [part * (factor if self.active == "FA3" else 1.0) for part in own(*inputs, **edges)]

        def activate(name: str) -> None:
            if error is not None:
                raise error
            self.active = name

        def restore() -> None:
            self.active = None

        module = ModuleType(choose.FLASH3_PACKAGE)
        module.__spec__ = __spec__
        monkeypatch.setitem(sys.modules, choose.FLASH3_PACKAGE, module)
        monkeypatch.setattr(cuda_attention, "_flash_backward", backward)
        monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", activate)
        monkeypatch.setattr(torch_attention, "current_flash_attention_impl", lambda: self.active)
        monkeypatch.setattr(torch_attention, "restore_flash_attention_impl", restore)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.fixture(autouse=True)
def _chosen_anew() -> Iterator[None]:
    choose.flash_note.cache_clear()
    yield
    choose.flash_note.cache_clear()


def test_without_it_pytorchs_own_kernels_serve() -> None:
    assert choose.flash_note(torch.device("cuda")) == "attention by PyTorch's flash kernels"


def test_flash_attention_3_serves_where_it_is_installed_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    flash3 = Flash3(monkeypatch)
    assert choose.flash_note(DEVICE) == "attention by FlashAttention 3 (flash_attn_interface)"
    assert choose.flash_note(DEVICE) == choose.flash_note(DEVICE)
    assert flash3.active == "FA3" and flash3.calls == {"own": 1, "FA3": 1}, "it is tried once"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0)])
def test_other_devices_keep_pytorchs_own(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    flash3 = Flash3(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose.flash_note(DEVICE) == "attention by PyTorch's flash kernels"
    assert flash3.active is None and not flash3.calls


@pytest.mark.parametrize(("factor", "error", "said"), [
    (1.1, None, "differ from PyTorch's own"), (float("nan"), None, "differ from PyTorch's own"),
    (1.0, RuntimeError("no such kernel"), "no such kernel"),
])
def test_one_that_fails_is_left_out_and_named(
    factor: float, error: Exception | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash3 = Flash3(monkeypatch, factor=factor, error=error)
    note = choose.flash_note(DEVICE)
    assert note.startswith("attention by PyTorch's flash kernels; flash_attn_interface is installed") and said in note
    assert flash3.active is None


def test_what_somebody_else_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    flash3 = Flash3(monkeypatch)
    flash3.active = "FA4"
    assert choose.flash_note(DEVICE) == "attention by FA4, in PyTorch's place" and flash3.active == "FA4"
