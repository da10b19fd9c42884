"""A CUDA device that computes nothing: tensors have shapes, dtypes and a place, and every launch is counted.

PyTorch's fake tensors play the device. They raise for operands on two devices and for values that the host reads. A dispatch
mode above them watches for what they let pass: copies to the host, operators that only a CPU has, float64. Triton's kernels
are not run; their arguments are checked and their launches are counted.

A build of PyTorch without CUDA refuses to slice a fake CUDA tensor, since it has no guard for such a device. One that does
nothing is compiled (2 s) and loaded once per process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from coserve.kernels import triton as triton_kernels
from coserve.runtime import graphs

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>);
}
"""

FREE = frozenset({
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "alias", "set_", "resize_",
    "lift_fresh", "_record_function_enter_new", "_record_function_exit", "is_pinned", "_pin_memory", "device",
    "_unsafe_view", "item",
})
"""Operators that launch nothing, beside views."""

LAUNCHES: Mapping[str, int] = {
    "sort": 4, "topk": 2, "cumsum": 2, "_grouped_mm": 2, "repeat_interleave": 3, "_flash_attention_backward": 3,
    "index_put_": 2, "index_put": 2,
}
"""Kernels of an operator, where it is not one."""

PRODUCTS = frozenset({"mm", "addmm", "bmm", "addmm_"})
SMALL = 1 << 14
"""Elements up to which float64 is no fault: log-probabilities of a few tokens."""
CPU_ONLY = re.compile(r"mkldnn|_for_cpu|onednn|quantized")


class CudaFault(AssertionError):
    """Something that would fail or wait on a device."""


@functools.cache
def _load_guard() -> bool:
    """Whether fake CUDA tensors can be sliced: on a build with CUDA, or with the guard that is made here."""
    if torch.version.cuda is not None:
        return True
    compiler = shutil.which("g++")
    if compiler is None:
        return False
    root, place = Path(torch.__file__).parent, Path(tempfile.mkdtemp(prefix="coserve-guard-"))
    (place / "guard.cpp").write_text(_GUARD)
    command = [compiler, "-shared", "-fPIC", "-std=c++20", "guard.cpp", f"-I{root}/include", f"-L{root}/lib", "-lc10"]
    done = subprocess.run([*command, "-o", "guard.so"], cwd=place, capture_output=True, text=True, check=False)
    if done.returncode:
        return False
    ctypes.CDLL(str(place / "guard.so"))
    shutil.rmtree(place)
    return True


needs_fake_cuda = pytest.mark.skipif(
    not triton_kernels.available() or shutil.which("g++") is None, reason="needs Triton and a C++ compiler"
)


class FakeCuda(TorchDispatchMode):
    """The device that `fake_cuda` gives. launches: by name. syncs: how often the host has waited for it, where it may."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.syncs = 0
        self._reads_allowed = 0

    @property
    def total(self) -> int:
        """Launches so far."""
        return self.launches.total()

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """Gives the launches that happen inside, once it is left."""
        before, found = self.launches.copy(), Counter[str]()
        yield found
        found.update(self.launches - before)

    @contextlib.contextmanager
    def host_may_read(self) -> Iterator[None]:
        """Inside, reading values is no fault: what happens between iterations. What is read is zeros."""
        self._reads_allowed += 1
        try:
            yield
        finally:
            self._reads_allowed -= 1

    def launched(self, name: str, count: int = 1) -> None:
        self.launches[name] += count

    def _read(self, name: str, tensor: Tensor) -> Any:
        """The host reads values, for which it waits: zeros, where it may."""
        if not self._reads_allowed:
            raise CudaFault(f"{name}: the host waits for the device\n{_where()}")
        self.syncs += 1
        if name == "_local_scalar_dense":
            return 0 if not tensor.dtype.is_floating_point else 0.5
        with _disable_current_modes():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)

    def _copy_to_host(self, target: Tensor, non_blocking: bool = False) -> Tensor:
        """A copy to the host's memory, which may be queued."""
        if not non_blocking and not self._reads_allowed:
            raise CudaFault(f"copy_: the host waits for the device\n{_where()}")
        self.syncs += not non_blocking
        self.launched("copy to the host")
        with _disable_current_modes():
            return target.zero_()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        ins = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if _is_cpu(kwargs.get("device")) and not any(isinstance(t, FakeTensor) for t in ins):
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            with _disable_current_modes():  # the host computes
                return func(*args, **kwargs)
        if name == "_local_scalar_dense" or (name == "_to_copy" and _is_cpu(kwargs.get("device", "cuda"))):
            return self._read(name, ins[0])
        if name == "copy_" and not isinstance(args[0], FakeTensor):
            return self._copy_to_host(args[0], *args[2:], **kwargs)
        result = func(*args, **kwargs)
        outs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not any(t.device.type == "cuda" for t in (*ins, *outs)):
            return result
        if CPU_ONLY.search(func._schema.name):
            raise CudaFault(f"{name} has no kernel for CUDA")
        if name in PRODUCTS and not _product_types_agree(func, args, ins):
            raise CudaFault(f"{name} of {', '.join(str(t.dtype) for t in ins)}\n{_where()}")
        if any(t.dtype == torch.float64 and t.device.type == "cuda" and t.numel() > SMALL for t in outs):
            raise CudaFault(f"{name} computes in float64\n{_where()}")
        if not (func.is_view or name in FREE):
            self.launched(name, LAUNCHES.get(name, 1))
        return result


