"""The memory a job is said to need is what its tensors really take; what is available is read from the system's files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coserve.config.data import finetune_config_from_dict
from coserve.config.settings import EngineConfig, FinetuneConfig, LoraConfig
from coserve.core import CapacityError, Group
from coserve.engine import engine as engine_module
from coserve.engine.generation import Generator
from coserve.finetune.batches import pack_groups
from coserve.finetune.datasets import load_training
from coserve.model import memory
from coserve.model.checkpoint import Checkpoint
from coserve.model.linear import PackedHead, PackedLinear, can_pack
from coserve.model.memory import GIB, _host_available, available_bytes, packed_bytes, settle_copies, weight_bytes
from coserve.model.weights import ModelWeights, load_weights
from coserve.peft.lora import LoraAdapter
from coserve.planning.budget import (
    FittedPlan,
    JobPlans,
    Workload,
    require_memory,
    shape_adapter,
    training_bytes,
)
from coserve.runtime.cache import block_bytes
from coserve.runtime.executor import HEAD_BYTES
from coserve.runtime.loaded import DTYPES, load_model
from coserve.runtime.memory import Arena
from coserve.runtime.microbatch import InFlight, microbatch_layout, pack
from coserve.runtime.plans import training_plans
from coserve.scheduler.latency import LatencyModel
from coserve.training import finetuning
from coserve.training.trainer import AdapterTrainer
from tests.tiny_directory import build_tiny_directory, chat_lines, write_lines

FAMILIES = ("llama", "qwen2", "qwen3")
LORA = LoraConfig(r=4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("budget")
    return {family: build_tiny_directory(root / family, family) for family in FAMILIES}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "data.jsonl", chat_lines(9))


def num_bytes(*tensors: Tensor) -> int:
    """Bytes of distinct storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def make_trainer(directory: Path, dtype: str, *, window: int = 64, microbatch: int = 512, r: int = 4) -> AdapterTrainer:
    config = FinetuneConfig(lora=LoraConfig(r=r), window_tokens=window, max_microbatch_tokens=microbatch, batch_size=9)
    return AdapterTrainer(load_model(str(directory), device="cpu", dtype=dtype), config)


def needed_by(trainer: AdapterTrainer, microbatch_tokens: int) -> dict[str, int]:
    model, config = trainer.model, trainer.config
    return training_bytes(
        model.architecture, trainer.plan, trainer.adapter.flat.numel(), microbatch_tokens=microbatch_tokens,
        window_tokens=config.window_tokens, itemsize=model.weights.dtype.itemsize,
        packed=can_pack(model.weights.dtype, model.weights.device),
    )


# --- the parts ---


def test_a_fused_head_has_chunks_of_more_rows_in_the_workspace(directories: dict[str, Path]) -> None:
    trainer = make_trainer(directories["llama"], "float32")
    arch = replace(trainer.model.architecture, vocab_size=128_256)

    def workspace(window: int, *, fused: bool) -> int:
        return training_bytes(
            arch, trainer.plan, 1, microbatch_tokens=4096, window_tokens=window, itemsize=2, fused_head=fused
        )["workspace"]

    assert workspace(2048, fused=True) == 1024 * 128_256 * 2
    assert workspace(512, fused=True) == 512 * 128_256 * 2
    assert workspace(2048, fused=False) <= HEAD_BYTES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_weights_are_the_tensors_of_the_checkpoint(tmp_path: Path, family: str, stored: torch.dtype) -> None:
    checkpoint = Checkpoint(build_tiny_directory(tmp_path, family, dtype=stored))
    assert weight_bytes(checkpoint.architecture, stored.itemsize) == checkpoint.num_bytes


