"""coserve on all processors against the same processors divided between vLLM and transformers + peft, over HTTP.

Owns: which cells there are, in what order, and what traffic they get. Does not own: processes (rivals.py), one cell
(observe.py), rows (versusrows.py).

    for each repeat, for each load, one configuration right after another; each repeat begins with another one
        coserve         coserve serve on all processors, with a job
        split M+N       vLLM tied to M processors, peft to the N others
        side by side    vLLM and peft, each with a thread on each processor

Every cell is kept on disk. All configurations of a repeat get the same prompts at the same times, and the same training data.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from coserve.bench.arrivals import Arrival, ArrivalConfig, make_arrivals, make_burst
from coserve.bench.cells import CellStore
from coserve.bench.metrics import SloInMs
from coserve.bench.observe import Observed, WindowTraffic, observe, observed_from_dict, observed_to_dict
from coserve.bench.rivals import COSERVE, VLLM, Configuration, RivalMissing, Rivals
from coserve.bench.servers import busy_seconds
from coserve.config.values import require, require_least, require_positive

BURST, ALONE = "burst", "alone"
SIDE_BY_SIDE = "side by side"
START_S, OVERHEAD_S = 40, 10
"""Usual seconds of a configuration's start, and of a cell beside its warm-up and window, for a small model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstTraffic:
    """Poisson arrivals at a base rate with a burst in the middle. Requests per second, seconds."""

    base_rate: float = 0.1
    burst_rate: float = 1.0
    before_s: float = 13.0
    burst_s: float = 20.0
    after_s: float = 13.0

    @property
    def seconds(self) -> float:
        return self.before_s + self.burst_s + self.after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class VersusConfig:
    """What is measured."""

    rates: tuple[float, ...] = (0.1, 0.35, 0.7)
    """Requests per second."""
    burst: BurstTraffic | None = BurstTraffic()
    repeats: int = 3
    window_s: float = 46.0
    """Of the rates; a burst has a length of its own."""
    warmup_s: float = 6.0
    """Before each window, with the same rate of requests."""
    ttft_ms: float = 3000.0
    tpot_ms: float = 150.0
    prompt_tokens: int = 128
    output_tokens: int = 64
    seed: int = 0
    alone: bool = False
    """Also training without requests."""

    def __post_init__(self) -> None:
        require_least(self, 1, "repeats", "prompt_tokens", "output_tokens")
        require_positive(self, "window_s", "warmup_s", "ttft_ms", "tpot_ms")
        require(bool(self.rates) and all(rate > 0 for rate in self.rates), "rates",
                f"must be positive numbers of requests per second, got {self.rates}")

    @property
    def objectives(self) -> SloInMs:
        return SloInMs(ttft_ms=self.ttft_ms, tpot_ms=self.tpot_ms)


class Demand(NamedTuple):
    """A load by its name in results. rate: requests per second, of a burst its base; 0: nobody asks."""

    name: str
    rate: float


class ObservedCell(NamedTuple):
    """A finished cell, or why there is none (missing). cores_used: processor seconds per second, from the warm-up to the last
    request, of this process (the client), of the configuration, and of all others on the machine, which an undisturbed
    cell has none of."""

    configuration: str
    demand: Demand
    repeat: int
    observed: Observed | None = None
    cores_used: dict[str, float] | None = None
    missing: str | None = None


Prompts = Callable[[int, Sequence[int]], tuple[tuple[int, ...], ...]]
"""So many prompts (token ids); equal keys give equal prompts."""


def make_configurations(cores: Sequence[int]) -> list[Configuration]:
    """All that are measured on these processors. The splits give vLLM about 25, 50 and 75% of them; on two, one."""
    counts = dict.fromkeys(min(len(cores) - 1, max(1, round(len(cores) * share))) for share in (0.25, 0.5, 0.75))
    everywhere: Any = {"serve_cores": tuple(cores), "train_cores": tuple(cores)}
    return [
        Configuration(name=COSERVE, server=COSERVE, **everywhere),
        *(Configuration(name=f"split {count}+{len(cores) - count}", server=VLLM, pinned=True,
                        serve_cores=tuple(cores[:count]), train_cores=tuple(cores[count:])) for count in counts if count),
        Configuration(name=SIDE_BY_SIDE, server=VLLM, **everywhere),
    ]


