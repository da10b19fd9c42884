"""The engine's tokens equal transformers' generate and its log-probabilities their log-softmax, whatever goes on beside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from coserve.config.settings import FinetuneConfig, LoraConfig, OptimizerConfig, SamplingConfig, SchedulerConfig
from coserve.engine.engine import Engine
from coserve.engine.requests import RequestHandle
from coserve.runtime.loaded import LoadedModel
from tests import oracle
from tests.tiny_directory import chat_lines, write_lines
from tests.tiny_engine import MakeEngine, PlanLog, drive, prompt, random_adapter

GREEDY = SamplingConfig(max_tokens=24, temperature=0, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.9, top_p=0.95, seed=7)
PROMPTS = [prompt(n) for n in (1, 5, 16, 17, 33, 64, 90, 31)]
TINY_POOL = {"num_blocks": 14, "share": 1.0}
"""Room for three or four of the prompts with their outputs."""


@pytest.fixture(scope="module")
def reference(model: LoadedModel) -> PreTrainedModel:
    return oracle.load_oracle(model.directory, torch.float32)


@pytest.fixture(scope="module")
def expected(reference: PreTrainedModel) -> list[list[int]]:
    return [greedy(reference, ids) for ids in PROMPTS]


def greedy(reference: torch.nn.Module, ids: list[int], count: int = 24) -> list[int]:
    output = reference.generate(
        input_ids=torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return output[0, len(ids) :].tolist()


def logprobs(reference: torch.nn.Module, ids: list[int]) -> Tensor:
    """[T, vocabulary]"""
    with torch.no_grad():
        return torch.log_softmax(reference(input_ids=torch.tensor([ids])).logits[0].double(), -1)


def arriving(engine: Engine, sampling: SamplingConfig, seed: int = 3) -> list[RequestHandle]:
    """The prompts, each after a random number of iterations."""
    rng, handles = Random(seed), []
    for ids in PROMPTS:
        handles.append(engine.submit(ids, sampling))
        for _ in range(rng.randrange(4)):
            engine.step()
    drive(engine, lambda: all(handle.finished for handle in handles))
    return handles


def tokens(handles: list[RequestHandle]) -> list[list[int]]:
    return [handle.token_ids for handle in handles]


def test_greedy_tokens_alone_and_together(engines: MakeEngine, expected: list[list[int]]) -> None:
    engine = engines()
    assert [engine.generate([ids], GREEDY)[0].token_ids for ids in PROMPTS] == expected
    assert tokens(engines().generate(PROMPTS, GREEDY)) == expected


@pytest.mark.parametrize("scheduler", [
    SchedulerConfig(), SchedulerConfig(max_num_batched_tokens=16), SchedulerConfig(max_num_seqs=2),
    SchedulerConfig(tpot_ms=1.5, ttft_ms=1), SchedulerConfig(tpot_ms="none", ttft_ms="none"),
], ids=["roomy", "small-chunks", "two-at-once", "hurried", "best-effort"])
def test_greedy_tokens_at_random_arrivals(engines: MakeEngine, expected: list[list[int]], scheduler: SchedulerConfig) -> None:
    assert tokens(arriving(engines(scheduler=scheduler), GREEDY)) == expected


def test_greedy_tokens_after_preemption(engines: MakeEngine, expected: list[list[int]]) -> None:
    engine = engines(**TINY_POOL)
    assert tokens(arriving(engine, GREEDY)) == expected
    assert engine.metrics()["preemptions"] > 0


def test_the_same_prompt_again_hits_the_cache(engines: MakeEngine, expected: list[list[int]]) -> None:
    engine = engines()
    for again in (False, True):
        handles = engine.generate(PROMPTS, GREEDY)
        assert tokens(handles) == expected
        assert [h.cached_tokens for h in handles] == [(len(p) - 1) // 16 * 16 * again for p in PROMPTS]
    assert engine.blocks.stats().hits_tokens == sum((len(p) - 1) // 16 * 16 for p in PROMPTS)


def test_a_shared_prefix_is_computed_once(engines: MakeEngine, reference: PreTrainedModel) -> None:
    engine, common = engines(), prompt(40)
    prompts = [common + prompt(n, seed=5) for n in (3, 20, 9)]
    handles = [engine.generate([ids], GREEDY)[0] for ids in prompts]
    assert tokens(handles) == [greedy(reference, ids) for ids in prompts]
    assert [h.cached_tokens for h in handles] == [0, 32, 32]


def test_tenants_share_no_prefix(engines: MakeEngine) -> None:
    engine, ids = engines(), prompt(50)
    found = [engine.generate([ids], GREEDY, tenant=tenant)[0] for tenant in ("a", "b", "a")]
    assert [handle.cached_tokens for handle in found] == [0, 0, 48]
    assert found[0].token_ids == found[1].token_ids == found[2].token_ids


def test_adapters_of_different_ranks_beside_the_base(
    engines: MakeEngine, model: LoadedModel, reference: PreTrainedModel
) -> None:
    engine = engines()
    adapters = {f"rank {rank}": random_adapter(model, rank, seed=rank) for rank in (2, 8, 12)}
    for name, adapter in adapters.items():
        engine.add_adapter(name, adapter)
    names = [None, *adapters, None, *adapters]
    handles = [engine.submit(ids, GREEDY, adapter=name) for ids, name in zip(PROMPTS, names, strict=True)]
    drive(engine)
    for handle, ids, name in zip(handles, PROMPTS, names, strict=True):
        if name is None:
            assert handle.token_ids == greedy(reference, ids)
            continue
        tuned = oracle.with_adapter(reference, adapters[name])
        want = greedy(tuned, ids)
        tuned.unload()
        assert handle.token_ids == want


def test_a_new_version_uses_nothing_of_the_old_one(
    engines: MakeEngine, model: LoadedModel, reference: PreTrainedModel
) -> None:
    engine, ids = engines(), prompt(50)
    for seed in (1, 2):
        adapter = random_adapter(model, 4, seed=seed)
        engine.add_adapter("tuned", adapter)
        for cached in (0, 48):
            handle = engine.generate([ids], GREEDY, adapter="tuned")[0]
            assert handle.cached_tokens == cached
            tuned = oracle.with_adapter(reference, adapter)
            assert handle.token_ids == greedy(tuned, ids)
            tuned.unload()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_beside_a_job_tokens_are_the_same(
    engines: MakeEngine, expected: list[list[int]], tmp_path: Path, dropout: float
) -> None:
    engine = engines()
    log = PlanLog(engine)
    data = write_lines(tmp_path / "data.jsonl", chat_lines(30))
    config = FinetuneConfig(
        max_steps=400, max_microbatch_tokens=128, lora=LoraConfig(r=4, dropout=dropout), batch_size=8, checkpoint_steps=0,
        optimizer=OptimizerConfig(learning_rate=2e-4),
    )
    job = engine.finetune(data, tmp_path / "out", config)
    handles = arriving(engine, GREEDY)
    assert tokens(handles) == expected
    assert any(plan.fused is not None and plan.decode for plan in log.plans), "a window rode in a pass"
    assert any(plan.decode and plan.units and plan.fused is None for plan in log.plans), "units followed a pass"
    assert job.trained_tokens > 0
    job.cancel()
    drive(engine)


def test_sampled_tokens_depend_on_the_seed_alone(engines: MakeEngine) -> None:
    """Alone, in batches, and after preemption."""
    alone = [engines().generate([ids], SAMPLED)[0].token_ids for ids in PROMPTS]
    assert tokens(arriving(engines(), SAMPLED)) == alone
    tiny = engines(**TINY_POOL)
    assert tokens(arriving(tiny, SAMPLED)) == alone
    assert tiny.metrics()["preemptions"] > 0
    assert tokens(arriving(engines(), replace(SAMPLED, seed=8))) != alone


@pytest.mark.parametrize("options", [{}, {"scheduler": SchedulerConfig(max_num_batched_tokens=16)}, TINY_POOL],
                         ids=["whole", "chunked", "preempted"])
def test_logprobs(engines: MakeEngine, reference: PreTrainedModel, options: dict[str, object]) -> None:
    engine = engines(**options)
    handles = arriving(engine, replace(GREEDY, logprobs=3, prompt_logprobs=2))
    assert (engine.metrics()["preemptions"] > 0) == (options is TINY_POOL)
    for ids, handle in zip(PROMPTS, handles, strict=True):
        every = [*ids, *handle.token_ids]
        wanted = logprobs(reference, every)
        found = [*handle.prompt_logprobs, *handle.outputs[0].logprobs]
        assert [entry.token for entry in found] == every[1:]
        for row, entry in enumerate(found):
            best = wanted[row].topk(2 if row + 1 < len(ids) else 3)
            assert entry.logprob == pytest.approx(float(wanted[row, entry.token]), abs=1e-4)
            assert [token for token, _ in entry.top] == best.indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_several_outputs_share_the_prompt(engines: MakeEngine) -> None:
    ids = prompt(70)
    engine = engines()
    handle = engine.generate([ids], replace(SAMPLED, n=3))[0]
    alone = [engines().generate([ids], replace(SAMPLED, seed=SAMPLED.seed + i))[0].token_ids for i in range(3)]
    assert [output.token_ids for output in handle.outputs] == alone
    assert engine.blocks.stats().hits_tokens == 2 * 64
    assert engine.metrics()["prompt_tokens"] == 70 + 2 * 6
