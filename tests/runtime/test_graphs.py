"""Decode through tables and by captured passes, played on the CPU: the paged kernel by the reference, a capture by its body.

What a capture fixes is fixed here too: its inputs are the only thing that changes between two replays.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coserve.kernels import choose, reference
from coserve.runtime import fused, graphs, spans
from coserve.runtime.adapters import AdapterSlots
from coserve.runtime.cache import KeyValuePool
from coserve.runtime.executor import Executor, TrainExecutor
from coserve.runtime.fused import PassExecutor
from coserve.runtime.loaded import LoadedModel, load_model
from coserve.runtime.spans import NO_ADAPTER, RowSpan
from tests.tiny_directory import build_tiny_directory

CPU = torch.device("cpu")
BLOCK, NUM_BLOCKS = 4, 60


@pytest.fixture(scope="module", params=["llama", "mistral"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_directory(tmp_path_factory.mktemp("model") / "m", request.param)


def play_paged(
    out: Tensor, q: Tensor, cache_rows: Tensor, *, layer: int, num_layers: int, kv_heads: int, block_tokens: int,
    tables_BN: Tensor, context_B: Tensor, max_context: int, window: int | None, scale: float,
) -> None:
    """The kernel's contract by the reference."""
    assert tables_BN.dtype == context_B.dtype == torch.int32 and int(context_B.max()) <= max_context
    width = cache_rows.shape[1] // block_tokens
    cache = cache_rows.view(-1, num_layers, 2, kv_heads, block_tokens, width)
    assert scale == pytest.approx(width**-0.5)
    for row, (table, context) in enumerate(zip(tables_BN, context_B.tolist(), strict=True)):
        if context == 0:
            out[row] = 0
            continue
        keys, values = cache[table.long(), layer].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :context]
        out[row] = reference.attention(q[row].view(1, -1, width), keys, values, window=window)[0].flatten()


def make_passes(model: LoadedModel, *, graph_rows: int = 0) -> PassExecutor:
    """graph_rows: the largest batch that is captured."""
    pool = KeyValuePool(model.architecture, NUM_BLOCKS, BLOCK, torch.float32, CPU)
    pool.rows.zero_()
    pool.scratch = NUM_BLOCKS - 1
    slots = AdapterSlots(model.architecture, torch.float32, CPU, max_slots=2, max_rank=8)
    executor = Executor(model.weights)
    passes = PassExecutor(executor, TrainExecutor(executor), pool, slots, max_graph_rows=graph_rows)
    while passes.capture_next():
        pass
    return passes


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """The captured bodies, in order of capture."""
    captured: list[Callable[[], None]] = []

    def record(body: Callable[[], None], device: torch.device, memory: Any) -> Callable[[], None]:
        body()
        captured.append(body)
        return body

    monkeypatch.setattr(spans, "runs_triton", lambda device: True)
    monkeypatch.setattr(spans, "paged_decode_attention", play_paged)
    monkeypatch.setattr(spans.native, "paged_attention_for", lambda rows, block_tokens: None)
    monkeypatch.setattr(fused, "runs_triton", lambda device: True)
    monkeypatch.setattr(graphs, "record", record)
    return captured


LENGTHS = (1, 3, 4, 9, 21)
TABLES = [[5, 6], [7, 1], [2, 3], [10, 4, 9, 12], [20, 30, 25, 11, 8, 40, 41]]


@torch.no_grad()
def decode(passes: PassExecutor, requests: Sequence[int], steps: int = 4) -> Tensor:
    """Hidden rows of prefilling some of the requests, then of `steps` tokens of each."""
    rng = random.Random(3)
    tokens = {number: [rng.randrange(90) for _ in range(LENGTHS[number] + steps)] for number in range(len(LENGTHS))}
    prefill = [RowSpan(0, LENGTHS[n], TABLES[n], NO_ADAPTER) for n in requests]
    ids = torch.tensor([token for n in requests for token in tokens[n][: LENGTHS[n]]])
    parts = [passes.run(ids, [], prefill, None).clone()]
    for step in range(steps):
        ends = [LENGTHS[n] + step for n in requests]
        ids = torch.tensor([tokens[n][end] for n, end in zip(requests, ends, strict=True)])
        rows = [RowSpan(end, end + 1, TABLES[n], NO_ADAPTER) for n, end in zip(requests, ends, strict=True)]
        parts.append(passes.run(ids, rows, [], None).clone())
    return torch.cat(parts)