class Versus:
    """The whole measurement, from cells on disk where they are, else run. missing: why a configuration can't be measured, by
    its name; tell: takes a line about each cell."""

    def __init__(
        self, config: VersusConfig, configurations: Sequence[Configuration], rivals: Rivals, prompts: Prompts, store: CellStore,
        *, missing: dict[str, str], tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config, self.configurations, self.rivals = config, list(configurations), rivals
        self.prompts, self.store = prompts, store
        self.missing, self.tell = dict(missing), tell

    def measure(self) -> list[ObservedCell]:
        """All cells. Raises RuntimeError, after which those that are done are kept."""
        return [self._cell(*cell) for cell in self.plan()]

    def plan(self) -> Iterator[tuple[Configuration, Demand, int]]:
        """The cells in order: configuration, load, repeat."""
        for repeat in range(self.config.repeats):
            turn = repeat % len(self.configurations)
            ordered = self.configurations[turn:] + self.configurations[:turn]
            for demand in self.demands():
                for configuration in ordered:
                    yield configuration, demand, repeat

    def demands(self) -> list[Demand]:
        """The loads in order."""
        config = self.config
        found = [Demand(ALONE, 0.0)] if config.alone else []
        found += [Demand(f"{rate:g}", rate) for rate in config.rates]
        return found if config.burst is None else [*found, Demand(BURST, config.burst.base_rate)]

    def expected_s(self) -> float:
        """Usual seconds of the whole measurement, if nothing is kept from before."""
        cells = [(c, d) for c, d, _ in self.plan() if c.name not in self.missing]
        seconds = sum(self._window_s(demand) + self.config.warmup_s + OVERHEAD_S for _, demand in cells)
        return seconds + START_S * len({c.name for c, _ in cells})

    def traffic(self, demand: Demand, repeat: int) -> WindowTraffic:
        """The requests of all cells with this load in this repeat."""
        config, seed = self.config, 2 * (self.config.seed + repeat)
        window_s = self._window_s(demand)
        due_s: list[float] = []
        if demand.rate:
            warm = _poisson(demand.rate, config.warmup_s, seed)
            due_s += [arrival.due_s - config.warmup_s for arrival in warm]
            due_s += [arrival.due_s for arrival in self._counted(demand, seed + 1)]
        key = (config.seed, repeat, round(1e6 * demand.rate), int(demand.name == BURST))
        return WindowTraffic(prompts=self.prompts(len(due_s), key), due_s=tuple(due_s), output_tokens=config.output_tokens,
                       warmup_s=config.warmup_s, window_s=window_s)

    def _window_s(self, demand: Demand) -> float:
        burst = self.config.burst
        return burst.seconds if burst is not None and demand.name == BURST else self.config.window_s

    def _counted(self, demand: Demand, seed: int) -> list[Arrival]:
        burst = self.config.burst
        if burst is None or demand.name != BURST:
            return _poisson(demand.rate, self.config.window_s, seed)
        factor = burst.burst_rate / burst.base_rate
        return make_burst(burst.base_rate, factor, burst.before_s, burst.burst_s, burst.after_s, ArrivalConfig(), seed)

    def _cell(self, configuration: Configuration, demand: Demand, repeat: int) -> ObservedCell:
        cell = ObservedCell(configuration.name, demand, repeat)
        if configuration.name in self.missing:
            return cell._replace(missing=self.missing[configuration.name])
        same = ("burst", "window_s", "warmup_s", "ttft_ms", "tpot_ms", "prompt_tokens", "output_tokens", "seed")
        config = {name: value for name, value in asdict(self.config).items() if name in same}
        settings = {"repeat": repeat, "rate": demand.rate, "configuration": asdict(configuration), **config}
        label = f"{configuration.name}-{demand.name}-{repeat}"
        try:
            found = self.store.get(label, settings, lambda: self._run(configuration, self.traffic(demand, repeat)))
        except RivalMissing as error:
            self.missing[configuration.name] = str(error)
            self.tell(f"{configuration.name} is missing: {error}")
            return cell._replace(missing=str(error))
        return cell._replace(observed=observed_from_dict(found["observed"]), cores_used=found["cores_used"])

    def _run(self, configuration: Configuration, traffic: WindowTraffic) -> dict[str, Any]:
        with self.rivals.running(configuration) as rival:
            before, started = (time.process_time(), rival.processor_seconds(), busy_seconds()), time.monotonic()
            observed = asyncio.run(observe(rival.send, traffic, rival.trainer))
            seconds = time.monotonic() - started
            now = (time.process_time(), rival.processor_seconds(), busy_seconds())
        client, own, all_used = ((b - a) / seconds for a, b in zip(before, now, strict=True))
        used = {"client": client, "configuration": own, "others": max(0.0, all_used - client - own)}
        return {"observed": observed_to_dict(observed), "cores_used": used}


def _poisson(rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Poisson arrivals over exactly these seconds, as many as are expected (rounded, at least one)."""
    count = max(1, round(rate * seconds))
    return make_arrivals(ArrivalConfig(), count / seconds, count, seed)
