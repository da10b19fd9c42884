"""What calls for CUDA's attention over many sequences: training windows of packed examples, and prompts of a batch.

The library's operators are played on the CPU (tests/played_flash.py); all that surrounds them is the product's own. The
strictest tests of the CPU's path are run again on this one.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from coserve.config.settings import LoraConfig
from coserve.kernels.cuda_attention import KeyedRows
from coserve.runtime import sequences
from coserve.runtime.sequences import packed_calls
from coserve.runtime.spans import NO_ADAPTER, RowSpan, SpanRows
from coserve.runtime.transfer import to_device_together
from tests.cuda_iterations import FakeJob, fake_device, fake_model, run_pass, spans
from tests.fake_cuda import fake_cuda, needs_fake_cuda
from tests.numerics.test_fused_gradients import Mix, check, fixed_mix, mixes
from tests.played_flash import play_flash
from tests.runtime.test_cache import CPU, F64, Texts, make_arch, make_pool, make_slots

FLASH = ("_flash_attention_forward_no_dropout_inplace", "_flash_attention_forward")


def play_gather(
    keys_SD: Tensor, values_SD: Tensor, cache_rows: Tensor, *, layer: int, num_layers: int, kv_heads: int, block_tokens: int,
    tables_BN: Tensor, firsts_B: Tensor, ends: Tensor, max_tokens: int,
) -> None:
    """Triton's gather, token by token."""
    cache = cache_rows.view(-1, num_layers, 2, kv_heads, block_tokens, cache_rows.shape[1] // block_tokens)[:, layer]
    assert ends[0] == 0 and max_tokens == int(ends.diff().max()) and int(ends[-1]) <= len(keys_SD)
    for table, first, begin, end in zip(tables_BN, firsts_B.tolist(), ends.tolist(), ends.tolist()[1:], strict=False):
        for row in range(begin, end):
            block, offset = divmod(first + row - begin, block_tokens)
            keys_SD[row], values_SD[row] = (cache[table[block], kv, :, offset].flatten() for kv in range(2))


@pytest.fixture(params=["library", "kernel"])
def flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls by name. Contexts are gathered by library calls, or by the kernel."""
    if request.param == "kernel":
        monkeypatch.setattr(sequences, "runs_triton", lambda device: True)
        monkeypatch.setattr(sequences, "gather_context", play_gather)
    return play_flash(monkeypatch)


# --- both together ---


@pytest.mark.parametrize(("family", "sliding_window", "poison"), [
    ("llama", None, None), ("qwen3", 6, None), ("mistral", 7, "job"), ("smollm3", 6, "request"),
])
def test_training_beside_requests_equals_the_oracle(
    flash: Counter[str], family: str, sliding_window: int | None, poison: str | None
) -> None:
    check(fixed_mix(family, sliding_window, poison=poison))
    assert flash["forward"] > 0 and flash["backward"] > 0


@pytest.mark.full
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(mix=mixes())
def test_random_training_beside_requests_equals_the_oracle(flash: Counter[str], mix: Mix) -> None:
    check(mix)


# --- prompts ---


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    contexts=st.lists(st.sampled_from([1, 2, 3, 5, 8, 13, 40]), min_size=1, max_size=5), block_tokens=st.integers(1, 5),
    order=st.randoms(use_true_random=False), window=st.sampled_from([None, 1, 4, 9]), other=st.sampled_from([None, 3]),
    seed=st.integers(0, 10**6), most=st.sampled_from([1, 2000, 1 << 20]),
)
def test_prompts_in_chunks(
    flash: Counter[str], contexts: list[int], block_tokens: int, order: Any, window: int | None, other: int | None, seed: int,
    most: int,
) -> None:
    """Side by side, in scattered blocks full of NaN, gathered all at once or in parts."""
    tables, blocks = [], list(range(sum(-(-context // block_tokens) for context in contexts)))
    order.shuffle(blocks)
    for context in contexts:
        tables.append([blocks.pop() for _ in range(-(-context // block_tokens))])
    pool, arch = make_pool(sum(map(len, tables)), block_tokens), make_arch((other, window))
    texts = Texts(contexts, tables, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "GATHERED_BYTES", most)
        while any(done < context for done, context in zip(texts.done, contexts, strict=True)):
            open_ = [i for i, context in enumerate(contexts) if texts.done[i] < context]
            chosen = order.sample(open_, order.randint(1, len(open_)))
            texts.run(pool, arch, [], {i: order.randint(1, contexts[i] - texts.done[i]) for i in chosen})
    texts.compare(window)


@pytest.mark.parametrize(("starts", "most", "calls"), [
    ([0, 0, 0, 0], 1 << 20, 1), ([0, 3, 0, 5], 1 << 20, 1), ([0, 3, 0, 5], 1, 4), ([9, 9, 9, 9], 3000, 2),
])
def test_prompts_take_one_call_unless_their_contexts_are_long(
    flash: Counter[str], starts: list[int], most: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequences, "GATHERED_BYTES", most)
    pool = make_pool(12, 4)
    pool.buffer.zero_()
    prompts = [RowSpan(start, start + 2, [3 * i, 3 * i + 1, 3 * i + 2], NO_ADAPTER) for i, start in enumerate(starts)]
    rows = SpanRows([], prompts, pool, make_arch(), make_slots())
    q, k = torch.ones(8, 16, dtype=F64), torch.ones(8, 8, dtype=F64)
    rows.attention(torch.empty_like(q), q, k, k)
    assert flash["forward"] == calls


# --- windows ---


def test_keys_that_no_windows_query_sees_are_left_out() -> None:
    parts = [KeyedRows(5, 40, 50), KeyedRows(50, 50, 51), KeyedRows(51, 51, 60)]
    calls = packed_calls(dict.fromkeys((None, 8, 1000), parts), CPU)
    assert [call.keys for call in calls.values()] == [slice(5, 60), slice(33, 60), slice(5, 60)]
    assert [call.ends_k.tolist() for call in calls.values()] == [[0, 45, 46, 55], [0, 17, 18, 27], [0, 45, 46, 55]]
    assert {tuple(call.ends_q.tolist()) for call in calls.values()} == {(0, 10, 11, 20)}
    assert [(call.max_q, call.max_k) for call in calls.values()] == [(10, 45), (10, 17), (10, 45)]


def test_tables_go_together_and_stay_aligned() -> None:
    parts = to_device_together([[1, 2, 3], np.arange(40).reshape(2, 20), [7]], CPU)
    assert [part.tolist() for part in parts] == [[1, 2, 3], np.arange(40).reshape(2, 20).tolist(), [7]]
    assert all(part.dtype == torch.int32 and (part.data_ptr() - parts[0].data_ptr()) % 64 == 0 for part in parts)
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


# --- launches ---


@needs_fake_cuda
def test_a_window_has_one_call_per_layer_whatever_is_packed() -> None:
    with fake_cuda() as device:
        job = FakeJob(fake_device(fake_model("Llama-3.1-8B")), LoraConfig(r=8), lengths=(300, 200, 1, 23, 500))
        with device.counting() as found:
            job.sweep(512)
    windows = 2
    assert sum(found[name] for name in FLASH) == windows * job.layers
    assert found["_flash_attention_backward"] == 3 * windows * job.layers  # an operator of 3 launches
    assert found["arange"] <= 1, "the rotary table's, once; a call's tables are copied"


@needs_fake_cuda
@pytest.mark.parametrize("prompts", [[(0, 300)] * 5, [(0, 300), (700, 800), (16, 17)]])
def test_prompts_have_one_call_per_layer(prompts: list[tuple[int, int]]) -> None:
    with fake_cuda() as device:
        engine = fake_device(fake_model("Llama-3.1-8B"))
        run_pass(engine, *spans(8, prompts))
        with device.counting() as found:
            run_pass(engine, *spans(8, prompts))
    gathers = any(start for start, _ in prompts)
    assert sum(found[name] for name in FLASH) == 2
    assert found["_gather_kernel"] == 2 * gathers
