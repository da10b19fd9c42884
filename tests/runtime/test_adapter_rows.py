"""What a pass, captured or not, knows of its rows' adapters: a tensor of slots that is written anew, and memory that stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coserve.kernels.triton import segments
from coserve.kernels.triton.segments import NO_SLOT, TRAINING
from coserve.runtime.adapters import AdapterRows, AdapterSlots
from tests.played_segments import play_slots
from tests.runtime.test_cache import make_adapter, make_slots

NAMES = ("q_proj.lora_A", "v_proj.lora_A"), ("q_proj.lora_B", "v_proj.lora_B")


@pytest.fixture(autouse=True)
def by_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    play_slots(monkeypatch)


def slots_with(*ranks: int) -> AdapterSlots:
    slots = make_slots(max_slots=4, dtype=torch.float32)
    for number, rank in enumerate(ranks):
        slots.place(number, make_adapter(number, torch.float32, r=rank, alpha=3.0))
    return slots


def product(rows: AdapterRows, x: Tensor, layer: int = 1) -> list[Tensor]:
    """What is added to q and v."""
    down, up = (rows.factors(layer, names) for names in NAMES)
    outs = [torch.zeros(x.shape[0], stack.shape[1]) for stack in up.stacks if stack is not None]
    segments.segment_pairs(outs, None, x, down, up, accumulate=True)
    return outs


def test_the_same_rows_serve_any_batch_of_their_size() -> None:
    """As a captured pass does: only the slots' values change, and adapters come into the memory that is there."""
    slots = slots_with(4, 8)
    static = torch.full((5,), NO_SLOT, dtype=torch.int32)
    rows = AdapterRows(slots, static)
    first = rows.factors(1, NAMES[0])
    assert first.stacks[0] is not None
    x = torch.randn(5, first.stacks[0].shape[2], generator=torch.Generator().manual_seed(0))
    assert not any(out.any() for out in product(rows, x))
    moves = slots.moves
    for batch in ([0, 1, NO_SLOT, 1, 0], [1, 1, 1, 1, 1], [NO_SLOT, NO_SLOT, 0, NO_SLOT, NO_SLOT]):
        static.copy_(torch.tensor(batch, dtype=torch.int32))
        for site, out in enumerate(product(rows, x)):
            for row, slot in enumerate(batch):
                alone = torch.zeros_like(out[row])
                if slot != NO_SLOT:
                    own = make_adapter(slot, torch.float32, r=(4, 8)[slot], alpha=3.0)
                    a, b = (own.factor(1, names[site]) for names in NAMES)
                    assert a is not None and b is not None
                    alone = b.scale * (b.matrix @ (a.matrix @ x[row]))
                torch.testing.assert_close(out[row], alone, rtol=1e-4, atol=1e-5)
    slots.remove(1)
    slots.place("other", make_adapter(7, torch.float32, r=8))
    assert slots.moves == moves
    assert slots.factor(1, NAMES[0][0]).data_ptr() == first.stacks[0].data_ptr()  # type: ignore[union-attr]


def test_memory_that_moves_is_told() -> None:
    slots = slots_with(4)
    before = slots.moves
    slots.place("second", make_adapter(1, torch.float32, r=4))
    grown = slots.moves
    assert grown > before, "one more slot"
    slots.place("third", make_adapter(2, torch.float32, r=12))
    assert slots.moves > grown, "a larger rank"
    (stack, _), _ = slots.of_sites(0, NAMES[1])
    assert stack is not None and stack.shape[2] == 16, "what is remembered of a layer follows"


def test_a_training_windows_rows_come_behind() -> None:
    slots, training = slots_with(4), make_adapter(5, torch.float32, r=2, target_modules=("v_proj",))
    rows = AdapterRows(slots, torch.tensor([0, NO_SLOT], dtype=torch.int32)).beside(training, 3)
    assert rows.slots.tolist() == [0, NO_SLOT, TRAINING, TRAINING, TRAINING]
    factors = rows.factors(0, NAMES[1])
    own = training.factor(0, "v_proj.lora_B")
    assert own is not None and factors.training[0] is None
    assert factors.training[1] is own.matrix and factors.scales == [1.0, own.scale]
