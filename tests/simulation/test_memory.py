"""The account of a device's memory, and the plan that a job gets for what is left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coserve.bench.workload import endless_job
from coserve.config.settings import EngineConfig, FinetuneConfig, LoraConfig, SchedulerConfig
from coserve.core import CapacityError, ConfigError
from coserve.devices.law import device_law
from coserve.devices.table import find_device
from coserve.model.architecture import Architecture
from coserve.simulation.memory import DeviceMemory, PlannedBatch, device_memory, plan_batch
from tests.devices.models import read_model

WEIGHTS_8B = 8_030_261_248
"""Parameters of Llama-3.1-8B."""


def job(max_microbatch_tokens: int = 8192) -> FinetuneConfig:
    return endless_job(8, max_microbatch_tokens).with_adapter(LoraConfig(target_modules=("down_proj",)))


def memory_of(arch: Architecture, gigabytes: float = 80.0, size: int = 1) -> DeviceMemory:
    return device_memory(
        arch, job(), EngineConfig(), memory_bytes=gigabytes * 1e9, usable_share=0.9, itemsize=2, tensor_parallel_size=size
    )


def planned_batch(
    arch: Architecture, config: FinetuneConfig, example_tokens: list[int], memory: DeviceMemory, **limits: Any
) -> PlannedBatch:
    """The batch on an H100 with an objective of 15 ms per token, where rows had best ride."""
    law, scheduler = device_law(arch, find_device("h100")), SchedulerConfig(tpot_ms=15.0, ttft_ms=5000.0, **limits)
    return plan_batch(arch, config, example_tokens, memory, law, scheduler, itemsize=2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return read_model("llama-8b", tmp_path_factory.mktemp("llama"))


def test_the_pool_is_what_is_left_of_the_usable_memory(llama: Architecture) -> None:
    memory = memory_of(llama)
    assert memory.fixed["weights"] == 2 * WEIGHTS_8B
    assert memory.fixed["adapter and optimizer"] > 14 * 32 * 16 * (4096 + 14336)
    assert memory.pool_bytes + sum(memory.fixed.values()) == 72_000_000_000
    assert memory.block_bytes == 16 * 32 * 2 * 8 * 128 * 2
    assert memory.num_blocks == memory.pool_bytes // memory.block_bytes
    pool = memory.make_pool()
    assert pool.num_blocks - memory.guaranteed_blocks == memory.job_bytes // memory.block_bytes
    assert memory.guaranteed_blocks == pytest.approx(0.4 * pool.num_blocks, abs=1) and pool.caching


def test_devices_share_weights_keys_and_values(llama: Architecture) -> None:
    one, two = memory_of(llama), memory_of(llama, size=2)
    assert two.fixed["weights"] == one.fixed["weights"] // 2 and two.fixed["workspace"] == one.fixed["workspace"]
    assert two.num_blocks == 2 * two.pool_bytes // two.block_bytes > 2 * one.num_blocks


def test_a_model_that_does_not_fit_is_told_what_it_needs(tmp_path: Path) -> None:
    qwen = read_model("qwen-32b", tmp_path)
    with pytest.raises(CapacityError, match=r"device: the model needs \d+\.\d\d GiB \(weights 61\.03, .* on each of 1, and "
                                            r"44\.71 GiB of each may be used \(0\.9 of 53 GB\); raise tensor_parallel_size"):
        memory_of(qwen, 53.34)
    assert memory_of(qwen, 53.34, 2).num_blocks > 0


def test_a_job_packs_its_examples_and_runs_nothing_again_where_memory_allows(llama: Architecture) -> None:
    memory = memory_of(llama)
    planned = planned_batch(llama, job(), [8192, 4000, 4000, 500], memory)
    assert planned.batch.microbatches == [[8192], [4000, 4000], [500]]
    assert planned.batch.recompute_fraction == 0 and planned.batch.elements == 32 * 16 * (4096 + 14336)
    assert planned.batch.arena_blocks[0] == -(-planned.plan.num_bytes // memory.block_bytes) > planned.batch.arena_blocks[1]


def test_where_memory_is_short_backward_runs_a_share_of_forward_again(llama: Architecture) -> None:
    memory = memory_of(llama, 40.0)
    planned = planned_batch(llama, job(), [8192] * 8, memory)
    assert 0 < planned.batch.recompute_fraction < 1
    assert planned.plan.num_bytes <= max(planned.batch.arena_blocks) * memory.block_bytes <= memory.job_bytes
    least = planned_batch(llama, replace(job(), activation_memory=0.5), [8192], memory_of(llama))
    assert least.batch.recompute_fraction > 0


def test_a_batch_that_does_not_fit_is_refused(llama: Architecture) -> None:
    with pytest.raises(CapacityError, match=r"max_microbatch_tokens: .* at least .* GiB of the pool; lower "
                                            "max_microbatch_tokens, or choose more devices"):
        planned_batch(llama, job(200_000), [200_000], memory_of(llama))
    with pytest.raises(ConfigError, match="max_microbatch_tokens: 8192 is less than an example's 9000 tokens"):
        planned_batch(llama, job(), [9000], memory_of(llama))
