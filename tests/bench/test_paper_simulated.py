"""The paper's evaluation by arithmetic: sums over pipelines, the paper's numbers, the fit, memory, and a small whole."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coserve.bench.arrivals import ArrivalConfig
from coserve.bench.paper import cells as cells_module
from coserve.bench.paper.cells import BURST_SHAPE, CellConfig, PaperCell, run_cells
from coserve.bench.paper.device import BY_LAW, BY_SURFACE, DEVICE, LAWS, fit_surface, make_device, part_of
from coserve.bench.paper.evaluation import PaperConfig, quick_config, simulated
from coserve.bench.paper.figures import MEMORY_GB, OVER_SEPARATE, REPORTED, STAGES, reported
from coserve.bench.paper.memory import KINDS, SEQUENCE_LENGTH, WINDOW_TOKENS, memory_rows
from coserve.bench.paper.models import LARGE, MODELS, model_directory, read_shape
from coserve.bench.paper.page import simulated_section
from coserve.bench.paper.rows import compare, find_better, make_row, make_rows
from coserve.bench.simulate import ALONE
from coserve.cli.planned import Asked, make_plan
from coserve.core import ConfigError
from coserve.devices.table import find_device
from coserve.model.decoder import linear_shapes
from tests.commands import Run

MODEL = "Llama-3.1-8B"
SHORT = PaperConfig(
    models=(MODEL,), rates=(4.0, 20.0), policies=("coserve", "separate:50", "spatial"), duration=3.0, alone_s=3.0,
    arrivals=ArrivalConfig(kind="gamma:2", prompt_tokens=50, output_tokens=30, length_spread=0.5, max_tokens=200),
)


def figures(tokens: float, rate: float = 1.0, attainment: float = 1.0, **others: Any) -> dict[str, Any]:
    return {"finetune_tokens_per_s": tokens, "goodput": rate, "inference_tokens_per_s": 100 * rate,
            "slo_attainment": attainment, "num_requests": 10, "fused_share": None, **others}


def given(law: str = BY_LAW, coserve: tuple[float, float] = (300.0, 240.0)) -> dict[PaperCell, dict[str, Any]]:
    """Runs of one pipeline at 4 and 20 requests/s of four."""
    cell = PaperCell(law, MODEL, 1.0, ALONE, 0.0)
    half = cell._replace(share=0.5)
    return {
        cell: figures(400.0), half: figures(150.0),
        **{cell._replace(policy="coserve", rate=rate): figures(tokens, rate, fused_share=0.5, bound_tokens_per_s=350.0)
           for rate, tokens in zip((1.0, 5.0), coserve, strict=True)},
        **{cell._replace(policy="inference-only", rate=rate): figures(0.0, rate) for rate in (4 / 3, 20 / 3, 4.0, 20.0)},
        **{half._replace(policy="inference-only", rate=rate): figures(0.0, rate, 0.8) for rate in (1.0, 5.0)},
    }


def test_pipelines_add_up() -> None:
    results = given()
    row = make_row(BY_LAW, MODEL, "coserve", 20.0, results)
    assert (row["finetune_tokens_per_s"], row["goodput"], row["inference_tokens_per_s"]) == (960.0, 20.0, 2000.0)
    assert (row["bound_tokens_per_s"], row["finetune_share"], row["fused_share"]) == (1400.0, 0.6, 0.5)
    assert row["rate_per_pipeline"] == 5.0
    row = make_row(BY_LAW, MODEL, "separate:75", 20.0, results)
    assert row["rate_per_pipeline"] == pytest.approx(20 / 3) and row["goodput"] == pytest.approx(20.0)
    assert (row["finetune_tokens_per_s"], row["finetune_share"], row["bound_tokens_per_s"]) == (400.0, 0.25, 1400.0)
    row = make_row(BY_LAW, MODEL, "separate:25", 4.0, results)
    assert (row["rate_per_pipeline"], row["goodput"], row["finetune_tokens_per_s"]) == (4.0, 4.0, 1200.0)
    row = make_row(BY_LAW, MODEL, "spatial", 4.0, results)
    assert (row["goodput"], row["finetune_tokens_per_s"], row["slo_attainment"]) == (4.0, 600.0, 0.8)


def test_retained_share_and_the_papers_numbers_beside() -> None:
    rows = make_rows([BY_LAW], [MODEL], ["coserve", "separate:75"], [20.0, 4.0], given())
    assert [(row["policy"], row["rate"], row.get("retained_share")) for row in rows] == [
        ("coserve", 4.0, None), ("coserve", 20.0, 0.8), ("separate:75", 4.0, None), ("separate:75", 20.0, 1.0)]
    assert rows[0]["paper"] == {"finetune_tokens_per_s": 9400} and rows[1]["paper"]["slo_attainment"] == 0.975
    assert "paper" not in rows[2] and rows[0]["finetune_tokens_per_s"] == 1200.0, "ours stay ours"
    found = compare(rows)
    assert [(entry["rates"], entry["least"], entry["most"], tuple(entry["paper"])) for entry in found] == [
        ([4.0], 3.0, 3.0, OVER_SEPARATE[4]), ([20.0], 2.4, 2.4, OVER_SEPARATE[20])]


def test_policies_that_train_more_are_named() -> None:
    rows = make_rows([BY_LAW], [MODEL], ["coserve", "separate:25", "spatial"], [4.0, 20.0], given(coserve=(310.0, 140.0)))
    assert [(entry["policy"], entry["rate"], round(entry["ratio"], 3)) for entry in find_better(rows)] == [
        ("separate:25", 20.0, 2.143)], "spatial trains more at 20, but with fewer in time"


def test_the_papers_numbers_are_well_formed() -> None:
    assert len({entry[:3] for entry in REPORTED}) == len(REPORTED)
    for entry in REPORTED:
        assert entry.model in MODELS and entry.rate in (4, 20) and entry.value > 0
        assert entry.value <= 1 or entry.quantity not in ("slo_attainment", "retained_share")
    for model in MODELS:
        first, last = reported(model, 4), reported(model, 20)
        assert last["retained_share"] == pytest.approx(last["finetune_tokens_per_s"] / first["finetune_tokens_per_s"], abs=0.02)
    assert MEMORY_GB.keys() == KINDS.keys()
    for sizes in MEMORY_GB.values():
        assert len(sizes) == len(STAGES) and list(sizes) == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("name", "billions"), [(MODEL, 8.03), ("Qwen2.5-14B", 14.77), ("Qwen2.5-32B", 32.76), (LARGE, 70.55)])
def test_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    arch = read_shape(name)
    count = arch.num_layers * sum(map(math.prod, linear_shapes(arch).values())) + 2 * arch.vocab_size * arch.hidden_size
    assert count / 1e9 == pytest.approx(billions, abs=0.011)


def test_the_fit_meets_the_papers_latencies() -> None:
    fit = fit_surface()
    assert len(fit.points) == 10
    for what, paper, before, after in fit.points:
        assert after == pytest.approx(paper, rel=0.11), what
        assert before < 0.7 * paper, "the law as it stands is faster than the paper's program"
    base, other = find_device(DEVICE), make_device(BY_SURFACE, 32, fit)
    assert make_device(BY_LAW, 32, fit) == base
    assert other.launch_s == pytest.approx(fit.device.launch_s * 32 / 80) and 0.3 < other.efficiency < 0.5
    kept = ("bandwidth", "peak_flops", "memory_bytes", "link", "unit_s", "unit_layer_s", "kept_widths", "update_bytes")
    assert all(getattr(other, name) == getattr(base, name) for name in kept)
    half = part_of(base, 0.5)
    assert (half.bandwidth, half.flops, half.memory_bytes) == (base.bandwidth / 2, base.flops / 2, base.memory_bytes / 2)
    assert (half.link.bandwidth, half.launch_s) == (base.link.bandwidth / 2, base.launch_s)


def test_memory_is_what_plan_says() -> None:
    rows = list(memory_rows())
    assert [(row["adapter"], row["stage"]) for row in rows] == [(kind, stage) for kind in KINDS for stage in STAGES]
    for kind in KINDS:
        asked = Asked(kind=kind, rank=None, targets=("down_proj",) if kind == "lora" else None, dropout=None)
        planned = make_plan(
            model_directory(LARGE), asked, dtype="bfloat16", sequence_length=SEQUENCE_LENGTH, num_tokens=SEQUENCE_LENGTH,
            window_tokens=WINDOW_TOKENS, limit="auto", with_baselines=False,
        )
        stages = {stage.name: stage.total_bytes for stage in planned.estimate.stages}
        ours = {row["stage"]: row["bytes"] for row in rows if row["adapter"] == kind}
        assert {name: stages[name] for name in STAGES[1:]} == {name: ours[name] for name in STAGES[1:]}
        assert ours["none"] > ours["prune"]


def cell_config(**changes: Any) -> CellConfig:
    values: dict[str, Any] = {"arrivals": SHORT.arrivals, "duration": 2.0, "seed": 0, "alone_s": 1.0, "fit": fit_surface()}
    return CellConfig(**values | changes)


def test_a_cell_is_simulated_once_and_again_for_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, config = PaperCell(BY_SURFACE, MODEL, 1.0, "coserve", 4.0), cell_config()
    told: list[tuple[int, str]] = []
    first = run_cells([cell], config, tmp_path / "a", 1, lambda done, last: told.append((done, last.label)))
    assert told == [(1, f"{BY_SURFACE}-{MODEL}-coserve-4")]
    assert run_cells([cell], config, tmp_path / "b", 1, lambda *_: None) == first, "equal settings, equal figures"
    runs: list[PaperCell] = []
    monkeypatch.setattr(cells_module, "_run", lambda cell, config: runs.append(cell) or {"ran": True})
    assert run_cells([cell], config, tmp_path / "a", 1, lambda *_: None) == first and runs == []
    for other in (replace(config, seed=1), replace(config, fit=config.fit._replace(num_layers=40))):
        assert run_cells([cell], other, tmp_path / "a", 1, lambda *_: None) == {cell: {"ran": True}}
    monkeypatch.setattr(cells_module, "code_digest", lambda: "another scheduler")
    run_cells([cell], config, tmp_path / "a", 1, lambda *_: None)
    assert len(runs) == 3


@pytest.mark.full
def test_processes_give_the_same(tmp_path: Path) -> None:
    policies = ((ALONE, 0.0), ("coserve", 4.0), ("layer-sliced", 4.0))
    cells = [PaperCell(BY_LAW, MODEL, 1.0, policy, rate) for policy, rate in policies]
    one, two = (run_cells(cells, cell_config(), tmp_path / str(n), n, lambda *_: None) for n in (1, 2))
    assert one == two and list(two) == cells


def test_a_whole_evaluation(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coserve.cli.paper.PAPER_CONFIG", SHORT)
    monkeypatch.setattr("coserve.cli.paper.quick_config", lambda config: replace(config, laws=(BY_LAW,)))
    monkeypatch.setattr(cells_module, "BURST_SHAPE", replace(BURST_SHAPE, warmup_s=1.0, before_s=2.0, burst_s=2.0, after_s=2.0))
    ran = run("bench", "paper", "--no-measured", "--quick", "--workers", "1", "--simulated-s", "3", "-o", tmp_path)
    assert (ran.code, ran.err) == (0, "")
    data = json.loads((tmp_path / "paper.json").read_text())
    rows = {(row["policy"], row["rate"]): row for row in data["results"]}
    assert set(rows) == {(policy, rate) for policy in SHORT.policies for rate in SHORT.rates}
    most = rows["coserve", 4.0]
    assert most["finetune_tokens_per_s"] <= 1.05 * most["bound_tokens_per_s"] and most["slo_attainment"] == 1.0
    assert rows["separate:50", 4.0]["finetune_tokens_per_s"] == pytest.approx(data["alone"][0]["finetune_tokens_per_s"] / 2)
    assert {"date", "versions", "command", "device", "fit", "memory", "paper", "machines", "settings"} <= data.keys()
    page = (tmp_path / "paper.html").read_text()
    words = re.sub(r"<[^>]+>", " ", page)
    assert "A bound by arithmetic, not a measurement." in words and "http" not in page and page.count("<svg") == 2 + 2 + 3
    assert "requests/s coserve trains" not in words and "No other policy trains more" in words
    assert "The paper reports 9.4k at 4 and 7.2k at 20." in words and "the paper: co-serving" in words
    assert "coserve trains" in ran.out and "the paper's: 9400" in ran.out
    assert simulated_section(data) in page


@pytest.mark.parametrize(("changes", "message"), [
    ({"policies": ("separate:60",)}, r"policies: write separate:25, separate:50, separate:75, got 'separate:60'"),
    ({"policies": ("fast",)}, "policy: must be one of coserve"), ({"policies": ()}, "policies: name at least one"),
    ({"models": ("Llama-2",)}, "models: must be of Llama-3.1-8B"), ({"rates": (0.0,)}, "rates: must be positive"),
    ({"laws": ("magic",)}, "laws: must be of law, paper-speed"), ({"duration": -1.0}, "duration: must be"),
])
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PaperConfig(**changes)


def test_quick_is_a_part(tmp_path: Path) -> None:
    quick = quick_config(PaperConfig())
    assert (quick.models, quick.rates, quick.laws) == ((MODEL,), (4.0, 20.0), LAWS)
    with pytest.raises(ConfigError, match="workers: must be at least 1"):
        simulated(quick, tmp_path, workers=0)
