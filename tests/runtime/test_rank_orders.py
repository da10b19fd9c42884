"""Orders: what rank 0 tells the processes that share a model. They are real, and call the functions of tests/rank_orders.py."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from coserve.core import InvalidRequest, RankFailed
from coserve.runtime.ranks import RankProcesses
from tests import rank_orders as orders


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[RankProcesses]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=":")
    with RankProcesses(2, torch.device("cpu")) as processes:
        yield processes


def test_orders_reach_all_ranks_with_their_own_objects(ranks: RankProcesses) -> None:
    box = ranks.call(orders.make, ranks.ranks, keeps=True)
    other = ranks.call(orders.make, ranks.ranks, keeps=True)
    other.value = 5.0
    assert ranks.call(orders.total, ranks.ranks, box, 2.0) == 22, "1 here, 10 there"
    assert ranks.call(orders.total, ranks.ranks, other, 1.0) == 15
    with ranks.told(orders.total, ranks.ranks, box, 3.0):  # this rank does the same by another order, which isn't sent
        assert ranks.call(orders.total, ranks.ranks, box, 3.0) == 33
    assert ranks.call(orders.count, ranks.ranks) == 4
    del box
    gc.collect()
    assert ranks.call(orders.count, ranks.ranks) == 2, "what is gone here is gone there"
    # an error that all have is the caller's, and nothing ends
    with pytest.raises(InvalidRequest):
        ranks.call(orders.refuse_on, ranks.ranks, (0, 1))
    assert ranks.call(orders.total, ranks.ranks, other, 1.0) == 15


@pytest.mark.full
@pytest.mark.parametrize(("function", "who", "words"), [
    (orders.refuse_on, (1,), "rank 1 ended with code 1: .*InvalidRequest: refused"),
    (orders.fail_on, 1, "rank 1 ended with code 1: ZeroDivisionError: a bug"),
    (orders.fail_on, 0, "rank 0 failed: ZeroDivisionError"),
])
def test_what_one_rank_alone_raises_ends_the_group(ranks: RankProcesses, function: object, who: object, words: str) -> None:
    def two_orders() -> None:  # at the latest the second notices
        ranks.call(function, ranks.ranks, who)  # type: ignore[arg-type]
        ranks.call(orders.count, ranks.ranks)

    with pytest.raises(RankFailed, match=words):
        two_orders()
    with pytest.raises(RankFailed, match=words):
        ranks.call(orders.count, ranks.ranks)


@pytest.mark.full
def test_an_interrupted_order_is_the_last(ranks: RankProcesses) -> None:
    with pytest.raises(KeyboardInterrupt), ranks.told(orders.count, ranks.ranks):
        raise KeyboardInterrupt
    with pytest.raises(RankFailed, match="rank 0 was interrupted in an order"):
        ranks.call(orders.count, ranks.ranks)


@pytest.mark.full
def test_a_closed_group_takes_no_orders(ranks: RankProcesses) -> None:
    ranks.close()
    with pytest.raises(RankFailed, match="the model is closed"):
        ranks.call(orders.count, ranks.ranks)