@pytest.mark.parametrize("requests", [[4], [0, 1, 2], [0, 1, 2, 3, 4]])
def test_paged_and_captured_decode_equal_the_gathered_one(
    directory: Path, requests: list[int], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    model = load_model(str(directory), device="cpu", dtype="float32")
    want = decode(make_passes(model), requests)
    bodies = request.getfixturevalue("played")
    torch.testing.assert_close(decode(make_passes(model), requests), want, rtol=1e-4, atol=1e-5)
    assert not bodies, "without graphs nothing is captured"
    passes = make_passes(model, graph_rows=8)
    torch.testing.assert_close(decode(passes, requests), want, rtol=1e-4, atol=1e-5)
    assert len(bodies) == 4, "1, 2, 4 and 8 rows, and nothing more while it serves"


def test_padding_touches_only_the_scratch_block(directory: Path, played: list[Callable[[], None]]) -> None:
    passes = make_passes(load_model(str(directory), device="cpu", dtype="float32"), graph_rows=8)
    decode(passes, [0, 1, 2])
    used = {block for number in (0, 1, 2) for block in TABLES[number]} | {NUM_BLOCKS - 1}
    blocks = passes.pool.buffer.view(torch.float32).view(NUM_BLOCKS, -1)
    assert {int(number) for number in blocks.abs().sum(1).nonzero()} == used


def test_memory_that_grows_elsewhere_is_not_the_graphs(directory: Path, played: list[Callable[[], None]]) -> None:
    model = load_model(str(directory), device="cpu", dtype="float32")
    passes = make_passes(model, graph_rows=8)
    first = decode(passes, [1, 3])
    passes.executor.workspace.reserve(64 << 20).fill_(255)
    passes.executor.rotary.reserve(4096)
    torch.testing.assert_close(decode(passes, [1, 3]), first)
    assert len(played) == 4


def test_a_batch_without_a_captured_size_runs_eagerly(directory: Path, played: list[Callable[[], None]]) -> None:
    passes = make_passes(load_model(str(directory), device="cpu", dtype="float32"), graph_rows=2)
    captured = passes._graphs
    assert captured is not None and len(captured) == 2
    ids = torch.zeros(3, dtype=torch.int64)
    row = RowSpan(0, 1, [0], NO_ADAPTER)
    assert captured.run(ids, [row] * 3) is None
    assert captured.run(ids[:0], []) is None
    assert captured.run(ids[:1], [row._replace(slot=1)]) is None, "no pass with adapters is captured"
    assert captured.run(ids[:2], [row] * 2) is not None


@pytest.mark.parametrize(("longest", "context"), [(1, 1024), (1024, 1024), (1025, 4096), (70000, 262144)])
def test_contexts_are_few(longest: int, context: int) -> None:
    assert graphs.padded_context(longest) == context


def test_a_failed_capture_leaves_eager_passes(
    directory: Path, played: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(directory), device="cpu", dtype="float32")
    want = decode(make_passes(model), [3, 4])

    def fail(*_: object) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "record", fail)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.testing.assert_close(decode(make_passes(model, graph_rows=8), [3, 4]), want)
    assert sum("without CUDA graphs" in str(warning.message) for warning in seen) == 1, "it is tried once"


def test_the_choice_is_the_devices() -> None:
    assert not choose.packs_attention(CPU)
    assert choose.packs_attention(torch.device("cuda"))
    assert not choose.runs_triton(CPU)
