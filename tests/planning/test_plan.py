"""`coserve plan`: totals against what a micro-batch and the loss head really take, the choice for a limit, the baselines
against a real run of transformers + peft, and the command's output.

The models are config.json files alone: SmolLM2-135M's and Llama-3.1-70B's shapes, and a tiny one where something runs.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from coserve.compiler import baselines
from coserve.compiler.plan import LayerBypass, TrainingPlans
from coserve.compiler.report import report
from coserve.config.settings import LINEAR_SITES, LoraConfig
from coserve.core import CapacityError
from coserve.kernels import library
from coserve.model.architecture import read_architecture
from coserve.model.linear import OutputHead
from coserve.ops.table import TABLE
from coserve.planning.budget import JobPlans, Workload, shape_adapter, training_bytes
from coserve.planning.estimate import STAGES, Estimate, Shape, estimate, keep_everything, loss_bytes
from coserve.runtime.executor import head_rows
from coserve.runtime.microbatch import microbatch_layout
from coserve.runtime.plans import layer_bypasses
from tests.commands import Run

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0, "eos_token_id": 2, "bos_token_id": 1,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "smollm2": {
        **LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "llama-70b": {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
    "tiny": {
        **LLAMA, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 512, "tie_word_embeddings": False,
    },
}
GB = 1e9


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of directories that hold a config.json each."""
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    return root


class Case(NamedTuple):
    """What `estimate` takes."""

    shape: Shape
    bypasses: list[LayerBypass]

    def estimate(self, limit: float | None = None) -> Estimate:
        return estimate(self.shape, self.bypasses, limit)


def make_case(directory: Path, *, targets: tuple[str, ...] = LINEAR_SITES, itemsize: int = 4, num_tokens: int = 1024) -> Case:
    arch = read_architecture(directory)
    adapter = shape_adapter(arch, LoraConfig(r=16, target_modules=targets))
    shape = Shape(
        arch=arch, itemsize=itemsize, num_tokens=num_tokens, sequence_length=1024, window_tokens=256,
        num_parameters=adapter.flat.numel(),
    )
    return Case(shape, layer_bypasses(arch, adapter))


@pytest.fixture(scope="module")
def smollm2(models: Path) -> Case:
    return make_case(models / "smollm2")


@pytest.fixture(scope="module")
def large(models: Path) -> Case:
    """The paper's case: Llama-3.1-70B, 2-byte values, LoRA r16 on down_proj."""
    return make_case(models / "llama-70b", targets=("down_proj",), itemsize=2)


# --- totals ---


@pytest.mark.parametrize("limit", [None, 0.6, 0.3])
@pytest.mark.parametrize("num_tokens", [1024, 4099])
def test_totals_are_what_the_engine_takes(smollm2: Case, limit: float | None, num_tokens: int) -> None:
    shape = replace(smollm2.shape, num_tokens=num_tokens)
    found = estimate(shape, smollm2.bypasses, limit)
    layout = microbatch_layout(found.plan, num_tokens, shape.arch, shape.itemsize, forward_only=False)
    held = training_bytes(
        shape.arch, found.plan, shape.num_parameters, microbatch_tokens=num_tokens, window_tokens=256, itemsize=4
    )
    parts = found.stages[-1].parts
    assert parts["kept activations"] == layout.arena
    assert parts["kept activations"] + parts["gradients"] == layout.total == found.in_flight_bytes
    assert parts["workspace"] == held["workspace"]
    assert found.apart["adapter and optimizer"] == held["adapter and optimizer"]
    assert found.stages[-1].total_bytes == sum(parts.values())


@pytest.mark.parametrize("limit", [None, 0.5])
def test_stages_come_in_order_and_only_lose(smollm2: Case, limit: float | None) -> None:
    stages = smollm2.estimate(limit).stages
    assert [stage.name for stage in stages] == list(STAGES)
    totals = [stage.total_bytes for stage in stages]
    assert totals == sorted(totals, reverse=True)
    assert [stage.bytes_per_token for stage in stages] == sorted((s.bytes_per_token for s in stages), reverse=True)
    prune, again, budget, compress, windows = stages
    assert prune.total_bytes > 1.1 * again.total_bytes
    assert prune.extra_flops_ratio == again.extra_flops_ratio == 0
    assert (budget.extra_flops_ratio > 0) == (limit is not None)
    assert budget.extra_flops_ratio == compress.extra_flops_ratio == windows.extra_flops_ratio
    assert compress.parts == budget.parts
    assert windows.parts["workspace"] < compress.parts["workspace"]