def plain_tensors(weights: ModelWeights) -> list[Tensor]:
    """Every tensor of weights in the plain layout."""
    found = [weights.embedding, weights.norm, weights.head.table]
    for layer in weights.layers:
        found += layer.norms.values()
        found += [tensor for linear in layer.linears.values() for tensor in (linear.weight, linear.bias) if tensor is not None]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_weights_on_the_device(directories: dict[str, Path], family: str, dtype: str) -> None:
    weights = load_weights(Checkpoint(directories[family]), dtype=DTYPES[dtype], device=CPU, packed=False)
    assert num_bytes(*plain_tensors(weights)) == weight_bytes(weights.architecture, weights.dtype.itemsize)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_after_a_training_step(directories: dict[str, Path], data: Path, family: str, dtype: str) -> None:
    """Linears are held twice (but for the lowest layer's first, whose input gradient nobody reads), the head twice more; where
    one copy is all, there is no byte more."""
    if not can_pack(DTYPES[dtype], CPU):
        pytest.skip("this processor has no packed layout")
    trainer = make_trainer(directories[family], dtype)
    weights, arch, itemsize = trainer.model.weights, trainer.model.architecture, DTYPES[dtype].itemsize
    assert held_bytes(weights) == weight_bytes(arch, itemsize)
    weights.hold_one_copy(True)
    trainer.forward_backward(groups_of(trainer, data), 0)
    trainer.executor.prepare(trainer.plan)
    assert held_bytes(weights) == weight_bytes(arch, itemsize)
    weights.hold_one_copy(False)
    trainer.forward_backward(groups_of(trainer, data), 1)
    said = weight_bytes(arch, itemsize) + packed_bytes(arch, itemsize)
    assert 0.9 * said <= held_bytes(weights) <= said
    assert weights.copied_bytes == held_bytes(weights) - weight_bytes(arch, itemsize)


def held_bytes(weights: ModelWeights) -> int:
    """Bytes of everything that packed weights hold."""
    itemsize, held = weights.dtype.itemsize, num_bytes(weights.embedding, weights.norm, weights.head.table)
    for layer in weights.layers:
        held += num_bytes(*layer.norms.values(), *(x.bias for x in layer.linears.values() if x.bias is not None))
        for linear in layer.linears.values():
            assert isinstance(linear, PackedLinear)
            copies = (linear._plain, linear._forward, linear._backward)
            held += sum(itemsize * copy.numel() for copy in copies if copy is not None)
    head = weights.head
    assert isinstance(head, PackedHead)
    return held + sum(itemsize * copy.numel() for copy in (*head._blocks, head._backward) if copy is not None)


def groups_of(trainer: AdapterTrainer, data: Path) -> tuple[Group, ...]:
    return load_training(data, trainer.model.tokenizer, FinetuneConfig(), max_length=512).groups


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("microbatch", "window", "r"), [(250, 64, 4), (250, 40, 64), (512, 100, 64), (512, 9999, 4)])
def test_activations_gradients_and_workspace(
    tmp_path: Path, directories: dict[str, Path], dtype: str, microbatch: int, window: int, r: int
) -> None:
    """What one micro-batch in flight really takes, tensor by tensor. Every token is a label, so that the head is as large as
    it gets; with a high rank the layers' programs need more than the head."""
    trainer = make_trainer(directories["llama"], dtype, microbatch=microbatch, window=window, r=r)
    groups = groups_of(trainer, write_lines(tmp_path / "text.jsonl", [{"text": "0123456789" * (18 + i)} for i in range(4)]))
    largest = max(pack_groups(groups, microbatch), key=lambda micro: sum(group.num_tokens for group in micro))
    batch = pack([example for group in largest for example in group.examples], device=torch.device("cpu"))
    needed = needed_by(trainer, batch.num_tokens)

    state = trainer.executor.begin(batch, trainer.plan)
    assert isinstance(state, InFlight)
    assert isinstance(state.arena, Arena)
    assert needed["kept activations"] == state.arena.num_bytes
    assert needed["gradients"] == sum(t.nbytes for t in (state.parked, state.grad_TD, state.d_keys, state.d_values))
    held = needed["kept activations"] + needed["gradients"]
    assert held <= trainer.executor._own_buffer.numel() < held + 4 * 64, "each of the four parts is aligned"

    trainer.forward_backward(groups, 0)
    workspace = trainer.model.executor.workspace.num_bytes
    assert workspace <= needed["workspace"] <= 1.02 * workspace, "an example's last token is no label"


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapter_and_optimizer(directories: dict[str, Path], dtype: str) -> None:
    trainer = make_trainer(directories["llama"], dtype)
    adapter, optimizer = trainer.adapter, trainer.optimizer
    assert adapter.grad is not None
    held = num_bytes(adapter.flat, adapter.grad, *optimizer.state().values())
    assert needed_by(trainer, 100)["adapter and optimizer"] == held


