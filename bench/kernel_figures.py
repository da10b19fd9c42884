"""What Triton's compiler makes of a launch, for devices that are not here: registers, spills, shared memory, loads, products.

`launches` runs ordinary launchers on tensors without memory and notes the kernels that they start. `figures` compiles such a
launch for a device, specialized as Triton's own launcher specializes it, and reads the machine code with the tools that come
with Triton. Nothing runs, and no device is needed.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

CAPABILITIES = (80, 90, 100)
"""A100, H100 and H200, B200."""
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""The most shared memory of a program, by device."""

_LOAD = re.compile(r"\b(LDG|LDGSTS)\.E(\.[A-Z0-9.]+)?")
_BULK_LOAD = re.compile(r"\b(UTMALDG|UBLKCP)\b")
_PRODUCT = re.compile(r"\b(HMMA|HGMMA|QGMMA|IMMA|DMMA|UTC[A-Z]*MMA)\b")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_LOAD_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


class Launch(NamedTuple):
    """One start of a kernel: a `triton.JITFunction` and its arguments."""

    kernel: Any
    args: tuple[Any, ...]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The kernel's module and function."""
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one kernel on one device.

    registers: of a thread. spilled_bytes: of a thread, in memory instead of registers. shared_bytes: of a program.
    load_bytes: of the widest load from global memory, per thread. narrow_loads: instructions that load one or two bytes.
    products: instructions of the matrix units. instructions: of all kinds.
    """

    kernel: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    load_bytes: int
    narrow_loads: int
    products: int
    instructions: int


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a kernel's figures must keep to on every device; see `faults`.

    load_bytes: the widest load has at least so many bytes. narrow_loads, registers: at most so many. products: whether it
    computes on the matrix units.
    """

    load_bytes: int = 16
    narrow_loads: int = 0
    registers: int = 255
    products: bool = False


def missing_tool() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    try:
        from triton import knobs
    except ImportError:
        return "needs triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "the interpreter compiles nothing"
    for name in ("ptxas", "ptxas_blackwell", "cuobjdump", "nvdisasm"):
        try:
            getattr(knobs.nvidia, name).path  # noqa: B018  looks for the file
        except RuntimeError as error:
            return f"{name}: {error}"
    return None


@contextlib.contextmanager
def launches() -> Iterator[list[Launch]]:
    """While it is open, launched kernels do not run but are appended to the list it gives. Every tensor without memory counts
    as aligned to 16 bytes."""
    from triton.runtime.jit import JITFunction

    noted: list[Launch] = []
    run = JITFunction.run

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        noted.append(Launch(self, args, options))

    JITFunction.run = note
    try:
        yield noted
    finally:
        JITFunction.run = run


def compile_launch(launch: Launch, capability: int) -> Any:
    """The compiled kernel that Triton's launcher would start for these arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, target = launch.kernel, GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, special, rest = bind(*launch.args, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(backend, dict(launch.options), arguments, special, rest)
    return compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options.__dict__)


def figures(launch: Launch, capability: int) -> Figures:
    """Compiles a launch and reads its code."""
    from triton import knobs

    built = compile_launch(launch, capability)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(built.asm["cubin"])

        def read(what: str) -> str:
            return subprocess.run([knobs.nvidia.cuobjdump.path, what, path], capture_output=True, text=True, check=True).stdout

        usage, code = _USAGE.search(read("-res-usage")), read("-sass")
    assert usage is not None, "cuobjdump tells no usage"
    registers, stack, _, local = map(int, usage.groups())
    lines = [line for line in code.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)]
    loads = [16 for line in lines if _BULK_LOAD.search(line)]
    loads += [_width(found[2] or "") for line in lines if (found := _LOAD.search(line))]
    return Figures(
        kernel=launch.name, capability=capability, registers=registers,
        spilled_bytes=stack + local, shared_bytes=built.metadata.shared,
        load_bytes=max(loads, default=0), narrow_loads=sum(width < 4 for width in loads),
        products=sum(bool(_PRODUCT.search(line)) for line in lines), instructions=len(lines),
    )


def _width(suffixes: str) -> int:
    """Bytes that a load with these suffixes brings to a thread."""
    return next((width for name, width in _LOAD_BYTES.items() if name in suffixes.split(".")), 4)


def all_figures(wanted: Sequence[tuple[Launch, int]]) -> list[Figures]:
    """`figures` of (launch, device)s, side by side: assembler and disassembler are processes of their own. Sources are parsed
    one by one, since Python 3.11's parser fails now and then in several threads."""
    lock, parse = threading.Lock(), ast.parse

    def alone(*args: Any, **options: Any) -> Any:
        with lock:
            return parse(*args, **options)

    with mock.patch.object(ast, "parse", alone), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(figures, *zip(*wanted, strict=True))) if wanted else []


def faults(found: Figures, bounds: Bounds) -> list[str]:
    """In what a kernel goes beyond its bounds or its device."""
    where = f"{found.kernel} on sm_{found.capability}"
    wrong = {
        f"spills {found.spilled_bytes} bytes": found.spilled_bytes > 0,
        f"takes {found.shared_bytes} bytes of shared memory": found.shared_bytes > SHARED_BYTES[found.capability],
        f"takes {found.registers} registers, not {bounds.registers}": found.registers > bounds.registers,
        f"loads {found.load_bytes} bytes at most, not {bounds.load_bytes}": found.load_bytes < bounds.load_bytes,
        f"loads a byte or two in {found.narrow_loads} places, not {bounds.narrow_loads}": (
            found.narrow_loads > bounds.narrow_loads
        ),
        "does not use the matrix units": bounds.products and not found.products,
    }
    return [f"{where} {what}" for what, is_wrong in wrong.items() if is_wrong]


def as_row(found: Figures) -> dict[str, Any]:
    """For JSON and tables."""
    return asdict(found)
