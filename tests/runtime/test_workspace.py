"""A pass over packed weights takes a product where the library left it; without a reader of the workspace nothing is copied."""

from __future__ import annotations

import pytest
import torch

from coserve import Generator, LoadedModel, load_model
from coserve.model.linear import PackedLinear
from coserve.runtime.executor import Executor
from coserve.runtime.memory import BoundProgram
from tests.tiny_directory import build_tiny_directory
from tests.tiny_engine import prompt, random_adapter

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN here")
MERGED_PRODUCTS = 4
"""Of a layer: q, k and v; o; gate and up; down. Without an adapter behind it the last one is added to the layer's output."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = tmp_path_factory.mktemp("model") / "m"
    build_tiny_directory(directory)
    return load_model(str(directory), device="cpu", dtype="float32")


@pytest.mark.parametrize("rank", [0, 4])
def test_products_have_the_same_bits_whether_they_are_copied_or_not(
    model: LoadedModel, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(model, random_adapter(model, rank)) if rank else Generator(model)
    put = BoundProgram.put
    taken: list[int] = []

    def counted(self: BoundProgram, storage: int, rows: torch.Tensor) -> None:
        taken.extend([storage] if storage in self.products else [])
        put(self, storage, rows)

    monkeypatch.setattr(BoundProgram, "put", counted)
    found = generator.logits(prompt(40))
    assert len(taken) == (MERGED_PRODUCTS if rank else MERGED_PRODUCTS - 1) * model.architecture.num_layers
    taken.clear()
    execute = Executor.execute
    monkeypatch.setattr(Executor, "execute", lambda *args, workspace_read: execute(*args))
    assert torch.equal(generator.logits(prompt(40)), found) and not taken


def test_a_pass_that_fails_leaves_nothing_of_its_own_in_the_program(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(model)
    want = generator.logits(prompt(9))
    bounds: list[BoundProgram] = []
    product, clear = PackedLinear.product, BoundProgram.clear

    def failing(self: PackedLinear, x: torch.Tensor) -> torch.Tensor | None:
        if x.shape[1] == model.architecture.intermediate_size:
            raise MemoryError
        return product(self, x)

    def seen(self: BoundProgram) -> None:
        clear(self)
        bounds.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(PackedLinear, "product", failing)
        patch.setattr(BoundProgram, "clear", seen)
        with pytest.raises(MemoryError):
            generator.logits(prompt(9))
    (bound,) = bounds
    for call, (_, _, _, outs, ins) in zip(bound.program.calls, bound.calls, strict=True):
        assert all(have is bound.tensors[number] for have, number in zip(outs, call.outs, strict=True))
        assert all(have is bound.tensors[number] for have, number in zip(ins, call.ins, strict=True))
    assert torch.equal(generator.logits(prompt(9)), want)