def test_an_adapter_for_planning_takes_no_memory_and_plans_alike(directories: dict[str, Path]) -> None:
    arch = Checkpoint(directories["qwen3"]).architecture
    for config in (LORA, LoraConfig(r=2, target_modules=("v_proj",), rank_pattern={"layers.1.self_attn.v_proj": 5})):
        planned = shape_adapter(arch, config)
        real = LoraAdapter.create(arch, config, dtype=torch.float32, device=torch.device("cpu"), seed=0)
        assert planned.flat.device.type == "meta"
        assert planned.flat.shape == real.flat.shape
        plans = [training_plans(arch, adapter, itemsize=4).plan() for adapter in (planned, real)]
        assert plans[0].arena_bytes == plans[1].arena_bytes
        assert plans[0].work_bytes == plans[1].work_bytes


def test_a_longer_micro_batch_needs_more(directories: dict[str, Path]) -> None:
    trainer = make_trainer(directories["llama"], "float32", window=10_000)
    short, long = needed_by(trainer, 100), needed_by(trainer, 400)
    assert long["kept activations"] == 4 * short["kept activations"]
    assert long["gradients"] == 4 * short["gradients"]
    assert long["workspace"] > 3 * short["workspace"]
    for name in ("weights", "packed copies of them", "adapter and optimizer"):
        assert long[name] == short[name]


