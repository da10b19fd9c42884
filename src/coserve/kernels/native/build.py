"""Compiles rows.cpp for the processor that it runs on, by Inductor's builder, once per machine: the result is kept.

Owns: when it is compiled anew, and where the library lies. Does not own: compiler, flags and OpenMP (torch._inductor), what the
functions do (rows.cpp) or take (__init__.py).

GNU's compiler links GNU's OpenMP library under the name that PyTorch has loaded its own copy by, so that both share one team of
threads. Others would bring another library, and with it a second team; they are refused. A child process compiles: Inductor
takes seconds and 150 MB to import, and leaves settings behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from coserve.cachedir import cache_directory
from coserve.durable import write_file

SOURCE = Path(__file__).parent / "rows.cpp"
_FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno")
"""What Inductor's own flags, made for code that is vectorized already, turn off."""
_WIDE = "-mprefer-vector-width=512"
"""For x86-64: GNU's compiler takes half of the width by itself."""
_LIMIT_S = 300
_temporary: list[tempfile.TemporaryDirectory[str]] = []
"""Where libraries lie that can't be kept; they go with the process."""


class BuildError(Exception):
    """Why there is no library, as a clause of a sentence."""


def built_library(*, anew: bool = False) -> Path:
    """The library's path, made now if the cache has no whole one, or if it is wanted anew. Raises BuildError."""
    if not sys.platform.startswith("linux"):
        raise BuildError("they are made for Linux only")
    name, kept = library_name(), cache_directory() / "kernels"
    for path in () if anew else kept.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError):
            if path.name == _file_name(name, path.read_bytes()):
                return path
    directory = kept if _is_writable(kept) else _temporary_directory()
    with tempfile.TemporaryDirectory(prefix="coserve-kernels-") as place:
        try:
            content = _compile_in_child(Path(place)).read_bytes()
            made = directory / _file_name(name, content)
            write_file(made, content, cached=True, mode=0o755)
        except OSError as error:
            raise BuildError(f"the library can't be written: {error}") from error
    return made


def library_name() -> str:
    """The same for libraries whose results are the same."""
    return f"rows-{hashlib.sha256(_made_of().encode()).hexdigest()[:16]}"


def _file_name(name: str, content: bytes) -> str:
    """Says what the file holds: one that was cut short would end the process that loads it."""
    return f"{name}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def compile_library(place: Path) -> Path:
    """The library in a directory, compiled by this process. Raises BuildError."""
    try:
        from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions, get_cpp_compiler, is_gcc
        from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
    except ImportError as error:  # a private part of PyTorch
        raise BuildError(f"PyTorch {torch.__version__} can't compile them: {error}") from error
    try:
        if not is_gcc():
            raise BuildError(f"the C++ compiler is {get_cpp_compiler()}, and only g++ is used; set CXX to it")
        source = Path(shutil.copy(SOURCE, place))  # Inductor does not quote paths
        builder = CppBuilder("rows", str(source), CppTorchOptions(extra_flags=_flags()), output_dir=str(place))
        builder.build()
        return Path(builder.get_target_file_path())
    except InvalidCxxCompiler as error:
        raise BuildError("there is no C++ compiler; install g++, or set CXX to its path") from error
    except CppCompileError as error:
        lines = [line for line in error.output.splitlines() if "error" in line] or error.output.splitlines() or ["no reason"]
        raise BuildError(f"the compiler failed: {lines[0].strip()}") from error
    except (TypeError, AttributeError) as error:
        raise BuildError(f"PyTorch {torch.__version__} can't compile them: {error}") from error


def _compile_in_child(place: Path) -> Path:
    program = "import sys; from coserve.kernels.native.build import child; child(sys.argv[1])"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, str(place)], capture_output=True, text=True, check=False, timeout=_LIMIT_S
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"the compiler has not come to an end in {_LIMIT_S} s") from error
    if done.returncode:
        raise BuildError((done.stdout.splitlines() or done.stderr.splitlines() or ["the compiler's process failed"])[-1])
    return Path(done.stdout.splitlines()[-1])


def child(place: str) -> None:
    """The whole of a child process: prints the library's path, or why there is none and exits with 1."""
    try:
        print(compile_library(Path(place)))
    except BuildError as error:
        print(error)
        sys.exit(1)


def _flags() -> list[str]:
    return [*_FLAGS, *([_WIDE] if platform.machine() == "x86_64" else [])]


def _made_of() -> str:
    """Everything that decides what the library is."""
    settings = (f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(("CXX", "TORCHINDUCTOR_")))
    return "\n".join((SOURCE.read_text(), torch.__version__, *_flags(), *settings, _processor()))


def _processor() -> str:
    """What -march=native depends on: the first processor's model and features."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "\n".join(line for line in first if line.startswith(("model name", "flags", "Features", "CPU part")))
    return platform.processor()


def _is_writable(directory: Path) -> bool:
    """Whether files can be made there; makes the directory."""
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        return os.access(directory, os.W_OK)
    return False


def _temporary_directory() -> Path:
    _temporary.append(tempfile.TemporaryDirectory(prefix="coserve-kernels-"))
    return Path(_temporary[-1].name)
