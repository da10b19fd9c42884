"""The direction of imports, read from the syntax tree: a module imports from lower ranks only."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"

RANKS: Mapping[str, float] = {
    "core": 0, "cachedir": 0, "durable": 0, "hostcopy": 0, "machine": 0,
    "config": 0.5,  # the design gives both 0; a ConfigError is one of core's errors, so config stands on core
    "chat": 0.8,  # conversations as text; the tokenizer stands on it
    "text": 1, "kernels": 1, "parallel": 1,
    "grammar": 1.5,  # masks over the tokenizer's vocabulary
    "ops": 2,
    "model": 3,
    "peft": 3.5,  # the design gives model and peft 3; an adapter is laid out by the decoder's shapes, so peft stands on model
    "compiler": 4,
    "runtime": 5, "scheduler": 5, "finetune": 5, "cluster": 5,
    "planning": 5.3,  # counts what the runtime takes
    "devices": 5.5,  # a scheduler's latency law from a model's shapes and a device's data
    "training": 5.6,  # runs finetune's jobs on the runtime, under a plan
    "profiling": 5.6,  # measures the runtime for the scheduler's latency law
    "simulation": 5.6,  # the scheduler on a virtual clock
    "engine": 6,
    "server": 7,
    "": 7.5,  # coserve/__init__.py, the public face
    "plots": 8, "bench": 8,
    "demo": 8.2,  # draws plots
    "cli": 8.5,  # its commands draw plots; the demo is one of them
    "__main__": 9,
}

LAZY: Mapping[str, frozenset[str]] = {
    "coserve.bench.trainers": frozenset({"openai"}),
    "coserve.compiler.baselines": frozenset({"peft"}),
    "coserve.compiler.rematerialize": frozenset({"networkx"}),
    "coserve.demo.client": frozenset({"openai"}),
    "coserve.grammar.build": frozenset({"llguidance"}),
    "coserve.grammar.matcher": frozenset({"llguidance"}),
    "coserve.kernels.native.build": frozenset({"torch"}),  # its compiler, which takes seconds to import
    "coserve.model.gguf": frozenset({"gguf"}),
    "coserve.model.locate": frozenset({"huggingface_hub"}),
    "coserve.server.replicas.objects": frozenset({"fsspec", "s3fs"}),
    "coserve.server.replicas.raycluster": frozenset({"ray"}),
}
"""Heavy, optional packages that a module may import inside a function."""

BLOCKED = (
    "fastapi", "uvicorn", "zmq", "msgspec", "sqlalchemy", "prometheus_client", "gguf", "matplotlib", "typer", "rich",
    "llguidance",
)
"""Packages that `import coserve` must do without. huggingface_hub can't be blocked: transformers imports it itself."""


class Import(NamedTuple):
    """`name` as written, with the imported name appended where that may be a module; lazy: inside a function."""

    name: str
    line: int
    lazy: bool
    relative: bool


def imports(source: str) -> Iterator[Import]:
    """Every import statement, wherever it stands."""
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(source), False)]
    while pending:
        node, inside = pending.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, inside, False)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(f"{node.module or ''}.{alias.name}", node.lineno, inside, node.level > 0)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        pending.extend((child, inside) for child in ast.iter_child_nodes(node))


def room(module: str) -> str:
    """'coserve.model.gguf' -> 'model'; 'coserve' -> ''. A name that is no room ('coserve.load_model') is the public face."""
    parts = module.split(".")
    first = parts[1] if len(parts) > 1 else ""
    return first if first in RANKS or len(parts) > 2 else ""


def violations(sources: Mapping[str, str]) -> list[str]:
    """What breaks the rules, one line each."""
    found = []
    for module, source in sources.items():
        mine = module.split(".")[1] if "." in module else ""
        if mine not in RANKS:
            found.append(f"{module} has no rank: add its room to RANKS")
            continue
        for item in imports(source):
            where = f"{module}:{item.line} imports {item.name}"
            if item.relative:
                found.append(f"{where} by a relative path")
            if item.lazy and item.name.split(".")[0] not in LAZY.get(module, ()):
                found.append(f"{where} inside a function")
            if item.relative or item.name.split(".")[0] != "coserve":
                continue
            target = room(item.name)
            if target not in RANKS:
                found.append(f"{where}, which has no rank")
            elif target != mine and RANKS[target] >= RANKS[mine]:
                found.append(f"{where}: rank {RANKS[target]:g} from rank {RANKS[mine]:g}")
    return found


