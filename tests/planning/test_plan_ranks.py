"""`coserve plan --tensor-parallel-size`: where an adapter lies and why, what ranks send, what each of them holds.

Shapes are those of published models. Nothing runs, but on one small model, whose plan is held against what its ranks load.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from coserve.bench.paper.models import model_directory
from tests.commands import Run

LARGE = model_directory("Llama-3.1-70B")


@pytest.fixture
def plan(run: Run) -> Any:
    def planned(*args: object) -> dict[str, Any]:
        result = run("plan", *args, "--no-baselines", "--json")
        assert (result.code, result.err) == (0, "")
        return json.loads(result.out)

    return planned


@pytest.fixture
def refused(run: Run) -> Any:
    return partial(run, "plan")


def chosen(data: dict[str, Any], site: str) -> dict[str, str]:
    """Where the parameters of a site lie in the first layers, without the site's name."""
    parameters = data["ranks"]["layers"][0]["candidates"][site][0]["parameters"]
    return {name.removeprefix(f"{site}.lora_"): axis for name, axis in parameters.items()}


C1, C2, C3 = {"A": "whole", "B": "out"}, {"A": "out", "B": "out"}, {"A": "in", "B": "out"}
R1, R2, R3 = {"A": "in", "B": "whole"}, {"A": "in", "B": "out"}, {"A": "in", "B": "in"}


@pytest.mark.parametrize(("args", "column", "row"), [
    # few ranks of the adapter, a fast link: nothing is sent for the adapter
    (("--rank", "16", "--device", "h100", "--window-tokens", "1024"), C1, R1),
    # many: products weigh more than what splitting them sends
    (("--rank", "512", "--device", "h100", "--window-tokens", "1024", "--max-microbatch-tokens", "1024"), C2, R3),
    # a rank that 8 does not divide can only be split along features
    (("--rank", "500", "--device", "h100", "--window-tokens", "1024", "--max-microbatch-tokens", "1024"), C3, R2),
    # small windows on a slow link: latency weighs more than products; large ones: less
    (("--rank", "64", "--device", "l40s", "--window-tokens", "256", "--max-microbatch-tokens", "4096"), C1, R1),
    (("--rank", "64", "--device", "l40s", "--window-tokens", "4096", "--max-microbatch-tokens", "4096"), C2, R3),
])
def test_rank_link_and_window_decide_where_lora_lies(
    plan: Any, args: tuple[str, ...], column: dict[str, str], row: dict[str, str]
) -> None:
    data = plan(LARGE, "--tensor-parallel-size", "8", "--dtype", "bfloat16", "--target-modules", "q_proj,down_proj", *args)
    assert (chosen(data, "q_proj"), chosen(data, "down_proj")) == (column, row)


def test_every_candidate_is_listed_with_its_cost_the_chosen_one_first(plan: Any) -> None:
    data = plan(LARGE, "--tensor-parallel-size", "8", "--dtype", "bfloat16", "--target-modules", "all-linear")
    for site, candidates in data["ranks"]["layers"][0]["candidates"].items():
        costs = [candidate["seconds_per_window"] for candidate in candidates]
        assert costs == sorted(costs) and costs[0] > 0, site
        assert len(costs) >= 3, site


def test_70b_on_8_ranks_is_planned_in_five_seconds(plan: Any) -> None:
    data = plan(LARGE, "--tensor-parallel-size", "8", "--dtype", "bfloat16", "--target-modules", "all-linear")
    assert data["seconds"]["plan"] < 5


