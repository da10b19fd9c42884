"""Names that a reader could take for another."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

SRC = Path(__file__).resolve().parents[2] / "src"


def test_no_two_modules_define_a_public_class_of_one_name() -> None:
    homes = defaultdict(list)
    for path in sorted(SRC.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(path.relative_to(SRC).as_posix())
    assert len(homes) > 300, "the walk found the classes"
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}
