"""Compiles rows.cpp for the processor that it runs on, by Inductor's builder, once per machine: the result is kept.

Owns: when it is compiled anew, and where the library lies. Does not own: compiler, flags and OpenMP (torch._inductor), what the
functions do (rows.cpp) or take (__init__.py). Inductor is imported only to compile, as that alone takes seconds.

GNU's compiler links GNU's OpenMP library under the name that PyTorch has loaded its own copy by, so that both share one team of
threads. Others would bring another library, and with it a second team; they are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
import tempfile
from pathlib import Path

import torch

from coserve.cachedir import cache_directory

SOURCE = Path(__file__).parent / "rows.cpp"
_FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno")
"""What Inductor's own flags, made for code that is vectorized already, turn off."""
_WIDE = "-mprefer-vector-width=512"
"""For x86-64: GNU's compiler takes half of the width by itself."""


class BuildError(Exception):
    """Why there is no library, as a clause of a sentence."""


def built_library() -> Path:
    """The library's path, made now if it is not in the cache. Raises BuildError."""
    if not sys.platform.startswith("linux"):
        raise BuildError("they are made for Linux only")
    flags = [*_FLAGS, *([_WIDE] if platform.machine() == "x86_64" else [])]
    made_of = "\n".join((SOURCE.read_text(), torch.__version__, *flags, _processor()))
    name = f"rows-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    kept = cache_directory() / "kernels"
    if (kept / name).is_file():
        return kept / name
    with tempfile.TemporaryDirectory(prefix="coserve-kernels-") as place:
        made = _compile(Path(place), flags)
        directory = kept if _is_writable(kept) else Path(tempfile.mkdtemp(prefix="coserve-kernels-"))
        handle, whole = tempfile.mkstemp(suffix=".so", dir=directory)
        with open(handle, "wb") as file:
            file.write(made.read_bytes())
        os.replace(whole, directory / name)  # at once: another process may look for it
        return directory / name


def _compile(place: Path, flags: list[str]) -> Path:
    """The library in a directory. Raises BuildError."""
    try:
        from torch._inductor import exc
        from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions, get_cpp_compiler, is_gcc

        if not is_gcc():
            raise BuildError(f"{get_cpp_compiler()} is not GNU's compiler; set CXX to g++")
        builder = CppBuilder("rows", str(SOURCE), CppTorchOptions(extra_flags=flags), output_dir=str(place))
        builder.build()
        return Path(builder.get_target_file_path())
    except exc.InvalidCxxCompiler as error:
        raise BuildError("there is no C++ compiler; install g++, or set CXX to its path") from error
    except exc.CppCompileError as error:
        lines = [line for line in error.output.splitlines() if "error" in line] or error.output.splitlines() or ["no reason"]
        raise BuildError(f"the compiler failed: {lines[0].strip()}") from error
    except (ImportError, OSError, TypeError, AttributeError, RuntimeError) as error:  # a private part of PyTorch
        raise BuildError(f"PyTorch {torch.__version__} can't compile them: {type(error).__name__}: {error}") from error


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