def _product_types_agree(func: Any, args: Sequence[Any], ins: Sequence[Tensor]) -> bool:
    """Whether all operands have one type; of a product with a type of its own for the result, what it is added to has that."""
    if not func._overloadname.startswith("dtype"):
        return len({t.dtype for t in ins}) == 1
    first, second, dtype = args[-3:]
    return first.dtype == second.dtype and all(t.dtype == dtype for t in ins if t is not first and t is not second)


def _is_cpu(device: object) -> bool:
    return device is None or torch.device(device).type == "cpu"  # type: ignore[call-overload]


def _where() -> str:
    """The innermost frames of the product's code."""
    frames = [f for f in traceback.extract_stack() if "/coserve/" in f.filename]
    return "".join(traceback.format_list(frames[-4:]))


class FakeEvent:
    """An event that has always happened."""

    def __init__(self, **_: object) -> None: ...
    def record(self, stream: object = None) -> None: ...
    def synchronize(self) -> None: ...
    def wait(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1.0


class FakeStream:
    """A stream on which nothing is queued."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def wait_stream(self, other: FakeStream) -> None: ...
    def wait_event(self, event: FakeEvent) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        return event or FakeEvent()


def _check_launch(device: FakeCuda, kernel: Any, args: Sequence[Any], options: Mapping[str, Any]) -> None:
    """A Triton kernel would be launched: its tensors lie on the device, and its name is counted."""
    options = {name: value for name, value in options.items() if name not in ("grid", "warmup")}
    for value in (*args, *options.values()):
        if isinstance(value, Tensor) and value.device.type != "cuda":
            raise CudaFault(f"{kernel.__name__} gets a tensor on {value.device}")
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            raise CudaFault(f"{kernel.__name__} gets float64")
    names = set(kernel.arg_names)
    if unknown := set(options) - names - {"num_warps", "num_stages", "num_ctas", "maxnreg"}:
        raise CudaFault(f"{kernel.__name__} has no {', '.join(unknown)}")
    if len(args) + len(names & set(options)) != len(names):
        raise CudaFault(f"{kernel.__name__} takes {len(names)} arguments, not {len(args) + len(names & set(options))}")
    device.launched(kernel.__name__)


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Inside, tensors on "cuda" are fake, and what would need a driver does nothing."""
    if not _load_guard():
        pytest.skip("the guard for a fake device can't be compiled")
    import triton

    device = FakeCuda()

    def record(body: Callable[[], None], *_: object) -> Callable[[], None]:
        body()
        return lambda: device.launched("a graph")

    def run(kernel: Any, *args: Any, **options: Any) -> None:
        _check_launch(device, kernel, args, options)

    host_tensor = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        with _disable_current_modes():
            made = host_tensor(data, **options)
        return made if _is_cpu(device) else made.to(device)

    synchronize = mock.Mock(side_effect=lambda *_: setattr(device, "syncs", device.syncs + 1))
    cuda = {
        "is_available": lambda: True, "get_device_capability": lambda *_: (9, 0), "get_device_name": lambda *_: "fake",
        "synchronize": synchronize, "Event": FakeEvent, "Stream": FakeStream, "current_stream": lambda *_: FakeStream(),
        "stream": lambda *_: contextlib.nullcontext(), "mem_get_info": lambda *_: (64 << 30, 80 << 30),
        "current_device": lambda: 0, "max_memory_allocated": lambda *_: 0, "memory_allocated": lambda *_: 0,
        "graph_pool_handle": lambda: None,
        "reset_peak_memory_stats": lambda *_: None, "empty_cache": lambda: None, "device_count": lambda: 1,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda self, *_: self))
        stack.enter_context(mock.patch.object(torch, "tensor", tensor))
        stack.enter_context(mock.patch.object(graphs, "record", record))
        stack.enter_context(mock.patch.object(triton.JITFunction, "run", run))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(device)
        yield device


class FakeSource:
    """A checkpoint without values: shapes by the Hugging Face names of an architecture's tensors."""

    def __init__(self, architecture: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.architecture, self.shapes = architecture, shapes

    def read(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        return torch.empty(self.shapes[name], dtype=dtype, device=device)


def host_array(count: int) -> np.ndarray:
    """Ids that no model refuses."""
    return np.arange(count, dtype=np.int64) % 97