@pytest.mark.parametrize("limit", [None, 0.5])
def test_fp8_is_a_stage_of_its_own(large: Case, limit: float | None) -> None:
    """Before it, the plan for the same limit without it: more bytes, or where a limit was met, more FLOPs."""
    exact = large.estimate(limit)
    found = estimate(large.shape, large.bypasses, None if limit is None else exact.stages[-1].total_bytes, compression="fp8")
    prune, again, budget, compress, windows = found.stages
    assert [prune.parts, again.parts] == [stage.parts for stage in exact.stages[:2]]
    assert (budget.bytes_per_token, budget.extra_flops_ratio) == pytest.approx(
        (exact.stages[2].bytes_per_token, exact.stages[2].extra_flops_ratio), rel=0.02
    )
    assert "fp8" not in compress.note and "changes gradients" in compress.note
    assert compress.bytes_per_token == windows.bytes_per_token == found.plan.arena_bytes
    if limit is None:
        assert compress.bytes_per_token < 0.57 * budget.bytes_per_token
        assert windows.extra_flops_ratio == 0
    else:
        assert windows.total_bytes <= exact.stages[-1].total_bytes
        assert windows.extra_flops_ratio < 0.3 * budget.extra_flops_ratio
    names = {value.name for entry in report(found.plan, itemsize=2) for value in entry.kept}
    assert "gate_proj.fp8" in names and not any("exponent" in name for name in names)


def test_a_limit_that_only_fp8_meets(large: Case) -> None:
    least = min(point.total_bytes for point in large.estimate().curve)
    limit = 0.8 * least
    with pytest.raises(CapacityError):
        large.estimate(limit)
    found = estimate(large.shape, large.bypasses, limit, compression="fp8")
    assert found.stages[-1].total_bytes <= limit < found.stages[2].total_bytes


@pytest.mark.parametrize("targets", [LINEAR_SITES, ("down_proj",), ("q_proj", "v_proj")])
def test_the_first_stage_keeps_what_the_pruned_backward_reads(models: Path, targets: tuple[str, ...]) -> None:
    case = make_case(models / "tiny", targets=targets)
    plan = keep_everything(case.shape.arch, TrainingPlans(case.shape.arch, case.bypasses, itemsize=4).plan(), 4)
    for layer in plan.layers:
        read = {*layer.joint.saved(), *layer.joint.read_whole()}
        size = sum(layer.joint.values[name].num_bytes(4) for name in read)
        assert size <= layer.arena_bytes < size + 16 * len(read), "each storage is aligned"
        assert layer.backward is not None
        assert not [call.op for call in layer.backward.calls if TABLE[call.op].gradients], "nothing is made again"


def test_layers_say_which_products_run_again(smollm2: Case) -> None:
    arch, bypasses = smollm2.shape.arch, smollm2.bypasses
    fastest = TrainingPlans(arch, bypasses, itemsize=4).plan()
    assert all(entry.products == () for entry in report(fastest, itemsize=4))
    least = smollm2.estimate(min(point.total_bytes for point in smollm2.estimate().curve)).plan
    for entry in report(least, itemsize=4)[1:]:
        assert {"attention", "o_proj", "gate_up_proj"} <= set(entry.products)
        assert len(set(entry.products)) == len(entry.products), "a product runs once, however many outputs it has"
        assert {value.name for value in entry.kept} >= {"x"}


