"""The simulated part of `coserve bench paper`: all cells, rows, the burst and the memory table, as a result file's data.

Owns: which cells there are, and the settings. Does not own: runs (cells.py), rows (rows.py), the page (page.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from coserve.bench.arrivals import ArrivalConfig, make_arrivals
from coserve.bench.paper.cells import (
    ACCUMULATION,
    BURST,
    BURST_SHAPE,
    EXAMPLE_TOKENS,
    RANK,
    CellConfig,
    PaperCell,
    make_cell_machine,
    run_cells,
)
from coserve.bench.paper.device import DEVICE, LAWS, SPATIAL_SHARE, Fit, fit_surface
from coserve.bench.paper.figures import PAPER, REPORTED
from coserve.bench.paper.memory import memory_rows
from coserve.bench.paper.models import MODELS, NUM_PIPELINES, TTFT_MS
from coserve.bench.paper.rows import cells_of, check_policy, compare, find_better, make_rows
from coserve.bench.sharing import SPATIAL
from coserve.bench.simulate import ALONE, machine_facts
from coserve.config.values import require, require_least, require_positive
from coserve.devices.table import find_device

VARIATION = 2.0
"""Of gaps between arrivals where no trace is given: standard deviation over mean. Assumed; 1 is a Poisson process."""
POLICIES = (
    "coserve", "layer-sliced", "dynamic-temporal", "temporal:64", "temporal:128", "temporal:512", SPATIAL, "separate:75",
    "separate:50", "separate:25",
)
QUICK_POLICIES = ("coserve", "layer-sliced", "dynamic-temporal", "separate:75")

Listen = Callable[[int, int, str], None]
"""Told how many cells are done, of how many, and the last one's label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperConfig:
    """What is simulated. Times are of the simulated clock."""

    models: tuple[str, ...] = tuple(MODELS)
    rates: tuple[float, ...] = (4.0, 8.0, 12.0, 16.0, 20.0)
    """Requests per second of four pipelines together."""
    policies: tuple[str, ...] = POLICIES
    laws: tuple[str, ...] = LAWS
    arrivals: ArrivalConfig = field(default_factory=lambda: ArrivalConfig(
        kind=f"gamma:{VARIATION:g}", prompt_tokens=220, output_tokens=260, length_spread=0.8, max_tokens=8192))
    duration: float = 60.0
    """Seconds over which the counted requests come."""
    alone_s: float = 60.0
    """Window of finetuning alone."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(bool(self.models) and set(self.models) <= MODELS.keys(), "models", f"must be of {', '.join(MODELS)}")
        require(bool(self.laws) and set(self.laws) <= set(LAWS), "laws", f"must be of {', '.join(LAWS)}")
        require(bool(self.policies), "policies", "name at least one")
        for policy in self.policies:
            check_policy(policy)
        require(bool(self.rates) and min(self.rates) > 0, "rates", f"must be positive, got {self.rates}")
        require_positive(self, "duration", "alone_s")
        require_least(self, 0, "seed")


def quick_config(config: PaperConfig) -> PaperConfig:
    """The smallest model, the lowest and the highest rate, few policies, short windows."""
    return replace(
        config, models=config.models[:1], rates=(min(config.rates), max(config.rates)), policies=QUICK_POLICIES,
        duration=min(config.duration, 30.0), alone_s=min(config.alone_s, 30.0),
    )


def simulated(
    config: PaperConfig, directory: Path, *, workers: int = 1, listen: Listen = lambda done, total, label: None
) -> dict[str, Any]:
    """Simulates everything. Finished cells are kept in `directory`. workers: processes.

    Raises ConfigError, and InvalidRequest or NotFound for a trace that can't be used.
    """
    require(workers >= 1, "workers", f"must be at least 1, got {workers}")
    cells = _cells(config)
    most = max(cell.rate for cell in cells)
    make_arrivals(config.arrivals, most, max(1, round(most * config.duration)), config.seed)  # a bad trace is refused first
    fit = fit_surface()
    shared = CellConfig(
        arrivals=config.arrivals, duration=config.duration, seed=config.seed, alone_s=config.alone_s, fit=fit
    )
    results = run_cells(
        cells, shared, directory, workers, lambda done, cell: listen(done, len(cells), cell.label)
    )
    rows = make_rows(config.laws, config.models, config.policies, config.rates, results)
    machines = {
        f"{law} {model}": machine_facts(make_cell_machine(PaperCell(law, model, 1.0, ALONE, 0.0), fit))
        for law in config.laws for model in config.models
    }
    return {
        "results": rows, "comparisons": compare(rows), "better_than_coserve": list(find_better(rows)),
        "alone": [
            {"law": cell.law, "model": cell.model, "finetune_tokens_per_s": NUM_PIPELINES * result["finetune_tokens_per_s"]}
            for cell, result in results.items() if (cell.policy, cell.share) == (ALONE, 1)
        ],
        "bursts": [{"law": cell.law, "model": cell.model, **result}
                   for cell, result in results.items() if cell.policy == BURST],
        "memory": list(memory_rows()), "settings": asdict(config), "burst_shape": asdict(BURST_SHAPE),
        "training": {"example_tokens": EXAMPLE_TOKENS, "accumulation": ACCUMULATION, "rank": RANK, "target": "down_proj"},
        "objectives": {"ttft_ms": TTFT_MS, "tpot_ms": {name: model.tpot_ms for name, model in MODELS.items()}},
        "simulated_device": asdict(find_device(DEVICE)), "spatial_share": SPATIAL_SHARE, "machines": machines,
        "fit": _describe_fit(fit), "paper": {"source": PAPER, "reported": [entry._asdict() for entry in REPORTED]},
    }


def _describe_fit(fit: Fit) -> dict[str, Any]:
    device = fit.device
    return {
        "efficiency": device.efficiency, "overlap": device.overlap, "backward_rows": device.backward_rows,
        "launch_s": device.launch_s, "num_layers": fit.num_layers,
        "points": [{"what": name, "paper_ms": paper, "law_ms": before, "fitted_ms": after}
                   for name, paper, before, after in fit.points],
    }


def _cells(config: PaperConfig) -> list[PaperCell]:
    """Each run once, those of one machine behind each other."""
    found: dict[PaperCell, None] = {}
    for law in config.laws:
        for model in config.models:
            found[PaperCell(law, model, 1.0, ALONE, 0.0)] = None
            for policy in config.policies:
                for rate in config.rates:
                    serving, training = cells_of(law, model, policy, rate)
                    found |= dict.fromkeys([serving] if training is None else [training, serving])
        found[PaperCell(law, config.models[0], 1.0, BURST, BURST_SHAPE.base_load)] = None
    return sorted(found, key=lambda cell: (cell.law, cell.model, cell.share))
