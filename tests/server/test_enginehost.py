"""The engine process's host: what is asked of a job while it is being prepared is done in the order of asking, and requests
with a grammar hold up no others while it is compiled. A job's end is told once nothing of it is being written."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from coserve.config.settings import FinetuneConfig, SamplingConfig
from coserve.core import InvalidRequest
from coserve.engine.requests import RequestHandle
from coserve.server.link.enginehost import EngineHost
from coserve.server.link.messages import ActJob, Cancel, Failed, FromEngine, Generate, JobEnded, Replied, StartJob


class Handle:
    """A job's handle that writes down what is asked of it, and lets another thread come between."""

    def __init__(self) -> None:
        self.actions: list[str] = []
        self.between: threading.Thread | None = None

    def pause(self) -> None:
        if self.between is not None:
            self.between.start()
            self.between.join(0.2)
        self.actions.append("pause")

    def resume(self) -> None:
        self.actions.append("resume")

    def cancel(self) -> None:
        self.actions.append("cancel")

    def watch(self, listener: Any) -> None:
        pass


def test_an_early_action_comes_before_a_later_one(tmp_path: Path) -> None:
    handle, preparing = Handle(), threading.Event()
    replies: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()

    def finetune(*_: Any, **__: Any) -> Handle:
        preparing.wait(10)
        return handle

    engine: Any = SimpleNamespace(finetune=finetune)
    host = EngineHost(engine, replies.put, lambda: None)
    handle.between = threading.Thread(target=lambda: host.on_message(ActJob(id="job", action="resume")))
    host.on_message(StartJob(
        call=1, id="job", adapter="a", training_file=str(tmp_path / "data"), validation_file=None, directory=str(tmp_path),
        config=FinetuneConfig(), resume=False,
    ))
    host.on_message(ActJob(id="job", action="pause"))
    preparing.set()
    assert replies.get(timeout=10) == Replied(call=1)
    handle.between.join(10)
    host.close()
    assert handle.actions == ["pause", "resume"]


def test_a_jobs_end_is_told_behind_the_checkpoints_that_are_being_written(tmp_path: Path) -> None:
    replies: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
    writing, threads = threading.Event(), SimpleNamespace(writer=ThreadPoolExecutor(1), recorder=ThreadPoolExecutor(1))
    engine: Any = SimpleNamespace(closed=False, jobs=threads)
    host = EngineHost(engine, replies.put, lambda: None)
    threads.writer.submit(writing.wait, 10)
    handle: Any = SimpleNamespace(directory=tmp_path, error=None, status="cancelled", step=3)
    host._job_ended("job", handle)
    threads.recorder.submit(lambda: None).result()
    assert replies.empty()
    writing.set()
    assert replies.get(timeout=10) == JobEnded(id="job", status="cancelled", step=3, trained_tokens=0, problem=None)
    host.close()


def ask(name: str, grammar: str | None) -> Generate:
    return Generate(id=name, prompt_ids=[1], sampling=SamplingConfig(grammar=grammar), arrival_s=0.0)


def test_a_grammar_is_compiled_beside_the_messages() -> None:
    """Others are submitted meanwhile; one that is cancelled meanwhile is cancelled once it is there; errors are told."""
    compiling, submitted, posts = threading.Event(), list[str](), queue.SimpleQueue[FromEngine]()
    cancelled = threading.Event()

    def submit(prompt: Any, sampling: SamplingConfig, *, label: str, **_: Any) -> RequestHandle:
        if sampling.grammar is not None:
            compiling.wait(10)
        if sampling.grammar == "wrong":
            raise InvalidRequest("grammar: is wrong", param="grammar")
        if sampling.grammar == "bug":
            raise ZeroDivisionError("a bug")
        submitted.append(label)
        return RequestHandle(prompt, sampling, 0.0, cancelled.set)

    engine: Any = SimpleNamespace(submit=submit, closed=False)
    host = EngineHost(engine, posts.put, lambda: None)
    host.on_message(ask("slow", "slow"))
    host.on_message(ask("wrong", "wrong"))
    host.on_message(ask("plain", None))
    assert submitted == ["plain"]
    host.on_message(Cancel(id="slow"))
    assert not cancelled.is_set()
    compiling.set()
    failed = posts.get(timeout=10)
    assert isinstance(failed, Failed)
    assert (failed.id, failed.problem.name, failed.problem.param) == ("wrong", "InvalidRequest", "grammar")
    assert cancelled.wait(10) and submitted == ["plain", "slow"]
    host.on_message(ask("bug", "bug"))
    failed = posts.get(timeout=10)
    assert isinstance(failed, Failed) and (failed.id, failed.problem.message) == ("bug", "ZeroDivisionError: a bug")
    host.on_message(Cancel(id="bug"))
    host._compiling.shutdown()
    assert not host._early_ends
    host.close()