def peak_allocated(call: Callable[[], object]) -> int:
    """Bytes allocated at the peak of a call, beyond what was before, by PyTorch's own count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_head_takes_what_is_said(smollm2: Case, dtype: torch.dtype) -> None:
    arch = replace(smollm2.shape.arch, vocab_size=4096, hidden_size=128)
    rows, vocab, hidden = 320, arch.vocab_size, arch.hidden_size
    head, norm = OutputHead(torch.randn(vocab, hidden, dtype=dtype)), torch.ones(hidden, dtype=dtype)
    stream, labels = torch.randn(1000, hidden, dtype=dtype), torch.randint(vocab, (rows,))
    logprobs, correct = torch.zeros(rows), torch.zeros(rows, dtype=torch.bool)
    assert head_rows(vocab, dtype.itemsize) > rows
    logits = torch.empty(rows, vocab, dtype=dtype)  # of the workspace

    def label_rows() -> None:
        inputs = stream[torch.arange(rows)]
        library.label_rows(logprobs, correct, torch.empty_like(inputs), inputs, labels, norm, 1e-5, head, logits)

    label_rows()
    said = loss_bytes(arch, rows, dtype.itemsize)
    assert 0.9 * said <= peak_allocated(label_rows) <= 1.1 * said


# --- the choice ---


@pytest.mark.parametrize(("limit", "ratio"), [(15.5, 0.0), (12.5, 0.10), (7.9, 0.23), (3.4, 0.37)])
def test_llama_70b_meets_the_projects_targets(large: Case, limit: float, ratio: float) -> None:
    last = large.estimate(limit * GB).stages[-1]
    assert last.total_bytes <= limit * GB
    assert last.extra_flops_ratio <= ratio


def test_llama_70b_is_planned_in_five_seconds(models: Path) -> None:
    start = time.perf_counter()
    found = make_case(models / "llama-70b", targets=("down_proj",), itemsize=2).estimate(7.9 * GB)
    assert time.perf_counter() - start < 5
    assert len(found.curve) >= 12


@pytest.mark.parametrize("name", ["smollm2", "llama-70b", "tiny"])
def test_the_curve_falls(models: Path, name: str) -> None:
    curve = make_case(models / name).estimate().curve
    kept = [point.bytes_per_token for point in curve]
    ratios = [point.extra_flops_ratio for point in curve]
    assert len(curve) >= 12
    assert kept == sorted(set(kept), reverse=True)
    assert ratios == sorted(set(ratios))
    assert ratios[0] == 0
    assert ratios[-1] < 0.5


@pytest.mark.parametrize("share", [0.95, 0.7, 0.45, 0.25])
def test_a_limit_is_met_closely(smollm2: Case, share: float) -> None:
    fastest = smollm2.estimate()
    limit = share * fastest.curve[0].total_bytes
    found = smollm2.estimate(limit).stages[-1]
    assert 0.97 * limit <= found.total_bytes <= limit
    assert smollm2.estimate(share).stages[-1] == found, "a share is of the fastest plan's total"
    fitting = next(point for point in fastest.curve if point.total_bytes <= limit)
    assert found.extra_flops_ratio <= fitting.extra_flops_ratio


def test_a_job_with_the_plans_limit_gets_the_plan(smollm2: Case) -> None:
    found = smollm2.estimate(0.4)
    adapter = shape_adapter(smollm2.shape.arch, LoraConfig(r=16))
    job = JobPlans(smollm2.shape.arch, adapter, Workload(1024, 1024), itemsize=4).fit(found.in_flight_bytes)
    assert (job.num_bytes, job.plan.arena_bytes) == (found.in_flight_bytes, found.plan.arena_bytes)
    assert job.plan.recompute_flops == found.plan.recompute_flops


def test_a_limit_that_asks_for_nothing(smollm2: Case) -> None:
    free, loose = smollm2.estimate(), smollm2.estimate(1e15)
    assert [stage.parts for stage in free.stages] == [stage.parts for stage in loose.stages]
    assert loose.stages[-1].extra_flops_ratio == 0


def test_a_limit_that_nothing_meets_is_refused_with_numbers(large: Case) -> None:
    message = r"takes at least 2\.\d+ GB \(kept activations 1\.\d+, .*\), and 1 GB are"
    with pytest.raises(CapacityError, match=message) as caught:
        large.estimate(1 * GB)
    assert caught.value.param == "activation_memory"


# --- baselines ---


def real_saved_bytes(
    directory: Path, dtype: torch.dtype, sequence_length: int, *, checkpointing: bool, dropout: float = 0.0
) -> int:
    """What transformers + peft save in a real forward pass with PyTorch's sdpa."""
    config = AutoConfig.from_pretrained(directory)
    config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        adapter = peft.LoraConfig(r=16, target_modules=["down_proj", "q_proj"], lora_dropout=dropout)
        model = peft.get_peft_model(model, adapter).to(dtype).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.enable_input_require_grads()
        ids = torch.randint(config.vocab_size, (1, sequence_length))
        with baselines.counted_saves(model) as sizes:
            model(input_ids=ids, labels=ids)
    return sum(sizes.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_baselines_are_what_a_real_run_saves(models: Path, dtype: torch.dtype, dropout: float) -> None:
    found = baselines.measure(
        models / "tiny", adapter="lora", rank=16, targets=("down_proj", "q_proj"), dtype=dtype, sequence_length=192,
        num_tokens=192, dropout=dropout,
    )
    assert found.peft is not None
    assert found.checkpointing is not None
    real = partial(real_saved_bytes, models / "tiny", dtype, 192, dropout=dropout)
    assert found.peft.total_bytes == real(checkpointing=False)
    kept = real(checkpointing=True)
    assert found.checkpointing.total_bytes == kept + found.peft.layer_bytes
    assert found.checkpointing.boundary_bytes == 192 * 64 * dtype.itemsize
    assert found.checkpointing.loss_bytes >= 192 * 160 * 4


def test_baselines_grow_with_tokens_and_targets(models: Path) -> None:
    def measure(targets: tuple[str, ...] | str, num_tokens: int) -> int:
        found = baselines.measure(
            models / "tiny", adapter="lora", rank=4, targets=targets, dtype=torch.float32, sequence_length=64,
            num_tokens=num_tokens,
        )
        assert found.peft is not None
        return found.peft.total_bytes

    everything = measure("all-linear", 64)
    assert everything > measure(("down_proj",), 64)
    assert measure("all-linear", 256) == 4 * everything


def test_at_checkpointings_memory_less_runs_again(models: Path, large: Case) -> None:
    """Llama-3.1-70B: at most 40% where gradient checkpointing takes 50%."""
    found = baselines.measure(
        models / "llama-70b", adapter="lora", rank=16, targets=("down_proj",), dtype=torch.bfloat16, sequence_length=1024,
        num_tokens=1024,
    )
    assert found.peft is not None
    assert found.checkpointing is not None
    ours = large.estimate(found.checkpointing.total_bytes)
    assert ours.stages[-1].total_bytes <= found.checkpointing.total_bytes
    assert ours.stages[-1].extra_flops_ratio <= 0.40
    assert ours.checkpointing_flops_ratio == pytest.approx(0.5, abs=0.005)
    assert 1.5 * ours.curve[0].total_bytes < found.peft.total_bytes


def test_baselines_are_left_out_with_a_reason(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {
        "rank": 4, "targets": ("down_proj",), "dtype": torch.float32, "sequence_length": 8, "num_tokens": 8,
    }
    unknown = baselines.measure(models / "tiny", adapter="bottleneck", **arguments)
    assert (unknown.peft, unknown.reason) == (None, "peft has no bottleneck adapter")
    monkeypatch.setitem(sys.modules, "peft", None)
    missing = baselines.measure(models / "tiny", adapter="lora", **arguments)
    assert missing.peft is missing.checkpointing is None
    assert "not installed" in str(missing.reason)


# --- the command ---


@pytest.fixture
def plan(run: Run) -> Run:
    return partial(run, "plan")


def test_plan_as_json(plan: Run, models: Path, smollm2: Case) -> None:
    result = plan(models / "smollm2", "--activation-memory", "500MB", "--json")
    assert (result.code, result.err) == (0, "")
    data = json.loads(result.out)
    expected = smollm2.estimate(500e6)
    assert [stage["name"] for stage in data["stages"]] == list(STAGES)
    for stage, wanted in zip(data["stages"], expected.stages, strict=True):
        assert stage["bytes_per_token"] == wanted.bytes_per_token
        assert stage["total_bytes"] == wanted.total_bytes == sum(stage["parts"].values())
        assert stage["extra_flops_ratio"] == wanted.extra_flops_ratio
    assert [point["total_bytes"] for point in data["curve"]] == [point.total_bytes for point in expected.curve]
    assert sum(len(entry["layers"]) for entry in data["kept"]) == 30
    assert all(value["reason"] for entry in data["kept"] for value in entry["kept"])
    assert (data["limit"], data["activation_memory"]) == ("500MB", expected.in_flight_bytes)
    peft_saves, checkpointing = (data["baselines"][name] for name in ("peft", "checkpointing"))
    assert peft_saves["total_bytes"] > data["stages"][1]["total_bytes"] > checkpointing["total_bytes"] > 0
    assert (peft_saves["extra_flops_ratio"], checkpointing["extra_flops_ratio"]) == (0, expected.checkpointing_flops_ratio)
    assert "sdpa" in peft_saves["attention_path"]
    kv = 30 * 2 * 3 * 64 * 4  # layers, K and V, heads, features, bytes
    assert data["kv_cache"] == {"bytes_per_token": kv, "bytes_per_token_per_rank": {"1": kv, "3": kv // 3}}
    assert data["seconds"]["plan"] < 5


def test_plan_writes_files_and_says_the_same_on_the_terminal(plan: Run, models: Path, tmp_path: Path) -> None:
    result = plan(
        models / "tiny", "--target-modules", "down_proj", "--json", tmp_path / "plan.json", "--plot", tmp_path / "plan.png",
        "--activation-memory", "0.7", "--dtype", "bfloat16",
    )
    assert (result.code, result.err) == (0, "")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    for stage in data["stages"]:
        assert f"{stage['name']}: " in result.out
        assert f"{stage['bytes_per_token']} bytes kept per token" in result.out
    assert f"KV cache: {data['kv_cache']['bytes_per_token']} bytes per token" in result.out
    assert f"{data['kv_cache']['bytes_per_token'] // 2} on each of 2 ranks" in result.out
    assert "peft saves" in result.out
    assert max(map(len, result.out.splitlines())) <= 80
    assert "curve" in result.out


@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3", "bottleneck"])
def test_no_line_is_wider_than_a_terminal(plan: Run, models: Path, adapter: str) -> None:
    result = plan(models / "smollm2", "--adapter", adapter)
    assert result.code == 0
    assert max(map(len, result.out.splitlines())) <= 80
    assert not [line for line in result.out.splitlines() if line.endswith(",") and line.startswith("curve")]


def test_dropout_counts_in_both_plans(plan: Run, models: Path) -> None:
    def saved(*args: str) -> tuple[int, int]:
        data = json.loads(plan(models / "tiny", "--json", *args).out)
        return data["baselines"]["peft"]["total_bytes"], data["stages"][0]["total_bytes"]

    (peft_plain, ours_plain), (peft_dropped, ours_dropped) = saved(), saved("--dropout", "0.1")
    assert peft_dropped > 1.2 * peft_plain
    assert ours_dropped > ours_plain


def test_json_without_a_file_goes_to_standard_output_wherever_it_stands(plan: Run, models: Path) -> None:
    outputs = [
        plan(models / "tiny", "--json", "--no-baselines"), plan("--no-baselines", models / "tiny", "--json"),
        plan(models / "tiny", "--no-baselines", "--json", "-"),
    ]
    found = [json.loads(output.out) for output in outputs]
    assert all(data["baselines"] == {"absent": "left out (--no-baselines)"} for data in found)
    assert found[0]["stages"] == found[1]["stages"] == found[2]["stages"]


@pytest.mark.parametrize(("args", "message"), [
    (("--adapter", "prefix"), "adapter: must be one of lora, dora, ia3, bottleneck, got 'prefix'"),
    (("--sequence-length", "0"), "sequence_length: must be at least 1"),
    (("--window-tokens", "0"), "window_tokens: must be at least 1"),
    (("--max-microbatch-tokens", "100"), "max_microbatch_tokens: 100 is less than one sequence of 1024"),
    (("--activation-memory", "lots"), "activation_memory: write bytes"),
    (("--plot", "plan.txt"), "plot: the file's name must end in .png, .svg, .pdf, got plan.txt"),
    (("--plot", "/nowhere/plan.png"), "plot: /nowhere/plan.png can't be made, as there is no directory /nowhere"),
    (("--json", "/"), "json: / is a directory"),
    (("--activation-memory", "1kB"), "activation_memory: a micro-batch of 1024 tokens takes at least"),
])
def test_bad_arguments_are_one_line(plan: Run, models: Path, args: tuple[str, ...], message: str) -> None:
    result = plan(models / "tiny", *args)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith(f"error: {message}")
    assert result.err.count("\n") == 1