def project() -> dict[str, str]:
    """{module name: source} of the package."""
    sources = {}
    for path in sorted((SRC / "coserve").rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return sources


def reachable(start: str, sources: Mapping[str, str]) -> tuple[set[str], set[str]]:
    """(modules of the project, other top-level packages) that a module's imports lead to, without the public face."""
    ours: set[str] = set()
    others: set[str] = set()
    pending = [start]
    while pending:
        module = pending.pop()
        if module in ours:
            continue
        ours.add(module)
        for item in imports(sources[module]):
            parent = item.name.rpartition(".")[0]
            known = next((name for name in (item.name, parent) if name in sources and name != "coserve"), None)
            if known is not None:
                pending.append(known)
            else:
                others.add(item.name.split(".")[0])
    return ours, others


def test_modules_import_from_lower_ranks_only() -> None:
    sources = project()
    assert len(sources) > 40
    found = violations(sources)
    assert not found, "\n".join(found)


def test_every_room_of_the_rank_map_but_planned_ones_exists() -> None:
    rooms = {module.split(".")[1] for module in project() if "." in module}
    assert rooms - RANKS.keys() == set()
    assert RANKS.keys() - rooms - {"", "parallel", "server", "__main__"} == set()


@pytest.mark.parametrize(("module", "source", "complaint"), [
    ("coserve.ops.run", "from coserve.model import linear", "rank 3 from rank 2"),
    ("coserve.ops.run", "import coserve.engine.engine", "rank 6 from rank 2"),
    ("coserve.runtime.rows", "from coserve.scheduler.blocks import BlockPool", "rank 5 from rank 5"),
    ("coserve.runtime.rows", "from coserve import scheduler", "rank 5 from rank 5"),
    ("coserve.engine.engine", "from coserve import load_model", "rank 7.5 from rank 6"),
    ("coserve.engine.engine", "if True:\n    import coserve", "rank 7.5 from rank 6"),
    ("coserve.core", "from coserve.config.settings import LoraConfig", "rank 0.5 from rank 0"),
    ("coserve.engine.engine", "def f():\n    import json", "inside a function"),
    ("coserve.engine.engine", "def f():\n    import gguf", "inside a function"),
    ("coserve.engine.engine", "class A:\n    async def f(self):\n        from coserve.core import Unit", "inside a function"),
    ("coserve.engine.engine", "from . import trainer", "relative"),
    ("coserve.engine.engine", "from coserve.cellar.wine import red", "no rank"),
    ("coserve.cellar.wine", "", "no rank"),
])
def test_the_walker_sees_each_kind_of_violation(module: str, source: str, complaint: str) -> None:
    (found,) = violations({module: source})
    assert complaint in found


def test_the_walker_allows_what_is_allowed() -> None:
    assert not violations({
        "coserve.peft.lora": "from coserve.model.decoder import layer\nfrom coserve.peft import format",
        "coserve.model.gguf": "def f():\n    import gguf\n    from gguf.constants import X",
        "coserve.cli.main": "from coserve import load_model\nfrom coserve.plots import loss_curve\nimport json",
    })


def test_scheduler_reaches_no_tensor_library() -> None:
    sources = project()
    modules = [module for module in sources if module.startswith("coserve.scheduler")]
    assert "coserve.scheduler.blocks" in modules
    for module in modules:
        ours, others = reachable(module, sources)
        assert not others & {"torch", "transformers", "triton"}, f"{module} through {sorted(ours)}"
    assert "torch" in reachable("coserve.runtime.cache", sources)[1], "the search finds torch where it is"
    assert "coserve.core" in reachable("coserve.scheduler.blocks", sources)[0]


def test_cluster_is_pure_policy() -> None:
    """No sockets, files, threads, clocks or tensors."""
    sources = project()
    modules = [module for module in sources if module.startswith("coserve.cluster")]
    assert "coserve.cluster.router" in modules
    allowed = {
        "coserve", "__future__", "bisect", "collections", "dataclasses", "datetime", "enum", "functools", "hashlib", "heapq",
        "itertools", "math", "msgspec", "numpy", "operator", "random", "re", "typing",
    }
    for module in modules:
        ours, others = reachable(module, sources)
        assert others <= allowed, f"{module} needs {sorted(others - allowed)} through {sorted(ours)}"


def test_package_imports_without_optional_dependencies() -> None:
    """Everything up to the engine runs with torch, transformers, tokenizers, safetensors and numpy; nothing is lazy by luck:
    after the import, no module of the project is missing that the public names need."""
    program = (
        f"import sys\nfor name in {BLOCKED!r}: sys.modules[name] = None\n"
        "import coserve\nfor name in coserve.__all__: getattr(coserve, name)\n"
        "loaded = {m.split('.')[1] for m in sys.modules if m.startswith('coserve.')}\n"
        "print(*sorted(loaded))"
    )
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"compiler", "engine", "runtime"} <= loaded
    assert not loaded & {"cli", "plots", "demo", "server"}, "the public face imports upwards"
