"""An engine under random use for a while: nothing leaks, nothing fails, and what is greedy stays the same.

COSERVE_SOAK_SECONDS sets the length (default 45); COSERVE_SOAK_SEED the course. The course runs in a process of its own, where
oneDNN keeps no compiled kernels: it keeps up to 1024 of them, one per shape, which would look like a leak.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from coserve.config.settings import FinetuneConfig, LoraConfig, OptimizerConfig, SamplingConfig, SchedulerConfig
from coserve.core import CapacityError, NotFound
from coserve.engine.engine import Engine
from coserve.engine.jobhandle import JobHandle
from coserve.engine.requests import RequestHandle
from coserve.grammar import choice, json_object, regex
from coserve.runtime.loaded import LoadedModel
from tests.tiny_directory import chat_lines, preference_lines, write_lines
from tests.tiny_engine import assert_nothing_left, build_model, drive, make_engine, prompt, random_adapter

SECONDS = float(os.environ.get("COSERVE_SOAK_SECONDS", "30"))
SEED = int(os.environ.get("COSERVE_SOAK_SEED", "0"))
GROWTH_BYTES = 160 << 20
"""Resident memory may grow by so much after the first third."""
QUIET_LIBRARIES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "MALLOC_ARENA_MAX": "1"}
GREEDY = SamplingConfig(max_tokens=24, temperature=0, ignore_eos=True)


def resident_bytes() -> int:
    """Of this process, now; the peak where that can't be told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Soak:
    """Random acts on one engine. The probes are greedy requests on the base, whose tokens are known."""

    def __init__(self, engine: Engine, directory: Path, rng: Random) -> None:
        self.engine, self.directory, self.rng = engine, directory, rng
        self.requests: list[RequestHandle] = []
        self.probes: list[tuple[RequestHandle, list[int]]] = []
        self.jobs: list[JobHandle] = []
        self.known = {n: engine.generate([prompt(n)], GREEDY)[0].token_ids for n in (3, 16, 45, 80)}
        self.counts = dict.fromkeys(("requests", "refused", "jobs", "succeeded", "failed", "cancelled"), 0)

    def act(self) -> None:
        acts = (self.ask, self.probe, self.leave, self.republish, self.unload, self.begin_job, self.steer_job)
        self.rng.choices(acts, weights=(30, 10, 8, 3, 1, 1, 3))[0]()

    def ask(self) -> None:
        rng = self.rng
        if len(self.requests) > 30:
            return
        sampling = SamplingConfig(
            max_tokens=rng.randrange(1, 80), temperature=rng.choice((0.0, 0.8)), seed=rng.randrange(99),
            n=rng.choice((1, 1, 1, 3)), stop=rng.choice(((), ("e",))), logprobs=rng.choice((None, 2)),
            prompt_logprobs=rng.choice((None, None, 1)), ignore_eos=rng.random() < 0.5,
            grammar=rng.choice((None, None, json_object(), choice(["yes", "no", "maybe"]), regex("(ab|c)+"))),
        )
        names = [None, None, *self.engine.adapters.names]
        try:
            self.requests.append(self.engine.submit(
                prompt(rng.randrange(1, 120), seed=rng.randrange(6)), sampling, adapter=rng.choice(names),
                tenant=rng.choice("ab"), ttft_ms=rng.choice((1.0, 3000.0, "none")),
                tpot_ms=rng.choice((2.0, 50.0, "none")),
            ))
            self.counts["requests"] += 1
        except CapacityError:
            self.counts["refused"] += 1

    def probe(self) -> None:
        if len(self.probes) < 8:
            length, tokens = self.rng.choice(list(self.known.items()))
            self.probes.append((self.engine.submit(prompt(length), GREEDY, tenant=self.rng.choice("ab")), tokens))

    def leave(self) -> None:
        if self.requests:
            self.rng.choice(self.requests).cancel()

    def republish(self) -> None:
        name = f"adapter {self.rng.randrange(5)}"
        self.engine.add_adapter(name, random_adapter(self.engine.model, self.rng.choice((2, 4, 8)), seed=self.rng.randrange(9)))

    def unload(self) -> None:
        if self.engine.adapters.names:
            self.engine.unload_adapter(self.rng.choice(self.engine.adapters.names))

    def begin_job(self) -> None:
        rng = self.rng
        if len(self.jobs) >= 3:
            return
        objective = rng.choice(("sft", "dpo"))
        config = FinetuneConfig(
            objective=objective, max_steps=rng.randrange(1, 8), batch_size=4, max_microbatch_tokens=rng.choice((80, 128)),
            checkpoint_steps=rng.choice((0, 2)), keep_checkpoints=1,
            lora=LoraConfig(r=rng.choice((2, 8)), dropout=rng.choice((0.0, 0.1))),
            optimizer=OptimizerConfig(learning_rate=rng.choice((1e-3, 1e-3, 1e9))),
        )
        self.counts["jobs"] += 1
        output, data = self.directory / f"job-{self.counts['jobs']}", self.directory / f"{objective}.jsonl"
        free = [name for number in range(4) if (name := f"job {number}") not in {job.name for job in self.jobs}]
        self.jobs.append(self.engine.finetune(data, output, config, name=rng.choice(free)))

    def steer_job(self) -> None:
        if self.jobs:
            job = self.rng.choice(self.jobs)
            self.rng.choices((job.pause, job.resume, job.cancel), weights=(8, 16, 1))[0]()

    def has_seen_all(self) -> bool:
        """Jobs of every end, requests that gave way to others."""
        counts = self.counts
        return bool(counts["succeeded"] and counts["failed"] and counts["cancelled"] and self.engine.metrics()["preemptions"])

    def look(self) -> None:
        """Takes leave of what has ended, which must have ended well."""
        for handle in [handle for handle in self.requests if handle.finished]:
            assert handle.error is None or isinstance(handle.error, NotFound), handle.error
            self.requests.remove(handle)
        for handle, tokens in [(handle, tokens) for handle, tokens in self.probes if handle.finished]:
            assert handle.token_ids == tokens
            self.probes.remove((handle, tokens))
        for job in [job for job in self.jobs if job.finished]:
            assert job.status != "failed" or "learning rate" in str(job.error), job.error
            self.counts[job.status] += 1
            self.jobs.remove(job)
            shutil.rmtree(job.directory, ignore_errors=True)
        self.engine.blocks.check_integrity()


