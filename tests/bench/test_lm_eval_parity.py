"""What bench/lm_eval_parity.py counts as a difference; lm-eval itself is not needed for that."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch) -> Any:
    tasks: Any = ModuleType("lm_eval.tasks")
    tasks.TaskManager = object
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("lm_eval_parity")


def said(*documents: Any) -> dict[str, Any]:
    return {"samples": {"task": list(documents)}}


def test_the_largest_distance_and_the_documents_that_differ(parity: Any) -> None:
    ours = said([(-1.0, True), (-2.5, False)], ["a text"])
    assert parity.compare("task", ours, ours) == (0, 0)
    assert parity.compare("task", ours, said([(-1.0, True), (-2.0, False)], ["a text"])) == (0.5, 0)
    assert parity.compare("task", ours, said([(-1.0, False), (-2.5, True)], ["another"])) == (0, 2)


@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_number_is_infinitely_far(parity: Any, place: int) -> None:
    values = [-1.0, -2.0]
    values[place] = math.nan
    assert parity.compare("task", said(values), said([-1.0, -2.0])) == (math.inf, 0)
