"""The engine process's host: what is asked of a job while it is being prepared is done in the order of asking."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from coserve.config.settings import FinetuneConfig
from coserve.server.link.enginehost import EngineHost
from coserve.server.link.messages import ActJob, FromEngine, Replied, StartJob


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
