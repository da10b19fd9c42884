"""Copies of a device's tensors to the host for files, with the streams and their order played."""

from __future__ import annotations

import ast
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from coserve import hostcopy
from coserve.config.settings import FinetuneConfig, LoraConfig
from coserve.engine import jobs
from coserve.finetune.checkpoints import Cursor, save_checkpoint
from tests.tiny_directory import chat_lines, write_lines
from tests.tiny_engine import MakeEngine, drive

SOURCE = Path(hostcopy.__file__).parent
DEVICE = torch.device("cpu")


class PlayedStreams:
    """A device whose copies arrive no earlier than somebody waits for them. log: what happened in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
        self.log: list[str] = []
        self.queued: list[tuple[Tensor, Tensor]] = []
        self.present = "main"
        self.pinned: list[Tensor] = []
        played = self

        class Stream:
            def wait_event(self, made: str) -> None:
                played.log.append(f"side waits for {made}")

        class Event:
            def __init__(self, *, blocking: bool) -> None:
                assert blocking, "the waiting thread would spin"

            def record(self, stream: Stream) -> None:
                self.count = len(played.queued)

            def synchronize(self) -> None:
                for chunk, source in played.queued[: self.count]:
                    chunk.copy_(source)
                played.queued[: self.count] = [(torch.empty(0), torch.empty(0))] * self.count

        @contextlib.contextmanager
        def stream(side: Stream) -> Iterator[None]:
            played.present = "side"
            yield
            played.present = "main"

        def queue(chunk: Tensor, source: Tensor) -> None:
            assert played.present == "side" and any(chunk.data_ptr() == pin.data_ptr() for pin in played.pinned)
            assert not any(chunk.data_ptr() == other.data_ptr() for other, _ in played.queued if other.numel()), "overwritten"
            played.log.append("copy")
            played.queued.append((chunk, source))

        def pinned(size: int) -> Tensor:
            played.pinned.append(torch.full((size,), 255, dtype=torch.uint8))
            return played.pinned[-1]

        for name, value in {"Stream": lambda device: Stream(), "Event": Event, "stream": stream}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(hostcopy, "_queue", queue)
        monkeypatch.setattr(hostcopy, "_pinned", pinned)
        monkeypatch.setattr(hostcopy, "CHUNK_BYTES", chunk_bytes)
        hostcopy._side_stream.cache_clear()


@pytest.fixture(autouse=True)
def _no_stream_stays() -> Iterator[None]:
    yield
    hostcopy._side_stream.cache_clear()


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1 << 20])
def test_copies_are_whole_whatever_the_chunks(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    played = PlayedStreams(monkeypatch, chunk_bytes)
    generator = torch.Generator().manual_seed(0)
    sources = [
        torch.randn(5, 3, generator=generator), torch.randn(4, 6, generator=generator).t(),
        torch.randn(9, generator=generator).bfloat16(), torch.tensor(3.5), torch.empty(0, 4), torch.arange(11),
    ]
    found = hostcopy._copied(sources, DEVICE, "them")
    for have, want in zip(found, sources, strict=True):
        assert torch.equal(have, want) and have.dtype == want.dtype and have.is_contiguous()
    assert played.log[0] == "side waits for them" and set(played.log[1:]) == {"copy"}
    assert len(played.pinned) == 2 and {len(pin) for pin in played.pinned} == {min(chunk_bytes, 96)}
    assert played.present == "main"


def test_what_is_copied_later_is_what_was_queued_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that makes the tensors records the event; the one that copies them waits for it."""
    log: list[str] = []

    def record_event() -> str:
        log.append(f"recorded by {threading.current_thread().name}")
        return "event"

    def copied(given: list[Any], device: torch.device, made: str) -> list[Any]:
        log.append(f"{len(given)} copied after {made}")
        return ["host"] * len(given)

    def tensor(device: str) -> Any:
        made = SimpleNamespace(is_cuda=device == "cuda", device=torch.device(device))
        made.detach = lambda: made
        return made

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=record_event))
    monkeypatch.setattr(hostcopy, "_copied", copied)
    given = {"a": tensor("cuda"), "b": tensor("cpu"), "c": tensor("cuda")}
    copy = hostcopy.to_host_later(given)
    assert log == [f"recorded by {threading.current_thread().name}"]
    for _ in range(2):
        with ThreadPoolExecutor(1) as writer:
            assert writer.submit(copy).result() == {"a": "host", "b": given["b"], "c": "host"}
    assert log[1:] == ["2 copied after event"] * 2


def test_the_hosts_tensors_are_not_copied() -> None:
    tensor = torch.randn(3, requires_grad=True)
    found = hostcopy.to_host({"a": tensor})
    assert found["a"].data_ptr() == tensor.data_ptr() and not found["a"].requires_grad


def test_a_checkpoints_file_is_what_it_was(tmp_path: Path) -> None:
    state = {"master": torch.randn(7), "exp_avg": torch.randn(6, 2).t(), "exp_avg_sq": torch.rand(3).bfloat16()}
    path = save_checkpoint(
        tmp_path, Cursor(step=3, trained_tokens=5), save_adapter=lambda directory: None, optimizer=state, facts={}
    )
    want = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    assert (path / "optimizer.safetensors").read_bytes() == want


def test_a_jobs_tensors_reach_the_host_in_the_writers_thread(
    engines: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's thread only clones them on the device."""
    copied: list[tuple[str, set[str]]] = []
    later = hostcopy.to_host_later

    def watched(given: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        def copy() -> dict[str, Tensor]:
            copied.append((threading.current_thread().name, set(given)))
            return later(given)()
        return copy

    monkeypatch.setattr(hostcopy, "to_host_later", watched)
    monkeypatch.setattr(jobs, "to_host_later", watched)
    engine = engines()
    config = FinetuneConfig(max_steps=4, checkpoint_steps=2, lora=LoraConfig(r=4))
    engine.finetune(write_lines(tmp_path / "data.jsonl", chat_lines(8)), tmp_path / "out", replace(config, keep_checkpoints=2))
    drive(engine)
    state = {"master", "exp_avg", "exp_avg_sq"}
    assert [names for _, names in copied].count(state) >= 2 * 2, "a job's thread, then the file's"
    assert not any(thread == threading.current_thread().name for thread, _ in copied), copied
    for step in (2, 4):
        saved = load_file(tmp_path / "out" / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors")
        assert set(saved) == state and all(tensor.isfinite().all() for tensor in saved.values())


ALLOWED = {
    "training/batchwork.py": "the objective needs a micro-batch's log-probabilities before the next unit can be planned",
}
"""Modules that may copy to the host by `Tensor.cpu()`, and why."""


def test_nothing_else_copies_to_the_host() -> None:
    """`Tensor.cpu()` stops the thread that calls it and, on the default stream, everything behind it."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cpu":
                found.add(str(path.relative_to(SOURCE)))
    assert found == set(ALLOWED)


