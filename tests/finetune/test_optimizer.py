"""Schedules against transformers' own, and the sliced flat AdamW against torch.optim.AdamW with clip_grad_norm_."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import get_scheduler

from coserve.config.settings import OptimizerConfig, Schedule
from coserve.core import ConfigError
from coserve.finetune.optimizer import FlatAdamW, learning_rate

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SIZE = 103


def noise(count: int, *, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(count, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def config(**settings: float) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": 1e-2, "weight_decay": 0.1, "slice_elements": 10, **settings})  # type: ignore[arg-type]


# --- schedule -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 50, 60])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_rates_are_those_of_transformers(schedule: Schedule, warmup_steps: int) -> None:
    name = "constant_with_warmup" if schedule == "constant" and warmup_steps else schedule
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=50)
    ours = OptimizerConfig(learning_rate=3e-4, schedule=schedule, warmup_steps=warmup_steps)
    for step in range(50):
        assert learning_rate(ours, step, 50) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18), step
        optimizer.step()
        theirs.step()


def test_rates_by_hand() -> None:
    linear = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=2)
    assert [learning_rate(linear, step, 6) for step in range(7)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = OptimizerConfig(learning_rate=1.0, schedule="cosine")
    assert [round(learning_rate(cosine, step, 4), 3) for step in range(5)] == [1.0, 0.854, 0.5, 0.146, 0.0]


# --- AdamW ----------------------------------------------------------------------------------------------------------------


class Reference:
    """torch.optim.AdamW over several parameters whose concatenation is the flat one."""

    def __init__(self, start: Tensor, cfg: OptimizerConfig, sizes: Sequence[int]) -> None:
        self.cfg = cfg
        self.parameters = [torch.nn.Parameter(part.clone()) for part in start.split(list(sizes))]
        self.optimizer = torch.optim.AdamW(
            self.parameters, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, weight_decay=cfg.weight_decay, foreach=False
        )

    def step(self, grad: Tensor, rate: float) -> float:
        for parameter, part in zip(self.parameters, grad.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = part.clone()
        limit = self.cfg.max_grad_norm if self.cfg.max_grad_norm > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        return float(norm)

    @property
    def flat(self) -> Tensor:
        return torch.cat([p.detach() for p in self.parameters])


def drive(ours: FlatAdamW, steps: range, reference: Reference | None = None) -> None:
    """Steps with gradients that are a function of the step's number; every third is large enough to be clipped."""
    for step in steps:
        gradient = noise(SIZE, seed=100 + step, dtype=ours.grad.dtype) * (5.0 if step % 3 == 0 else 0.01)
        ours.grad.copy_(gradient)
        norm = ours.clip()
        assert norm == pytest.approx(float(gradient.norm()), rel=1e-6)
        ours.step(1e-2 / (1 + step))
        if reference is not None:
            assert reference.step(gradient, 1e-2 / (1 + step)) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("slice_elements", [1, 10, SIZE, 4096])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_ten_steps_equal_torch(dtype: torch.dtype, slice_elements: int, max_grad_norm: float) -> None:
    cfg = config(slice_elements=slice_elements, max_grad_norm=max_grad_norm)
    working = noise(SIZE, seed=0, dtype=dtype)
    reference = Reference(working, cfg, (40, 13, 50))
    ours = FlatAdamW(cfg, working, torch.zeros(SIZE, dtype=dtype))
    drive(ours, range(10), reference)
    tolerance = 2e-6 if dtype == F32 else 1e-14
    assert torch.allclose(working, reference.flat, rtol=0, atol=tolerance)
    assert not torch.allclose(working, noise(SIZE, seed=0, dtype=dtype), atol=1e-3), "nothing was learnt"
    assert ours.num_updates == 10
    assert ours.grad.abs().max() == 0, "the gradient is zero for the next batch"
    assert ours.master is working


def test_every_setting_counts() -> None:
    """The comparison above would notice a setting that is ignored."""

    def after(**settings: float) -> Tensor:
        working = noise(SIZE, seed=0)
        drive(FlatAdamW(config(**settings), working, torch.zeros(SIZE)), range(3))
        return working

    base = after()
    for change in ({"beta1": 0.5}, {"beta2": 0.9}, {"eps": 1e-2}, {"weight_decay": 0.0}, {"max_grad_norm": 0.0}):
        assert (after(**change) - base).abs().max() > 1e-6, change


