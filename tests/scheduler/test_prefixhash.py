"""Hashes of an engine's prefixes are those that an ingress computes of prompts, and say what is cached."""

from __future__ import annotations

from random import Random

from coserve.scheduler.blocks import BlockPool
from coserve.scheduler.prefix import PrefixKey
from coserve.scheduler.prefixhash import MOST_BLOCKS, MOST_HASHES, PrefixHashes, is_told, prompt_hashes

BLOCK = 4


def compute(pool: BlockPool, owner: object, tokens: list[int], key: PrefixKey) -> None:
    pool.acquire(owner, key, tokens)
    pool.allocate(owner, len(tokens))
    pool.seal(owner, key, tokens, len(tokens))
    pool.free(owner)


def known(hashes: PrefixHashes, key: PrefixKey, tokens: list[int]) -> int:
    """Blocks of a prompt that a router finds in what is told."""
    told = set(hashes.collect())
    own = prompt_hashes(key.salt, key.adapter, tokens, BLOCK)
    return max((depth + 1 for depth, value in enumerate(own) if value in told), default=0)


def test_what_is_told_is_what_a_prompt_hashes_to() -> None:
    pool = BlockPool(100, BLOCK)
    before, tokens = list(range(50_000, 50_010)), list(range(41))
    key = PrefixKey("tenant", "a", 3)
    compute(pool, "early", before, key)
    hashes = pool.watch_prefixes()
    assert known(hashes, key, before) == 2, "those that were there before"
    compute(pool, 1, tokens, key)
    assert known(hashes, key, tokens) == 10 and known(hashes, key, tokens[:21]) == 5
    for salt, adapter in (("tenant", "b"), ("tenant", None), ("tenan", "ta"), ("", "a")):
        assert known(hashes, PrefixKey(salt, adapter, 3), tokens) == 0
    assert known(hashes, key._replace(version=4), tokens) == 10, "a name stands for its versions"
    pool.forget("a", 3)
    assert hashes.collect() == []


def test_evicted_prefixes_are_told_no_more() -> None:
    pool, key = BlockPool(8, BLOCK), PrefixKey("", None, 0)
    hashes = pool.watch_prefixes()
    compute(pool, 1, list(range(17)), key)
    assert len(hashes.collect()) == 4
    compute(pool, 2, list(range(100, 125)), key)  # 7 of 8 blocks
    pool.check_integrity()
    assert known(hashes, key, list(range(100, 125))) == 6
    assert known(hashes, key, list(range(17))) == 1


def test_of_a_long_prefix_most_is_known() -> None:
    assert [depth for depth in range(1, 41) if is_told(depth)] == [*range(1, 8), 8, 10, 12, 14, 16, 20, 24, 28, 32, 40]
    for depth in range(1, 600, 7):
        told = max(shorter for shorter in range(1, depth + 1) if is_told(shorter))
        assert told > 0.79 * depth
    pool, key = BlockPool(700, BLOCK), PrefixKey("", None, 0)
    hashes = pool.watch_prefixes()
    tokens = list(range(2400))
    compute(pool, 1, tokens, key)
    assert len(hashes.collect()) < 40 and known(hashes, key, tokens) == 512
    assert len(prompt_hashes("", None, list(range(20_000)), BLOCK)) == MOST_BLOCKS


def test_what_was_used_last_is_kept() -> None:
    random, pool, key = Random(0), BlockPool(20_000, BLOCK), PrefixKey("", None, 0)
    hashes = pool.watch_prefixes()
    common = [random.randrange(1000) for _ in range(5 * BLOCK)]
    for number in range(3 * MOST_HASHES):
        compute(pool, number, [*common, number, number, number, number, 0], key)
        if number % 100 == 0:
            hashes.collect()
    told = hashes.collect()
    assert len(told) == MOST_HASHES and known(hashes, key, [*common, 1, 2, 3, 4, 0]) == 5
    assert known(hashes, key, [*common, *[3 * MOST_HASHES - 1] * 4, 0]) == 6 and known(hashes, key, [*common, *[5] * 4, 0]) == 5
