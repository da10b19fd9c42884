"""What an iteration costs the host, counted in calls: a regression shows without a clock. Device and kernels are played."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from types import FrameType

import pytest
from engine_overhead import Load, PlayedEngine, engine_of

from coserve.kernels import triton as triton_kernels
from coserve.text.tokenizer import ChatTokenizer
from tests.tiny_tokenizer import build_tiny_tokenizer

pytestmark = pytest.mark.skipif(not triton_kernels.available(), reason="what CUDA's branches launch needs Triton")
LAYERS, STEPS = 2, 9
MOST_CALLS = 70
"""Calls of functions, Python's and C's, that one more request may cost an iteration: 60 when this was written, and 142 before
anybody had counted."""
MOST_FIRST = 30
"""Of these before the first launch: 25 when this was written, and 82 before."""
TABLES = 40
"""Blocks of a longer context, which must not cost calls."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    build_tiny_tokenizer(directory)
    return ChatTokenizer.load(directory)


class Calls:
    """Counts calls of a played engine's steps. first: of those before the first launch."""

    def __init__(self, played: PlayedEngine) -> None:
        self.played, self.total, self.first = played, 0, 0

    def _on_event(self, frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            self.total += 1
            self.first += "rows" not in self.played.timeline.ends

    def step(self) -> tuple[int, int]:
        """All calls of one step, and those before the first launch."""
        self.total = self.first = 0
        sys.setprofile(self._on_event)
        try:
            self.played.step()
        finally:
            sys.setprofile(None)
        return self.total, self.first


def calls(tokenizer: ChatTokenizer, load: Load) -> tuple[float, float]:
    """Medians over some decode steps: all calls, and those before the first launch."""
    with engine_of(tokenizer, load, most_tokens=64, layers=LAYERS) as played:
        counted = Calls(played)
        steps = [counted.step() for _ in range(STEPS)]
    total, first = zip(*steps, strict=True)
    return median(total), median(first)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_a_request_more_costs_few_calls(tokenizer: ChatTokenizer, graphs: bool) -> None:
    few, many = 32, 128
    less, more = (
        calls(tokenizer, Load(count, 0 if graphs else 8, job=False, graphs=graphs, prompt=24)) for count in (few, many)
    )
    each, first = ((b - a) / (many - few) for a, b in zip(less, more, strict=True))
    print(f"calls per request: {each:.1f}, {first:.1f} before the first launch")
    assert each <= MOST_CALLS and first <= MOST_FIRST


def test_a_longer_context_costs_no_calls(tokenizer: ChatTokenizer) -> None:
    (short, _), (long, _) = (calls(tokenizer, Load(16, 4, job=False, prompt=prompt)) for prompt in (24, 24 + 16 * TABLES))
    assert abs(long - short) <= TABLES
