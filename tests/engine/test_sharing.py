"""A job that several engines share ends as on one, whoever dies where; requests go on while a member waits for others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coserve.cluster.steps import StepLimits
from coserve.config.settings import FinetuneConfig, LoraConfig, OptimizerConfig, SamplingConfig
from coserve.core import ConfigError, JobFailed
from coserve.finetune.datasets import load_training
from coserve.finetune.job import MetricsTable
from coserve.runtime.loaded import LoadedModel, load_model
from coserve.server.link import stepmessages
from coserve.server.link.stepmessages import (
    AdapterDigest,
    Applied,
    BlobPart,
    EnterJob,
    Offer,
    Pull,
    SealIds,
    StepBody,
    TakeId,
    WantPart,
)
from coserve.training.batchwork import BatchWork
from coserve.training.finetuning import finetune
from coserve.training.trainer import AdapterTrainer, sweep
from tests.step_crew import Crew, CrewMember, Watch
from tests.tiny_directory import build_tiny_directory, chat_lines, preference_lines, write_lines
from tests.tiny_engine import MakeEngine, prompt, tracked_engines

SFT = FinetuneConfig(
    max_steps=3, batch_size=6, max_microbatch_tokens=96, checkpoint_steps=2, seed=3, lora=LoraConfig(r=4, dropout=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
)
DPO = replace(SFT, objective="dpo", max_microbatch_tokens=130, lora=LoraConfig(r=8, target_modules=("q_proj", "down_proj")))
GREEDY = SamplingConfig(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shared")
    write_lines(directory / "sft.jsonl", chat_lines(20))
    write_lines(directory / "dpo.jsonl", preference_lines(12))
    write_lines(directory / "valid.jsonl", chat_lines(24)[20:])
    return directory


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    """In float64, so that the order of sums is all that differs, and hardly that."""
    torch.set_num_threads(1)
    return load_model(str(build_tiny_directory(directory / "model")), device="cpu", dtype="float64")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny gradients have several parts."""
    monkeypatch.setattr(stepmessages, "PART_BYTES", 9000)


@pytest.fixture
def engines(model: LoadedModel) -> Iterator[MakeEngine]:
    yield from tracked_engines(model)