def test_weights_are_loaded_packed_exactly_where_the_budget_says(directories: dict[str, Path]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weights = load_weights(Checkpoint(directories["llama"]), dtype=dtype, device=torch.device("cpu"))
        packed = isinstance(weights.head, PackedHead)
        assert packed == can_pack(dtype, torch.device("cpu"))


# --- the plan that fits ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_plan_for_any_room(directories: dict[str, Path], family: str, itemsize: int) -> None:
    """It fits, keeps as much as fits, and runs less again where there is more room; below the least nothing fits."""
    arch = Checkpoint(directories[family]).architecture
    plans = JobPlans(arch, shape_adapter(arch, LORA), Workload(333, 100), itemsize=itemsize)

    def fitted(room: float) -> FittedPlan:
        return plans.fit(room)

    most, least = fitted(math.inf), fitted(0)
    assert not most.plan.recompute_flops and most.num_bytes == plans.fastest().num_bytes
    before = least
    for share in (0.0, 0.1, 0.35, 0.6, 0.85, 1.0):
        room = least.num_bytes + share * (most.num_bytes - least.num_bytes)
        found = fitted(room)
        assert found.num_bytes <= room
        assert found.num_bytes == microbatch_layout(found.plan, 333, arch, itemsize, forward_only=False).total
        assert found.plan.recompute_flops <= before.plan.recompute_flops
        before = found
    assert before.plan.recompute_flops == 0

    def asked(value: float | str) -> FittedPlan:
        return plans.asked(FinetuneConfig(activation_memory=value))

    wanted = fitted(0.8 * most.num_bytes)
    for value in (0.8, "0.8", 0.8 * most.num_bytes, f"{0.8 * most.num_bytes / 1000!r} kB"):
        assert asked(value).num_bytes == wanted.num_bytes
    assert asked("auto").num_bytes == most.num_bytes
    with pytest.raises(CapacityError, match=rf"at least {least.num_bytes} bytes, {most.num_bytes} without") as caught:
        asked(least.num_bytes - 1)
    assert caught.value.param == "activation_memory"
    with pytest.raises(CapacityError, match=f"and {0.01 * most.num_bytes:.0f} are allowed"):
        asked(0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_finetune_takes_the_plan_that_there_is_memory_for(
    directories: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """With less and less memory: packed copies of weights, then one copy of each, then products run again, then a refusal."""
    model = load_model(str(directories["llama"]), device="cpu", dtype=dtype)
    config = FinetuneConfig(lora=LORA, batch_size=9, max_steps=2, window_tokens=64)
    arch, adapter = model.architecture, shape_adapter(model.architecture, LORA)
    groups = load_training(data, model.tokenizer, FinetuneConfig(), max_length=512).groups
    workload, itemsize = Workload.of(groups, 9, config.max_microbatch_tokens), DTYPES[dtype].itemsize
    packed = can_pack(DTYPES[dtype], CPU)

    def needs(room: float, one_copy: bool) -> int:
        plan = JobPlans(arch, adapter, workload, itemsize=itemsize).fit(room).plan
        parts = training_bytes(
            arch, plan, adapter.flat.numel(), microbatch_tokens=workload.num_tokens, window_tokens=64, itemsize=itemsize,
            packed=packed, one_copy=one_copy,
        )
        return sum(parts.values()) - parts["weights"]

    def have(available: int | None) -> None:
        monkeypatch.setattr(finetuning, "available_bytes", lambda device: available)
        model.weights.hold_one_copy(True)  # what an earlier run has left would count as memory that can be had

    once, least = needs(math.inf, True), needs(0, True)
    cases = {"plenty": None, "enough": needs(math.inf, False), "once": once, "little": (once + least) // 2}
    weights = {}
    for name, available in cases.items():
        have(available)
        events: list[str] = []
        result = finetuning.finetune(
            data, tmp_path / name, model=model, config=config, listen=lambda e, events=events: events.append(e.message)
        )
        again = [line for line in events if "of the matrix products again" in line]
        assert bool(again) == (name == "little")
        said = [line for line in events if line.startswith("each weight matrix is held once")]
        assert bool(said) == (packed and name in ("once", "little"))
        assert (model.weights.copied_bytes > 0) == (packed and name in ("plenty", "enough"))
        weights[name] = result.adapter.flat.float()
    for name in cases:
        distance = torch.linalg.vector_norm(weights[name] - weights["plenty"]) / torch.linalg.vector_norm(weights["plenty"])
        assert distance < {"float32": 1e-3, "bfloat16": 0.05}[dtype]
    for refused, available in ((replace(config, deterministic=True), cases["little"]), (config, least - 1)):
        have(available)
        with pytest.raises(CapacityError, match="not enough memory"):
            finetuning.finetune(data, tmp_path / "refused", model=model, config=refused)


def test_copies_in_memory_can_be_had_back(
    directories: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that an earlier job has left with packed copies needs no more memory for them, and can give them back."""
    if not can_pack(torch.float32, CPU):
        pytest.skip("this processor has no packed layout")
    model = load_model(str(directories["llama"]), device="cpu", dtype="float32")
    config = FinetuneConfig(lora=LORA, batch_size=9, max_steps=1, window_tokens=64)
    finetuning.finetune(data, tmp_path / "first", model=model, config=config)
    held, asked = model.weights.copied_bytes, []
    assert held > 0
    monkeypatch.setattr(finetuning, "require_memory", lambda needed, available: asked.append((needed, available)))
    monkeypatch.setattr(finetuning, "available_bytes", lambda device: 10 * GIB)
    finetuning.finetune(data, tmp_path / "second", model=model, config=config)
    needed, available = asked[0]
    assert available == 10 * GIB + held and needed["packed copies of them"] >= held
    assert model.weights.copied_bytes == held


# --- how often an engine holds weights ---


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_holds_copies_where_memory_allows(directories: dict[str, Path], dtype: str, training: bool) -> None:
    weights = load_weights(Checkpoint(directories["llama"]), dtype=DTYPES[dtype], device=CPU)
    if not can_pack(DTYPES[dtype], CPU):
        assert settle_copies(weights, 0, training=training) is None
        return
    needed = packed_bytes(weights.architecture, weights.dtype.itemsize, training=training)
    assert needed < packed_bytes(weights.architecture, weights.dtype.itemsize) or training
    for free, layout in ((None, "packed"), (2 * needed, "packed"), (2 * needed - 2, "held once"), (0, "held once")):
        line = settle_copies(weights, free, training=training)
        assert weights.layout == layout
        said = {"packed": "packed copies of the weights: up to", "held once": "each weight matrix is held once: "}
        assert line is not None and line.startswith(said[layout])
    weights.hold_one_copy(False)
    for each in weights.products:
        each.prepare() if isinstance(each, PackedHead) else each.prepare(backward=training)
    held = weights.copied_bytes
    assert held > 0
    settle_copies(weights, max(0, 2 * (needed - held)), training=training)
    assert (weights.layout, weights.copied_bytes) == ("packed", held), "what is held already needs no more memory"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_loaded_as_an_engine_will_have_it(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """By the memory that there is, so that a large model is not packed in vain; whoever knows better says it."""
    if not can_pack(DTYPES[dtype], CPU):
        pytest.skip("this processor has no packed layout")
    arch, itemsize = Checkpoint(directories["llama"]).architecture, DTYPES[dtype].itemsize
    enough = weight_bytes(arch, itemsize) + packed_bytes(arch, itemsize) / 0.3
    for available, layout in ((None, "packed"), (enough + 64, "packed"), (enough - 64, "held once"), (0, "held once")):
        monkeypatch.setattr(memory, "available_bytes", lambda device, available=available: available)
        model = load_model(str(directories["llama"]), device="cpu", dtype=dtype)
        assert model.weights.layout == layout
        assert model.weights.copied_bytes == 0
    assert load_model(str(directories["llama"]), device="cpu", dtype=dtype, one_copy=False).weights.layout == "packed"
    plain = load_model(str(directories["llama"]), device="cpu", dtype="float64")
    assert plain.weights.layout == "plain"


def test_an_engine_counts_what_its_pool_leaves(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_pack(torch.float32, CPU):
        pytest.skip("this processor has no packed layout")
    model = load_model(str(directories["llama"]), device="cpu", dtype="float32")
    needed = packed_bytes(model.architecture, 4)
    pool = 64 * block_bytes(model.architecture, 16, 4)
    for free, layout in ((2 * needed, "packed"), (2 * needed - 8, "held once")):
        monkeypatch.setattr(memory, "available_bytes", lambda device, free=free: pool + free)
        lines: list[str] = []
        config = EngineConfig(memory_bytes=pool, block_tokens=16)
        engine = engine_module.Engine(model, config, latency=LatencyModel({}), report=lines.append)
        assert model.weights.layout == layout and sum("packed" in line for line in lines) == 1, lines
        engine.close()


def test_tokens_and_gradients_do_not_need_copies(directories: dict[str, Path], data: Path) -> None:
    """The same model with packed copies and without: the same to rounding."""
    trainer = make_trainer(directories["qwen3"], "float32")
    weights, groups = trainer.model.weights, groups_of(trainer, data)
    found = {}
    for one_copy in (False, True):
        weights.hold_one_copy(one_copy)
        logits = Generator(trainer.model).logits(range(40))
        weights.hold_one_copy(one_copy)  # the generator's engine has chosen by the memory that there is
        assert trainer.adapter.grad is not None
        trainer.adapter.grad.zero_()
        trainer.forward_backward(groups, 0)
        found[one_copy] = (logits, trainer.adapter.grad.clone())
    for one, several in zip(found[True], found[False], strict=True):
        assert torch.allclose(one, several, rtol=1e-4, atol=1e-5)


def test_a_resumed_job_gets_the_same_plan(directories: dict[str, Path], data: Path, tmp_path: Path) -> None:
    model = load_model(str(directories["llama"]), device="cpu", dtype="float32")
    plans: dict[bool, list[str]] = {}
    config = FinetuneConfig(lora=LORA, batch_size=9, max_steps=1, window_tokens=64, activation_memory=0.7)
    for resume in (False, True):
        lines = plans.setdefault(resume, [])
        finetuning.finetune(
            data, tmp_path / "job", model=model, config=config, resume=resume,
            listen=lambda event, lines=lines: lines.append(event.message),
        )
        config = finetune_config_from_dict(json.loads((tmp_path / "job" / "job.json").read_text())["settings"])
    chosen = {resume: [line for line in lines if "of the matrix products again" in line] for resume, lines in plans.items()}
    assert len(chosen[False]) == 1
    assert chosen[True] == chosen[False]


# --- what there is ---

MEMINFO = "MemTotal:       24689764 kB\nMemFree:          314572 kB\nMemAvailable:   1048576 kB\nBuffers:               0 kB\n"


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A directory with a meminfo of 1 GiB available and an empty control group."""
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def limit(system: Path, maximum: str, current: str, stat: str | None = None) -> None:
    (system / "cgroup" / "memory.max").write_text(f"{maximum}\n")
    (system / "cgroup" / "memory.current").write_text(f"{current}\n")
    if stat is not None:
        (system / "cgroup" / "memory.stat").write_text(stat)


def host_available(system: Path) -> int | None:
    return _host_available(system / "meminfo", system / "cgroup")


def test_meminfo_alone(system: Path) -> None:
    assert host_available(system) == GIB


@pytest.mark.parametrize(("maximum", "current", "expected"), [
    (str(GIB), str(GIB // 4), GIB - GIB // 4), (str(8 * GIB), "0", GIB), ("max", "12345", GIB), (str(GIB), str(2 * GIB), -GIB),
    ("", "", GIB), ("garbage", "1", GIB),
])
def test_the_control_group_may_leave_less(system: Path, maximum: str, current: str, expected: int) -> None:
    limit(system, maximum, current)
    assert host_available(system) == expected


@pytest.mark.parametrize(("stat", "reclaimable"), [
    (f"anon 5\nfile {GIB}\ninactive_file {GIB // 4}\nactive_file 7\n", GIB // 4), ("anon 5\n", 0), ("half a li", 0), ("", 0),
])
def test_file_cache_counts_as_free(system: Path, stat: str, reclaimable: int) -> None:
    """Reading a model's files fills a container's memory.current with pages that the kernel gives back."""
    limit(system, str(GIB), str(GIB // 2), stat)
    assert host_available(system) == GIB // 2 + reclaimable


def test_without_meminfo_nothing_is_known(system: Path) -> None:
    (system / "meminfo").unlink()
    assert host_available(system) is None


def test_meminfo_without_the_line(system: Path) -> None:
    (system / "meminfo").write_text("MemTotal: 1 kB\n")
    assert host_available(system) is None
    limit(system, "4096", "1024")
    assert host_available(system) == 3072


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux only")
def test_this_machine_has_memory() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    found = available_bytes(torch.device("cpu"))
    assert found is not None
    assert 0 < found < total


# --- the refusal ---


def test_enough_memory_passes() -> None:
    require_memory({"weights": 3, "workspace": 4}, 7)
    require_memory({"weights": 1 << 60}, None)


def test_too_little_memory_names_every_part() -> None:
    with pytest.raises(CapacityError) as caught:
        require_memory({"weights": 3 * GIB, "kept activations": GIB // 4}, 2 * GIB)
    assert str(caught.value) == (
        "not enough memory: 3.25 GiB are needed (weights 3.00, kept activations 0.25) and 2.00 GiB are available; lower "
        "max_microbatch_tokens, or use a smaller model or dtype"
    )
    assert caught.value.param == "max_microbatch_tokens"
    with pytest.raises(CapacityError):
        require_memory({"weights": 8}, 7)