def test_each_rank_holds_its_share(plan: Any) -> None:
    args = LARGE, "--dtype", "bfloat16", "--target-modules", "all-linear"
    one, eight = plan(*args), plan(*args, "--tensor-parallel-size", "8")
    assert one["ranks"] is None and one["tensor_parallel_size"] == 1
    apart = [data["beside_every_total"]["weights"] for data in (one, eight)]
    assert 7.9 < apart[0] / apart[1] <= 8, "norms are whole on every rank"
    assert eight["ranks"]["num_parameters_per_rank"] < one["adapter"]["num_parameters"]
    assert eight["adapter"]["num_parameters"] == one["adapter"]["num_parameters"]
    assert eight["kv_cache"]["bytes_per_token_per_rank"]["8"] == one["kv_cache"]["bytes_per_token"] // 8
    # hidden rows are whole on every rank, heads and inner features are shared
    kept = [data["stages"][1]["bytes_per_token"] for data in (one, eight)]
    assert kept[0] / 8 < kept[1] < kept[0] / 2


def test_what_is_sent_per_layer(plan: Any) -> None:
    """Megatron's two all-reduces in each direction, and nothing for an adapter of few ranks."""
    data = plan(LARGE, "--tensor-parallel-size", "8", "--dtype", "bfloat16", "--target-modules", "all-linear", "--rank", "16")
    hidden = 2 * 7 / 8 * 8192 * 2
    transfers = data["ranks"]["transfers"]
    assert sum(len(entry["layers"]) for entry in transfers) == 80
    lowest, rest = transfers
    assert [(each["direction"], each["op"], each["num_bytes"]) for each in rest["transfers"]] == [
        ("forward", "reduce", hidden), ("forward", "reduce", hidden), ("backward", "reduce", hidden),
        ("backward", "reduce", hidden),
    ]
    assert [each["direction"] for each in lowest["transfers"]].count("backward") == 1, "nothing below needs a gradient"


def test_a_sharding_that_is_asked_for_is_had(plan: Any) -> None:
    data = plan(
        LARGE, "--tensor-parallel-size", "8", "--dtype", "bfloat16", "--target-modules", "q_proj,down_proj",
        "--adapter-sharding", "q_proj.lora_A=out,down_proj.lora_B=in",
    )
    assert (chosen(data, "q_proj"), chosen(data, "down_proj")) == (C2, R3)
    assert len({c["parameters"]["q_proj.lora_A"] for c in data["ranks"]["layers"][0]["candidates"]["q_proj"]}) == 3


@pytest.mark.parametrize(("args", "message"), [
    (("--tensor-parallel-size", "3"),
     "tensor_parallel_size: 3 ranks can't share 64 heads, 8 key-value heads and an MLP of 28672; possible are 1, 2, 4, 8, "),
    (("--tensor-parallel-size", "0"), "tensor_parallel_size: "),
    (("--tensor-parallel-size", "2", "--device", "h1000"), "device: 'h1000' is not known"),
    (("--adapter-sharding", "q_proj.lora_A=out"), "adapter_sharding: needs a tensor_parallel_size above 1"),
    (("--tensor-parallel-size", "2", "--adapter-sharding", "q_proj.lora_A"),
     "adapter_sharding: 'q_proj.lora_A' is not PARAMETER="),
    (("--tensor-parallel-size", "2", "--adapter-sharding", "q_proj.lora_C=in"), "adapter_sharding: no parameter is called "),
    (("--tensor-parallel-size", "8", "--rank", "12", "--target-modules", "q_proj", "--adapter-sharding", "q_proj.lora_A=out"),
     "adapter_sharding: q_proj.lora_A out can't be had with 8 ranks in this layer"),
])
def test_what_cannot_be_is_one_line(refused: Run, args: tuple[str, ...], message: str) -> None:
    result = refused(LARGE, "--no-baselines", *args)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {message}")
    assert result.err.count("\n") == 1


def test_the_terminal_shows_all_of_it_in_80_columns(refused: Run) -> None:
    result = refused(LARGE, "--no-baselines", "--tensor-parallel-size", "4", "--dtype", "bfloat16")
    assert result.code == 0
    for text in ("where parameters lie", "chosen", "what each rank sends", "each rank's adapter:"):
        assert text in result.out
    assert max(map(len, result.out.splitlines())) <= 80