def soak(engine: Engine, directory: Path, seconds: float) -> dict[str, int]:
    """What was done. It goes on, up to six times as long, until everything has happened that is to happen."""
    rng = Random(SEED)
    user = Soak(engine, directory, rng)
    started, base = time.monotonic(), 0
    while (elapsed := time.monotonic() - started) < seconds or (elapsed < 6 * seconds and not user.has_seen_all()):
        user.act()
        for _ in range(rng.randrange(6)):
            engine.step()
        user.look()
        if elapsed > seconds / 3 and not base:
            base = resident_bytes()
    for job in user.jobs:
        job.resume()
    drive(engine, seconds=120)
    user.look()
    assert not user.requests and not user.probes and not user.jobs
    growth = resident_bytes() - base
    print(f"resident memory {growth / 2**20:+.0f} MiB since a third of the time")
    assert growth < GROWTH_BYTES, f"{growth / 2**20:.0f} MiB more than after a third of the time"
    assert user.has_seen_all() or seconds < 30, f"{user.counts}, preemptions {engine.metrics()['preemptions']}"
    return user.counts


def course(directory: Path) -> None:
    """The whole course, with all that is asserted about it."""
    model: LoadedModel = build_model(directory / "model")
    write_lines(directory / "sft.jsonl", chat_lines(20))
    write_lines(directory / "dpo.jsonl", preference_lines(12))
    scheduler = SchedulerConfig(tpot_ms=20, ttft_ms=3000, max_num_batched_tokens=128, max_num_seqs=16)
    engine = make_engine(model, num_blocks=160, share=0.1, scheduler=scheduler, max_adapters=64)
    counts = soak(engine, directory, SECONDS)
    assert_nothing_left(engine)
    for name in engine.adapters.names:
        engine.unload_adapter(name)
    assert engine.adapters.num_versions == 0 and not engine.adapters.slots.keys
    found = engine.metrics()
    print(f"{counts}, preemptions {found['preemptions']}, iterations {found['iterations']:.0f}")
    assert engine.generate([prompt(45)], replace(GREEDY, n=2))[0].finish_reason == "length"
    engine.close()
    assert_nothing_left(engine)


@pytest.mark.full
@pytest.mark.timeout(6 * SECONDS + 300)
def test_nothing_leaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", "import sys, pathlib; from tests.engine.test_soak import course; "
               "course(pathlib.Path(sys.argv[1]))", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, **QUIET_LIBRARIES}, capture_output=True, text=True, check=False)
    with capsys.disabled():
        print(f"\n{done.stdout.strip()}")
    assert done.returncode == 0, done.stderr