@pytest.fixture(scope="module")
def whole(model: LoadedModel, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT by one process."""
    output = tmp_path_factory.mktemp("whole") / "out"
    finetune(directory / "sft.jsonl", output, model=model, config=SFT, validation=directory / "valid.jsonl")
    return output


def assert_equal(found: Path, wanted: Path, *, tolerance: float = 1e-6) -> None:
    """The same steps, each once, with losses and weights to `tolerance`."""
    rows, expected = (MetricsTable(path / "metrics.csv").rows() for path in (found, wanted))
    assert [row.step for row in rows] == [row.step for row in expected] == list(range(1, len(rows) + 1))
    for row, other in zip(rows, expected, strict=True):
        assert (row.tokens, row.learning_rate) == (other.tokens, other.learning_rate)
        assert row.train_mean_token_accuracy == pytest.approx(other.train_mean_token_accuracy)
        assert (row.train_loss, row.grad_norm) == pytest.approx((other.train_loss, other.grad_norm), rel=tolerance)
        assert row.valid_loss == (None if other.valid_loss is None else pytest.approx(other.valid_loss, rel=tolerance))
    tensors, others = (load_file(path / "adapter_model.safetensors") for path in (found, wanted))
    assert tensors.keys() == others.keys()
    for name, tensor in others.items():
        assert float((tensors[name] - tensor).norm()) <= tolerance * float(tensor.norm()), name


# --- the sum ---


@pytest.mark.full
@pytest.mark.parametrize("config", [SFT, DPO], ids=["sft", "dpo"])
@pytest.mark.parametrize("shares", [2, 3])
def test_sums_of_shares_are_the_whole_gradient(
    model: LoadedModel, directory: Path, tmp_path: Path, config: FinetuneConfig, shares: int
) -> None:
    """To the last digits of float64: the normalizer is the whole batch's, and dropout is keyed by example."""
    from_files = finetune(directory / f"{config.objective}.jsonl", tmp_path / "one", model=model, config=replace(
        config, max_steps=1, optimizer=OptimizerConfig(learning_rate=0.5)))
    assert from_files.adapter is not None
    groups = load_training(directory / f"{config.objective}.jsonl", model.tokenizer, config, max_length=65).groups[:6]

    def trainer() -> AdapterTrainer:
        return AdapterTrainer(model, config, start=from_files.adapter)

    one = trainer()
    wanted = one.forward_backward(groups, 5)
    others = [trainer() for _ in range(shares)]
    batches = [BatchWork(each, groups, 5, train=True, shared=True) for each in others]
    assert batches[0].num_microbatches >= shares
    for number in range(batches[0].num_microbatches):
        batches[number % shares].take(number)
    layers, total, counts = model.architecture.num_layers, torch.zeros_like(one.optimizer.grad), []
    for each, batch in zip(others, batches, strict=True):
        while batch.next is not None:
            micro = batch.begin()
            assert micro.state is not None
            lowest = layers if micro.forward_only else micro.plan.lowest_trained
            units = list(sweep(layers, lowest, micro.batch.num_tokens, 32, forward_only=micro.forward_only))
            forward = [unit for unit in units if unit.direction.value == "forward"]
            for unit in forward:
                each.executor.run(micro.state, unit, micro.adapter)
            batch.answer(micro)
            for unit in units[len(forward):]:
                each.executor.run(micro.state, unit, micro.adapter)
            batch.close(micro)
        assert batch.finished
        total += each.optimizer.grad
        counts.append(batch.take_counts())
        assert batch.take_counts().tokens == 0
    assert float((total - one.optimizer.grad).norm()) <= 1e-12 * float(one.optimizer.grad.norm())
    assert sum(each.loss for each in counts) == pytest.approx(wanted.loss, rel=1e-12)
    assert sum(each.tokens for each in counts) == wanted.num_tokens


# --- whole jobs ---


def test_two_members_end_as_one(engines: MakeEngine, directory: Path, tmp_path: Path, whole: Path) -> None:
    crew = Crew(directory / "sft.jsonl", tmp_path / "out", SFT, validation=directory / "valid.jsonl")
    crew.add("p", engines())
    crew.add("m1", engines())
    crew.finish()
    assert [member.handle.status for member in crew.members.values()] == ["succeeded", "succeeded"]
    assert_equal(tmp_path / "out", whole)
    assert not (tmp_path / "out-m1").exists(), "only the primary writes"
    assert crew.members["m1"].engine.adapters.names == (), "and publishes"
    assert crew.members["m1"].handle.trained_tokens > 0, "the other helped"


@pytest.mark.full
@pytest.mark.parametrize("config", [SFT, DPO], ids=["sft", "dpo"])
@pytest.mark.parametrize("others", [1, 2, 3])
def test_several_members_end_as_one(
    engines: MakeEngine, model: LoadedModel, directory: Path, tmp_path: Path, config: FinetuneConfig, others: int
) -> None:
    config, data = replace(config, max_steps=6), directory / f"{config.objective}.jsonl"
    finetune(data, tmp_path / "whole", model=model, config=config)
    crew = Crew(data, tmp_path / "out", config)
    for name in ("p", *(f"m{n}" for n in range(1, others + 1))):
        crew.add(name, engines())
    crew.finish()
    assert_equal(tmp_path / "out", tmp_path / "whole")
    assert all(member.handle.trained_tokens > 0 for member in crew.members.values())


@pytest.mark.full
@pytest.mark.parametrize("others", [1, 2])
def test_in_float32_too(
    directory: Path, tmp_path: Path, others: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The sums' order is another, and Adam divides by their size: losses and gradients to 1e-6, weights as beside requests."""
    model = load_model(str(directory / "model"), device="cpu", dtype="float32")
    finetune(directory / "sft.jsonl", tmp_path / "whole", model=model, config=SFT)
    source = tracked_engines(model)
    make = next(source)
    crew = Crew(directory / "sft.jsonl", tmp_path / "out", SFT)
    for name in ("p", *(f"m{n}" for n in range(1, others + 1))):
        crew.add(name, make())
    crew.finish()
    rows, expected = (MetricsTable(path / "metrics.csv").rows() for path in (tmp_path / "out", tmp_path / "whole"))
    assert (rows[0].train_loss, rows[0].grad_norm) == pytest.approx((expected[0].train_loss, expected[0].grad_norm), rel=1e-6)
    assert_equal(tmp_path / "out", tmp_path / "whole", tolerance=1e-4)
    assert next(source, None) is None


# --- deaths ---


def at(kind: type, number: int = 1, *, up: bool = True, blob: str = "", name: str = "m1") -> Watch:
    """Kills `name` at its `number`-th message of a kind, before that is delivered. blob: the kind of an Offer's."""
    count = 0

    def watch(crew: Crew, member: CrewMember, is_up: bool, body: StepBody) -> bool:
        nonlocal count
        if member.name != name or is_up != up or not isinstance(body, kind):
            return True
        if not isinstance(body, Offer) or body.kind == blob:
            count += 1
            if count == number:
                crew.kill(name)
        return True

    return watch


POINTS = {
    "before it enters": at(EnterJob),
    "before it has the state": at(Offer, up=False, blob="state"),
    "while it reads the state": at(BlobPart, up=False),
    "before it pulls": at(Pull),
    "before it is given work": at(TakeId, up=False),
    "before it seals": at(SealIds, up=False),
    "when it has sealed, and nobody has read it": at(Offer, blob="seal"),
    "while its seal is read": at(WantPart, up=False),
    "before the total": at(Offer, up=False, blob="total"),
    "while it reads the total": at(BlobPart, 2, up=False),
    "after its update": at(Applied),
    "after its update, without a digest": at(AdapterDigest),
    "after its second update": at(Applied, 2),
}


def killed(engines: MakeEngine, directory: Path, output: Path, watch: Watch) -> Crew:
    """A job of three, of whom one dies."""
    crew = Crew(directory / "sft.jsonl", output, SFT, watch=watch, validation=directory / "valid.jsonl")
    for name in ("p", "m1", "m2"):
        crew.add(name, engines())
    crew.drive()
    crew.drive(lambda: crew.members["m2"].handle.finished)
    crew.members["m1"].handle.cancel()
    while not crew.members["m1"].engine.idle:
        crew.members["m1"].engine.step()
    return crew


@pytest.mark.full
@pytest.mark.parametrize("point", POINTS)
def test_a_member_that_dies_changes_nothing(
    engines: MakeEngine, directory: Path, tmp_path: Path, whole: Path, point: str
) -> None:
    crew = killed(engines, directory, tmp_path / "out", POINTS[point])
    assert crew.members["m1"].dead, "it never came to that point"
    assert crew.members["p"].handle.status == "succeeded"
    assert_equal(tmp_path / "out", whole)


@pytest.mark.full
def test_a_member_that_dies_in_a_micro_batch_changes_nothing(
    engines: MakeEngine, directory: Path, tmp_path: Path, whole: Path
) -> None:
    crew = Crew(directory / "sft.jsonl", tmp_path / "out", SFT, validation=directory / "valid.jsonl")
    for name in ("p", "m1"):
        crew.add(name, engines())
    member = crew.members["m1"]
    crew.drive(lambda: member.handle.trained_tokens > 0 and bool(member.engine.jobs.microbatches))
    held = set(crew.coordinator.machine._members["m1"].holds)
    assert held
    crew.kill("m1")
    crew.drive()
    assert_equal(tmp_path / "out", whole)
    member.handle.cancel()
    while not member.engine.idle:
        member.engine.step()


@pytest.mark.full
@pytest.mark.parametrize("kind", [Pull, SealIds, Offer, Applied, AdapterDigest])
def test_a_primary_that_dies_is_followed_by_another_epoch(
    engines: MakeEngine, directory: Path, tmp_path: Path, whole: Path, kind: type
) -> None:
    """The job goes on from its checkpoint elsewhere; what the first crew still says, the second one's coordinator drops."""
    watch = at(kind, 6 if kind is Pull else 2, up=kind is not SealIds, blob="seal", name="p")
    crew = Crew(directory / "sft.jsonl", tmp_path / "out", SFT, watch=watch, validation=directory / "valid.jsonl")
    for name in ("p", "m1"):
        crew.add(name, engines())
    crew.drive(lambda: crew.members["p"].dead)
    late = [*crew.members["m1"].up]
    first = crew.members["p"].engine
    first.jobs.writer.submit(lambda: None).result()
    again = Crew(directory / "sft.jsonl", tmp_path / "out", SFT, epoch=2, validation=directory / "valid.jsonl")
    again.add("p", engines(), resume=True)
    again.add("m1", engines())
    for data in late:
        assert again.coordinator.receive(data, lambda reply: None) is None
    again.finish()
    assert_equal(tmp_path / "out", whole)
    crew.coordinator.close("it is gone")
    crew.drive(lambda: crew.members["m1"].handle.finished)
    first.jobs.fail_all(JobFailed("its process is gone"))


@pytest.mark.full
def test_a_late_member_is_replaced_and_its_late_seal_is_dropped(
    engines: MakeEngine, directory: Path, tmp_path: Path, whole: Path
) -> None:
    """Its engine stands still while it holds a micro-batch; when it goes on, what it has is of an older round."""
    now = [0.0]
    crew = Crew(
        directory / "sft.jsonl", tmp_path / "out", SFT, validation=directory / "valid.jsonl", clock=lambda: now[0],
        limits=StepLimits(lost_s=1e9, late_s=5.0),
    )
    for name in ("p", "m1"):
        crew.add(name, engines())
    slow, machine = crew.members["m1"], crew.coordinator.machine
    crew.drive(lambda: bool(slow.engine.jobs.microbatches))
    slow.dead = True  # for a while
    step = machine.step
    crew.drive(lambda: not any(m.holds for n, m in machine._members.items() if n == "p") and not machine._free
               and crew.members["p"].live is not None and machine._members["p"].wants)
    now[0] += 6.0
    crew.coordinator.tick()
    assert machine.round > 0 and any("late" in note for note in crew.notes)
    crew.drive(lambda: machine.step > step)
    slow.dead = False
    crew.finish()
    assert_equal(tmp_path / "out", whole)
    assert slow.handle.status == "succeeded", "it takes part again"


@pytest.mark.full
def test_an_adapter_that_differs_is_noticed_and_what_it_sealed_runs_again(
    engines: MakeEngine, directory: Path, tmp_path: Path, whole: Path
) -> None:
    crew = Crew(directory / "sft.jsonl", tmp_path / "out", SFT, validation=directory / "valid.jsonl")
    for name in ("p", "m1"):
        crew.add(name, engines())
    original = crew.members["m1"].exchange.told_update

    def told(step: int, values: torch.Tensor) -> None:
        if step == 0:
            values[0] += 0.25  # in place: the weights themselves
        original(step, values)

    crew.members["m1"].exchange.told_update = told  # type: ignore[method-assign]
    crew.drive()
    crew.drive(lambda: crew.members["m1"].handle.finished)
    assert_equal(tmp_path / "out", whole)
    handle = crew.members["m1"].handle
    assert handle.status == "failed"
    with pytest.raises(JobFailed, match="differs from the primary's after step 1"):
        handle.result()
    assert any("goes on without the job" in note for note in crew.notes)


@pytest.mark.full
def test_members_join_and_leave_while_the_job_runs(
    engines: MakeEngine, directory: Path, tmp_path: Path, model: LoadedModel
) -> None:
    config = replace(SFT, max_steps=30)
    finetune(directory / "sft.jsonl", tmp_path / "whole", model=model, config=config)
    crew = Crew(directory / "sft.jsonl", tmp_path / "out", config)
    crew.add("p", engines())
    crew.drive(lambda: crew.members["p"].handle.step >= 2)
    late = crew.add("m1", engines())
    crew.drive(lambda: late.handle.trained_tokens > 0)
    assert any("m1 has joined the job at step" in note for note in crew.notes)
    late.handle.hand_over()
    crew.drive(lambda: late.handle.finished)
    assert late.handle.status == "handed_over" and not late.engine.jobs.jobs
    crew.drive(lambda: "m1" not in crew.coordinator.machine.members)
    assert not any("late" in note or "lost" in note for note in crew.notes), "it left at the end of its step"
    other = crew.add("m2", engines())
    crew.drive(lambda: crew.members["p"].handle.step >= 5 and "m2" in crew.coordinator.machine.active)
    other.engine.close()
    assert other.handle.status == "cancelled"
    crew.drive(lambda: "m2" not in crew.coordinator.machine.members)
    crew.drive()
    assert_equal(tmp_path / "out", tmp_path / "whole")


@pytest.mark.full
def test_a_job_that_is_handed_over_goes_on_with_another_crew(
    engines: MakeEngine, directory: Path, tmp_path: Path, whole: Path
) -> None:
    crew = Crew(directory / "sft.jsonl", tmp_path / "out", SFT, validation=directory / "valid.jsonl")
    for name in ("p", "m1"):
        crew.add(name, engines())
    crew.drive(lambda: crew.members["p"].handle.step == 1)
    crew.members["p"].handle.hand_over()
    crew.finish()
    assert [member.handle.status for member in crew.members.values()] == ["handed_over", "cancelled"]
    assert crew.members["p"].handle.step == 2, "at the end of its step"
    again = Crew(directory / "sft.jsonl", tmp_path / "out", SFT, epoch=2, validation=directory / "valid.jsonl")
    again.add("p", engines(), resume=True)
    again.add("m1", engines())
    again.finish()
    assert_equal(tmp_path / "out", whole)


# --- beside others, and refusals ---


@pytest.mark.full
def test_requests_go_on_while_a_member_waits_for_others(engines: MakeEngine, directory: Path, tmp_path: Path) -> None:
    crew = Crew(directory / "sft.jsonl", tmp_path / "out", SFT)
    for name in ("p", "m1"):
        crew.add(name, engines())
    crew.drive(lambda: crew.members["m1"].handle.trained_tokens > 0)
    waiting, began = crew.members["p"].engine, time.monotonic()
    crew.members["p"].dead = True  # nobody answers it
    while waiting.step():
        pass
    before = crew.members["p"].handle.trained_tokens
    outputs = waiting.generate([prompt(9), prompt(17)], GREEDY)
    assert [len(output.token_ids) for output in outputs] == [12, 12] and time.monotonic() - began < 30
    assert crew.members["p"].handle.trained_tokens == before, "it had nothing to train meanwhile"
    crew.members["p"].dead = False
    crew.finish()
    assert crew.members["p"].handle.status == "succeeded"


def test_a_deterministic_job_is_refused(engines: MakeEngine, directory: Path, tmp_path: Path) -> None:
    crew = Crew(directory / "sft.jsonl", tmp_path / "out", replace(SFT, deterministic=True))
    with pytest.raises(ConfigError, match="members: a deterministic job runs on one replica"):
        crew.add("p", engines())
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_a_member_with_other_data_is_sent_away(
    engines: MakeEngine, directory: Path, tmp_path: Path, whole: Path
) -> None:
    write_lines(tmp_path / "other.jsonl", chat_lines(21)[1:])
    crew = Crew(directory / "sft.jsonl", tmp_path / "out", SFT, validation=directory / "valid.jsonl")
    crew.add("p", engines())
    other = crew.add("m1", engines(), data=tmp_path / "other.jsonl")
    crew.drive(lambda: other.handle.finished)
    with pytest.raises(JobFailed, match="data_digest of this member is not the primary's"):
        other.handle.result()
    crew.drive()
    assert_equal(tmp_path / "out", whole)
