"""How many kernels a layer launches, counted on a device that computes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from coserve.config.settings import LoraConfig
from coserve.engine.device import EngineDevice
from tests.cuda_iterations import FakeJob, adapters, fake_device, fake_model, run_pass, spans
from tests.fake_cuda import fake_cuda, needs_fake_cuda

pytestmark = needs_fake_cuda
Action = Callable[[], object]


def decode(device: EngineDevice) -> Action:
    return lambda: run_pass(device, *spans(64))


def mixed(device: EngineDevice) -> Action:
    return lambda: run_pass(device, *spans(64, [(0, 300), (512, 700)]))


def decode_with_adapters(device: EngineDevice) -> Action:
    slots = adapters(device, [LoraConfig(r=8), LoraConfig(r=16)])
    return lambda: run_pass(device, *spans(64, slots=slots))


def fused(device: EngineDevice) -> Action:
    job = FakeJob(device)

    def run() -> None:
        job.state.forward_rows = [0] * job.layers
        run_pass(device, *spans(64), job.window(0, 512))

    return run


def forward(device: EngineDevice) -> Action:
    job = FakeJob(device)

    def run() -> None:
        job.state.forward_rows = [0] * job.layers
        job.run(job.forward(0, 512))

    return run


def large_forward(device: EngineDevice) -> Action:
    """Of more rows than those for which launches count."""
    job = FakeJob(device)

    def run() -> None:
        job.state.forward_rows = [0] * job.layers
        job.run(job.forward(0, 1024))

    return run


def backward(device: EngineDevice) -> Action:
    """The unit that zeroes the sums of keys and values."""
    job = FakeJob(device, lengths=(512,))
    job.sweep(512)

    def run() -> None:
        job.state.backward_row = [512] * job.layers
        job.backward(512)

    return run


def per_layer(prepare: Callable[[EngineDevice], Action], name: str = "Llama-3.1-8B") -> Counter[str]:
    """Launches of a layer by name: those of two layers less those of one, of the second run, when everything is there."""
    counts = []
    for layers in (2, 1):
        with fake_cuda() as cuda:
            action = prepare(fake_device(fake_model(name, layers)))
            action()
            with cuda.counting() as found:
                action()
            counts.append(found)
    return counts[0] - counts[1]


@pytest.mark.parametrize(("prepare", "most"), [
    (decode, 10), (mixed, 12), (decode_with_adapters, 19), (fused, 22), (forward, 19), (large_forward, 25), (backward, 44),
])
def test_a_layer_launches_no_more_than_its_budget(prepare: Callable[[EngineDevice], Action], most: int) -> None:
    found = per_layer(prepare)
    assert found.total() <= most, found
