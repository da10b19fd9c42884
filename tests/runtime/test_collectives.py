"""Collectives of real processes and of the tests' threads against their definitions, and what they count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from coserve.ops.run import RUNNERS, RowContext
from coserve.ops.table import COLLECTIVES, State
from coserve.parallel import ALONE, Ranks
from tests.compiler.interpreter import collective
from tests.loopback import on_ranks
from tests.rank_process import on_processes

ROWS, WIDTH = 3, 8


def drawn(rank: int, op: str, size: int) -> Tensor:
    """A rank's input: the same everywhere if the operator reads a whole value."""
    (way,) = COLLECTIVES[op].ways
    state = way.inputs[0]
    width = WIDTH // size if state is State.SPLIT else WIDTH
    seed = 0 if state in (State.WHOLE, State.ENTERED) else 1 + rank
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run_all(ranks: Ranks) -> dict[str, tuple[Tensor, int]]:
    """Every collective on columns of wider tensors, as programs have them: its output, and what was sent."""
    rows = RowContext()
    rows.ranks = ranks
    found = {}
    for op, row in COLLECTIVES.items():
        x = drawn(ranks.rank, op, ranks.size)
        wide = torch.cat((torch.ones(ROWS, 1, dtype=x.dtype), x, torch.ones(ROWS, 1, dtype=x.dtype)), dim=1)
        width = WIDTH // ranks.size if row.ways[0].outputs[0] is State.SPLIT else WIDTH
        out = torch.full((ROWS, width + 2), 7.0, dtype=x.dtype)
        before = ranks.sent_bytes
        RUNNERS[op](rows, None, {}, False, [out[:, 1:-1]], [wide[:, 1:-1]])
        assert bool((out[:, 0] == 7).all() and (out[:, -1] == 7).all()), f"{op} writes beside its columns"
        found[op] = out[:, 1:-1].clone(), ranks.sent_bytes - before
    return found


def check(results: list[dict[str, tuple[Tensor, int]]]) -> None:
    size = len(results)
    for op, row in COLLECTIVES.items():
        wanted = collective(op, [drawn(rank, op, size) for rank in range(size)])
        for (found, sent), want in zip((result[op] for result in results), wanted, strict=True):
            assert torch.allclose(found, want, rtol=1e-14, atol=1e-14), op
            assert sent == row.moves * (size - 1) * ROWS * WIDTH * 8 // size, op


@pytest.mark.parametrize("size", [2, 4])
def test_collectives_of_threads(size: int) -> None:
    check(on_ranks(size, run_all))


@pytest.mark.full
def test_collectives_of_processes(tmp_path: Path) -> None:
    check(on_processes(2, run_all, tmp_path))


def test_one_rank_has_the_whole() -> None:
    for op, (found, sent) in run_all(ALONE).items():
        assert torch.equal(found, drawn(0, op, 1)), op
        assert sent == 0


def test_a_sum_that_spread_adds_to() -> None:
    """`accumulate`: a rank's features are added to what is there."""

    def work(ranks: Ranks) -> Tensor:
        rows = RowContext()
        rows.ranks = ranks
        out = torch.ones(ROWS, WIDTH)
        RUNNERS["spread"](rows, None, {}, True, [out], [torch.full((ROWS, WIDTH // ranks.size), 2.0)])
        return out

    first, second = on_ranks(2, work)
    assert first.sum(0).tolist() == [9.0] * 4 + [3.0] * 4
    assert second.sum(0).tolist() == [3.0] * 4 + [9.0] * 4
