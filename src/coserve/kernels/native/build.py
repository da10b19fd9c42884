"""Compiles rows.cpp for the processor that it runs on, once per machine: the result is kept in the cache directory.

Owns: compiler, flags, where the library lies. Does not own: what its functions do (rows.cpp) or take (__init__.py).

It is linked with GNU's OpenMP library under the name that PyTorch has loaded its copy by, so that both share one team of
threads. Other compilers than GNU's bring another OpenMP library and are not used.
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
from collections.abc import Iterator
from pathlib import Path

from coserve.cachedir import cache_directory

SOURCE = Path(__file__).parent / "rows.cpp"
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    "-shared", "-fPIC",
)
_LIMIT_S = 120


class BuildError(Exception):
    """Why there is no library, as a clause of a sentence."""


def compiler() -> str:
    """The compiler's path: $CXX, or g++. Raises BuildError."""
    if not sys.platform.startswith("linux"):
        raise BuildError("they are made for Linux only")
    name = os.environ.get("CXX") or "g++"
    found = shutil.which(name)
    if found is None:
        raise BuildError(f"there is no compiler {name}; install g++, or set CXX to one that is compatible with it")
    return found


def _processor() -> str:
    """What -march=native depends on: the first processor's model and features."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "\n".join(line for line in first if line.startswith(("model name", "flags", "Features", "CPU part")))
    return platform.processor()


def flags() -> tuple[str, ...]:
    """The compiler's flags here."""
    wide = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
    return (*_FLAGS, *wide)


def built_library() -> Path:
    """The library's path, made now if it is not in the cache. Raises BuildError."""
    program, options = compiler(), flags()
    try:
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=_LIMIT_S).stdout
        if "Free Software Foundation" not in version:
            raise BuildError(f"{program} is not GNU's compiler; set CXX to g++")
        made_of = "\n".join((SOURCE.read_text(), *options, version, _processor()))
        name = f"rows-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
        directory = cache_directory() / "kernels"
        if (directory / name).is_file():
            return directory / name
        with _writable(directory) as place:
            handle, unfinished = tempfile.mkstemp(suffix=".so", dir=place)
            os.close(handle)
            subprocess.run(
                [program, *options, "-o", unfinished, str(SOURCE)], capture_output=True, text=True, check=True, timeout=_LIMIT_S
            )
            os.replace(unfinished, place / name)
            return place / name
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()[-1:]
        raise BuildError(f"{program} failed: {lines[0].strip() if lines else error}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{program} failed: {error}") from error


@contextlib.contextmanager
def _writable(directory: Path) -> Iterator[Path]:
    """The directory, made if need be, or one that lasts as long as the process where it can't be written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK)
    except OSError:
        writable = False
    yield directory if writable else Path(tempfile.mkdtemp(prefix="coserve-kernels-"))