def test_clipping_scales_to_the_limit_only_from_above() -> None:
    for size, limit in ((0.5, 1.0), (4.0, 1.0), (4.0, 0.0)):
        grad = torch.full((4,), size / 2)
        ours = FlatAdamW(config(max_grad_norm=limit), torch.zeros(4), grad)
        assert ours.clip() == pytest.approx(size)
        assert float(grad.norm()) == pytest.approx(min(size, limit or size), rel=1e-5)


def test_low_precision_working_copy_follows_a_float32_master() -> None:
    """Updates far below bfloat16's resolution add up in the master; the working copy is its rounding."""
    cfg = config(max_grad_norm=0.0, weight_decay=0.0)
    working = noise(SIZE, seed=0, dtype=BF16)
    start = working.clone()
    ours = FlatAdamW(cfg, working, torch.zeros(SIZE))
    reference = Reference(start.float(), cfg, (SIZE,))
    assert ours.master.dtype == F32
    for step in range(40):
        gradient = noise(SIZE, seed=7).abs() + 0.1
        ours.grad.copy_(gradient)
        ours.step(1e-4)
        reference.step(gradient, 1e-4)
        assert torch.equal(working, ours.master.bfloat16())
        if step == 0:
            assert (working == start).double().mean() > 0.8, "the test wants steps below the resolution"
    assert torch.allclose(ours.master, reference.flat, rtol=0, atol=1e-6)
    assert (working != start).double().mean() > 0.5


def test_slices_are_told_and_the_update_counts_once() -> None:
    working, cfg = noise(SIZE, seed=0), config()
    told: list[tuple[int, int]] = []
    ours = FlatAdamW(cfg, working, noise(SIZE, seed=1), changed=lambda start, end: told.append((start, end)))
    before = working.clone()
    ours.update(0, 10, 1e-2)
    assert torch.equal(working[10:], before[10:]), "a slice touches its own elements only"
    assert (working[:10] != before[:10]).all()
    assert ours.num_updates == 0
    ours.step(1e-2)
    assert ours.num_updates == 1
    assert told == [(0, 10), *pairwise([*range(0, SIZE, 10), SIZE])]
    ours.load(ours.state(), 1)
    assert told[-1] == (0, SIZE)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_state_round_trip(dtype: torch.dtype) -> None:
    """A fresh optimizer with the state goes on exactly where the first one went on."""
    cfg = config()
    first = FlatAdamW(cfg, noise(SIZE, seed=0, dtype=dtype), torch.zeros(SIZE))
    drive(first, range(4))
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    updates = first.num_updates
    assert set(state) == {"master", "exp_avg", "exp_avg_sq"}
    assert all(tensor.dtype == F32 for tensor in state.values())
    drive(first, range(4, 8))

    second = FlatAdamW(cfg, torch.zeros(SIZE, dtype=dtype), torch.zeros(SIZE))
    second.load(state, updates)
    assert torch.equal(second.working, state["master"].to(dtype))
    state["master"].zero_()  # the state was copied, not adopted
    drive(second, range(4, 8))
    for name, tensor in first.state().items():
        assert torch.equal(second.state()[name], tensor), name
    assert torch.equal(second.working, first.working)
    assert second.num_updates == first.num_updates == 8


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("ratio", "steps"), [(0.1, 3), (0.5, 13), (1.0, 25), (0.001, 1)])
def test_a_warm_up_by_ratio_is_one_by_steps(schedule: Schedule, ratio: float, steps: int) -> None:
    by_ratio = OptimizerConfig(learning_rate=1e-3, schedule=schedule, warmup_ratio=ratio)
    by_steps = OptimizerConfig(learning_rate=1e-3, schedule=schedule, warmup_steps=steps)
    rates = [[learning_rate(config, step, 25) for step in range(25)] for config in (by_ratio, by_steps)]
    assert rates[0] == rates[1]


def test_a_warm_up_is_given_once() -> None:
    with pytest.raises(ConfigError, match="warmup_ratio: give it or warmup_steps, not both"):
        OptimizerConfig(warmup_steps=3, warmup_ratio=0.1)
    with pytest.raises(ConfigError, match=r"warmup_ratio: must be in \[0, 1\]"):
        OptimizerConfig(warmup_ratio=1.5)
