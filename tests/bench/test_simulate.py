"""`coserve bench simulate`: a whole simulation of a tiny model by its config.json, and what is refused."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from coserve.bench.arrivals import ArrivalConfig, make_arrivals
from coserve.bench.driver import RunConfig, run_load
from coserve.bench.simulate import Simulation, SimulationConfig, make_prompts
from coserve.bench.simulated import SimulatedMachine
from coserve.bench.workload import endless_job
from coserve.config.settings import EngineConfig, LoraConfig, SamplingConfig, SchedulerConfig
from coserve.core import ContextExceeded
from coserve.devices.law import device_law
from coserve.devices.table import find_device
from coserve.model.architecture import read_architecture
from coserve.simulation.disturbance import EXACT, Disturbance
from coserve.simulation.memory import device_memory
from tests.commands import Run
from tests.devices.models import CONFIGS

TINY = {
    **CONFIGS["llama-8b"], "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}
DEVICE = "bandwidth=2e8,flops=2e10,memory=1e8,launch_s=0.002,kept_widths=1"
"""As slow as the model is small: a pass takes about 5 ms."""
SHORT = ("--rates", "4,12", "--duration", 4, "--capacity", 40, "--tpot-ms", 30, "--ttft-ms", 1000, "--prompt-tokens", 40,
         "--output-tokens", 30, "--finetune-tokens", 512, "--finetune-batch", 4)
POLICIES = ("--policies", "coserve,inference-only,temporal:4")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(TINY))
    return path


def machine(config: Path, device: str = DEVICE, disturbance: Disturbance = EXACT, **scheduler: Any) -> SimulatedMachine:
    arch, found = read_architecture(config.parent), find_device(device)
    job = endless_job(4, 512).with_adapter(LoraConfig(r=4, target_modules=("down_proj",)))
    engine = EngineConfig(scheduler=SchedulerConfig(tpot_ms=30.0, ttft_ms=1000.0, **scheduler))
    memory = device_memory(
        arch, job, engine, memory_bytes=found.memory_bytes, usable_share=0.9, itemsize=2, tensor_parallel_size=1
    )
    law = device_law(arch, found)
    return SimulatedMachine(
        arch=arch, memory=memory, scheduler=engine.scheduler, law=law, believed=law, disturbance=disturbance,
        job=job, example_tokens=(512,) * 4,
    )


# --- the command ---


def test_a_whole_simulation(tiny: Path, tmp_path: Path, run: Run) -> None:
    result = run("bench", "simulate", tiny, "--device", DEVICE, *SHORT, *POLICIES, "-o", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"simulate.json", "simulate.html"}
    data = json.loads((tmp_path / "out" / "simulate.json").read_text())
    rows = {(row["policy"], row.get("rate")): row for row in data["results"]}
    assert set(rows) == {("finetune-only", None),
                         *((p, rate) for p in ("coserve", "inference-only", "temporal:4") for rate in (4.0, 12.0))}
    most = rows["finetune-only", None]["finetune_tokens_per_s"]
    for (policy, rate), row in rows.items():
        assert (row["experiment"], row["device"], row["tpot_slo_ms"], row["model"]) == ("simulation", "CUSTOM", 30.0, "tiny")
        if rate is not None:
            assert row["num_requests"] == 4 * rate and row["load"] == rate / 40 and not row["beyond_capacity"]
            assert row["bound_tokens_per_s"] > 0
            assert row["bound"] == row["load"] + row["bound_tokens_per_s"] / most
        assert (policy == "inference-only") == ("finetune_tokens_per_s" not in row)
    together, alone = rows["coserve", 4.0], rows["finetune-only", None]
    assert together["slo_attainment"] == 1.0 and 0 < together["fused_share"] <= 1 and alone["fused_share"] == 0
    assert together["finetune_tokens_per_s"] <= 1.02 * together["bound_tokens_per_s"]
    assert data["simulation"]["memory_bytes"]["weights"] > 0 and data["settings"]["duration"] == 4.0
    page = (tmp_path / "out" / "simulate.html").read_text()
    words = re.sub(r"<[^>]+>", " ", page)
    assert "A simulation by arithmetic on a stated law, not a measurement." in words and "How it was measured" not in words
    assert "http" not in page.replace("http-equiv", "")
    assert "simulates coserve at 4 requests/s" in result.out and "finetuning alone: " in result.out


def test_equal_seeds_give_equal_results_and_other_seeds_others(tiny: Path, tmp_path: Path, run: Run) -> None:
    found = []
    for place, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = run(
            "bench", "simulate", tiny, "--device", DEVICE, *SHORT, "--policies", "coserve", "--noise", 0.05, "--stalls", 0.01,
            "--slope", 1.1, "--host-ms", 0.5, "--arrivals", "gamma:2", "--seed", seed, "-o", tmp_path / place,
        )
        assert (result.code, result.err) == (0, "")
        found.append(json.loads((tmp_path / place / "simulate.json").read_text())["results"])
    assert found[0] == found[1] != found[2]


def test_iterations_that_only_decode_may_be_cuda_graphs(tiny: Path, tmp_path: Path, run: Run) -> None:
    laws, trained = [], []
    for place, flags in (("a", ()), ("b", ("--cuda-graphs",))):
        asked = (*SHORT, "--policies", "layer-sliced", *flags, "-o", tmp_path / place)
        result = run("bench", "simulate", tiny, "--device", DEVICE, *asked)
        assert (result.code, result.err) == (0, "")
        data = json.loads((tmp_path / place / "simulate.json").read_text())
        laws.append(data["simulation"]["law"])
        trained.append(sum(row["finetune_tokens_per_s"] for row in data["results"] if row.get("rate")))
    assert laws[1].pop("inference uncaptured 0") == pytest.approx(0.002 - 0.3e-3)
    assert laws[0].pop("inference once 0") - laws[1].pop("inference once 0") == pytest.approx(0.002 - 0.3e-3)
    assert laws[0] == laws[1] and trained[1] > 1.02 * trained[0]


def test_an_iteration_is_explained(tiny: Path, run: Run) -> None:
    result = run("bench", "simulate", tiny, "--device", DEVICE, *SHORT, "--explain", 200)
    assert (result.code, result.err) == (0, "")
    first, second, *_, last = result.out.splitlines()
    assert first == "iteration 200 of coserve at 4 requests/s" and "requests run and" in second
    assert re.search(r"^plan: \S+, predicted to take 0\.\d+ s, .*% of it for finetuning", result.out, re.M)
    assert re.fullmatch(r"it took 0\.\d+ s", last)
    result = run("bench", "simulate", tiny, "--device", DEVICE, *SHORT, "--explain", 10**9)
    assert result.code == 0 and "ends after" in result.out


@pytest.mark.parametrize(("changes", "message"), [
    (("--device", "h1000"), r"device: 'h1000' is not known \(did you mean H100\?\)"),
    (("--device", "bandwidth=2e8,flops=2e10,memory=1e6"), r"device: the model needs \S+ GiB \(weights .*; raise tensor_par"),
    (("--policies", "spatial"), "policies: spatial is two processes at once.*bench sharing, or leave it out"),
    (("--policies", "coserve,fast"), "policy: must be one of coserve"),
    (("--policies", ","), "policies: name at least one of"),
    (("--rates", "1,x"), "rates: write numbers joined by commas"),
    (("--rates", "0"), "rates: must be positive numbers"),
    (("--rates", "nan"), "rates: must be positive numbers"),
    (("--duration", "-1"), "duration: must be positive"),
    (("--duration", "inf"), "duration: must be a finite number"),
    (("--arrivals", "often"), "arrivals: must be poisson, gamma:CV .* or trace:FILE"),
    (("--arrivals", "trace:nowhere.csv"), "arrivals: there is no trace file nowhere.csv"),
    (("--tensor-parallel-size", "3"), "tensor_parallel_size: .* can be shared by 1 or 2 devices, not by 3"),
    (("--finetune-tokens", "0"), "finetune_tokens: must be at least 1"),
    (("--finetune-batch", "0"), "finetune_batch: must be at least 1"),
    (("--max-microbatch-tokens", "8"), "max_microbatch_tokens: 8 is less than an example's 512 tokens"),
    (("--finetune-tokens", "1000000"), "max_microbatch_tokens: a micro-batch of 1000000 tokens needs at least .* GiB"),
    (("--adapter", "magic"), "magic"),
    (("--noise", "0.5"), "noise: must be from 0 to below 1/3"),
    (("--efficiency", "2"), "device: efficiency is a share"),
    (("--gpu-memory-utilization", "0"), r"gpu_memory_utilization: must be in \(0, 1\]"),
    (("--length-spread", "9"), "length_spread: must be from 0 to 3"),
    (("--explain", "-1"), "explain: must be the number of an iteration"),
])
def test_bad_input_is_one_line_that_says_what_to_do(tiny: Path, run: Run, changes: tuple[str, ...], message: str) -> None:
    given = () if "--device" in changes else ("--device", DEVICE)
    result = run("bench", "simulate", tiny, *given, *SHORT, *changes)
    assert result.code == 2 and re.match(f"error: .*{message}", result.err) and result.err.count("\n") == 1, result.err


def test_models_that_can_not_be_read_are_refused(tmp_path: Path, run: Run) -> None:
    config = tmp_path / "config.json"
    config.write_text("{")
    for model, message in ((config, "is not readable JSON"), (tmp_path / "none", "no such directory or file")):
        result = run("bench", "simulate", model, "--device", "h100")
        assert result.code == 2 and message in result.err and result.err.count("\n") == 1


# --- its parts ---


def test_accounting_is_exact(tiny: Path) -> None:
    """What the driver reports as trained is what units have trained, and what is whole steps is whole batches."""
    server = machine(tiny).make("coserve")
    job = server.train(machine(tiny).planned())
    arrivals = make_arrivals(ArrivalConfig(prompt_tokens=30, output_tokens=20, length_spread=0.5), 8.0, 60, 1)
    plan = RunConfig(window_start_s=0.0, window_end_s=arrivals[-1].due_s, drain_s=10.0)
    found = run_load(server, arrivals, make_prompts(), plan, sleep=server.sleep, job=job)
    assert all(r.finished and len(r.token_times) == a.output_tokens for r, a in zip(found.records, arrivals, strict=True))
    assert found.rows == sum(a.prompt_tokens + a.output_tokens - 1 for a in arrivals)
    runner, done = server.engine.runner, job.job.steps_done * 4 * 512
    assert done > 0 and done <= sum(runner.trained.values()) < done + 4 * 512
    assert sum(runner.trained.values()) == pytest.approx((runner.rows.forward + runner.rows.backward) / 2)
    assert found.fused_share == runner.rows.fused / runner.rows.forward > 0


def test_capacity_is_searched_for_and_rates_beyond_it_are_marked(tiny: Path) -> None:
    config = SimulationConfig(
        policies=("inference-only",), rates=(5.0, 300.0), duration=1.0, tpot_ms=30.0, ttft_ms=1000.0, capacity_tolerance=0.5,
        alone_s=1.0, arrivals=ArrivalConfig(prompt_tokens=40, output_tokens=30),
    )
    simulation = Simulation(config, machine(tiny, max_num_seqs=32))
    measured = simulation.measure()
    assert 5 < measured.capacity < 300 and len(measured.probes) >= 2
    rows = [{"policy": cell.policy, "load": cell.load, "rate": cell.rate} for cell in measured.cells[1:]]
    simulation.add_to_rows(rows, measured)
    assert [row["beyond_capacity"] for row in rows] == [False, True]


def test_requests_that_never_fit_are_refused(tiny: Path) -> None:
    server = machine(tiny).make("coserve")
    with pytest.raises(ContextExceeded, match="prompt: 5000 tokens with its output exceed the model's longest context, 4096"):
        server.submit(range(4000), SamplingConfig(max_tokens=1000))


def test_cancelled_requests_and_jobs_end(tiny: Path) -> None:
    server = machine(tiny).make("coserve")
    job, request = server.train(machine(tiny).planned()), server.submit(range(30), SamplingConfig(max_tokens=500))
    for _ in range(10):
        assert server.step()
    assert not job.finished and not request.finished and request.finish_reason is None and request.token_times
    request.cancel()
    job.cancel()
    assert job.finished and job.error is None and request.finished and request.finish_reason == "cancelled"
    assert not server.step() and server.engine.pool.num_arena == server.engine.pool.num_used == 0


def test_lengths_are_log_normal_with_the_asked_means_and_within_the_limit() -> None:
    config = ArrivalConfig(prompt_tokens=220, output_tokens=260, length_spread=0.8, max_tokens=8192)
    arrivals = make_arrivals(config, 5.0, 20_000, 3)
    assert sum(a.prompt_tokens for a in arrivals) / 20_000 == pytest.approx(220, rel=0.03)
    assert sum(a.output_tokens for a in arrivals) / 20_000 == pytest.approx(260, rel=0.03)
    assert all(a.prompt_tokens >= 1 and a.output_tokens >= 1 and a.prompt_tokens + a.output_tokens <= 8192 for a in arrivals)
    few = make_arrivals(config, 10.0, 100, 3)
    assert [a[1:] for a in few] == [a[1:] for a in arrivals[:100]], "equal seeds give equal lengths at every rate"


@pytest.mark.full
def test_minutes_of_a_busy_device_take_less_than_a_third_of_their_time(tmp_path: Path) -> None:
    """230 decode rows: ten minutes take about 35 s on one core. The margin is for a slow machine."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama-8b"]))
    arch, device = read_architecture(tmp_path), find_device("h100")
    job = endless_job(8, 8192).with_adapter(LoraConfig(target_modules=("down_proj",)))
    engine = EngineConfig(scheduler=SchedulerConfig(tpot_ms=45.0, ttft_ms=5000.0, max_num_seqs=512))
    memory = device_memory(arch, job, engine, memory_bytes=80e9, usable_share=0.9, itemsize=2, tensor_parallel_size=1)
    law = device_law(arch, device)
    simulated = SimulatedMachine(
        arch=arch, memory=memory, scheduler=engine.scheduler, law=law, believed=law, disturbance=EXACT, job=job,
        example_tokens=(8192,) * 8,
    )
    server = simulated.make("coserve")
    arrivals = make_arrivals(ArrivalConfig(prompt_tokens=220, output_tokens=260, length_spread=0.8, max_tokens=8192), 20.0,
                             2_400, 0)
    began = time.process_time()
    plan = RunConfig(window_start_s=0.0, window_end_s=120.0, drain_s=0.0)
    run_load(server, arrivals, make_prompts(), plan, sleep=server.sleep, job=server.train(simulated.planned()))
    assert time.process_time() - began < 36
