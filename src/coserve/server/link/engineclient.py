"""The engine as the rest of the API process sees it, whichever process it runs in.

    EngineClient --> Supervisor --> EngineProcess     a process is started, watched, ended and followed by another one
                 --> Calls                            one answer for each question
                 --> RequestStreams                   many chunks for each request

Owns: what can be asked of the engine, and which of its messages goes where. Everything runs on one event loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

from coserve.cluster.load import Load
from coserve.config.settings import SamplingConfig
from coserve.config.values import SloMs
from coserve.server.link.calls import Calls
from coserve.server.link.messages import (
    ActJob,
    AdapterRef,
    ChargeTenants,
    EngineLoad,
    Failed,
    FromEngine,
    Generate,
    GetStats,
    JobEnded,
    JobHappened,
    LoadAdapter,
    Ready,
    Replied,
    ShareEnded,
    StartJob,
    StepSaid,
    StepTold,
    Tokens,
    UnloadAdapter,
    WatchLoad,
)
from coserve.server.link.streams import RequestStream, RequestStreams, StreamMaker
from coserve.server.link.supervisor import Supervisor, notify_all
from coserve.server.settings import ServerConfig

_log = logging.getLogger(__name__)


class EngineClient:
    """What is asked of the engine fails with EngineUnavailable while it isn't ready, and if its process dies meanwhile.
    supervisor: the life of its process."""

    def __init__(self, config: ServerConfig, *, report: Callable[[str], None] = _log.info) -> None:
        """report: takes a line about a start."""
        self.supervisor = Supervisor(config, report=report, on_message=self._on_message, on_lost=self._on_lost)
        self._calls, self._streams = Calls(self.supervisor.send), RequestStreams(self.supervisor.send)
        self._job_listeners: list[Callable[[JobHappened | JobEnded], None]] = []
        self._step_listeners: list[Callable[[StepSaid | ShareEnded], None]] = []
        self._load_listeners: list[Callable[[Load], None]] = []
        self._load_every_s = 0.0
        self.supervisor.on_up(self._ask_for_load)

    @property
    def ready(self) -> bool:
        return self.supervisor.ready

    @property
    def info(self) -> Ready:
        return self.supervisor.info

    @property
    def generation(self) -> int:
        return self.supervisor.generation

    # --- what comes from it ---

    def on_job(self, listener: Callable[[JobHappened | JobEnded], None]) -> None:
        """The listener is called with every event of every job, in order, on the event loop."""
        self._job_listeners.append(listener)

    def on_step(self, listener: Callable[[StepSaid | ShareEnded], None]) -> None:
        """The listener is called with what the engine says as a member of jobs that several engines share, in order."""
        self._step_listeners.append(listener)

    def on_load(self, listener: Callable[[Load], None]) -> None:
        """The listener is called with every report that `watch_load` has asked for, on the event loop."""
        self._load_listeners.append(listener)

    def _on_message(self, message: FromEngine) -> None:
        match message:
            case Tokens():
                self._streams.on_tokens(message)
            case Failed():
                self._streams.on_failed(message)
            case Replied():
                self._calls.on_reply(message)
            case JobHappened() | JobEnded():
                notify_all(self._job_listeners, message)
            case StepSaid() | ShareEnded():
                notify_all(self._step_listeners, message)
            case EngineLoad(load=load):
                notify_all(self._load_listeners, load)

    def _on_lost(self, message: str) -> None:
        self._streams.fail_all(message)
        self._calls.fail_all(message)

    # --- what is asked of it ---

    def generate(
        self, *, prompt_ids: Sequence[int], sampling: SamplingConfig, adapter: AdapterRef | None = None, tenant: str = "",
        tpot_ms: SloMs | None = None, ttft_ms: SloMs | None = None, arrival_s: float | None = None,
    ) -> RequestStream:
        """Sends a request. Close the stream if it isn't read to its end. Raises EngineUnavailable and InvalidRequest.

        arrival_s: when the request arrived, by the monotonic clock; None: now.
        """
        return self._streams.open(Generate(
            id=self._streams.new_id(), prompt_ids=list(prompt_ids), sampling=sampling,
            adapter=None if adapter is None else adapter.name, tenant=tenant,
            tpot_ms=tpot_ms, ttft_ms=ttft_ms, arrival_s=time.monotonic() if arrival_s is None else arrival_s,
        ))

    def relay(self, message: Generate, make: StreamMaker) -> RequestStream:
        """Sends a request that another process has made. make: makes its stream, which may pass chunks on as they come. Raises
        EngineUnavailable and InvalidRequest."""
        return self._streams.open(message, make)

    def fail_requests(self, message: str) -> None:
        """Cancels every request; its stream raises EngineUnavailable with the message."""
        self._streams.fail_all(message)

    async def load_adapter(self, name: str, directory: str) -> list[str]:
        """Loads an adapter under a name, as a newer version if the name exists. Raises what the engine raises.

        Returns the directories that the engine's adapters may still be read from.
        """
        return cast(list[str], await self._calls.ask(lambda call: LoadAdapter(call=call, name=name, directory=directory)))

    async def unload_adapter(self, name: str) -> list[str]:
        """Requests that use the adapter go on. Returns and raises as `load_adapter`."""
        return cast(list[str], await self._calls.ask(lambda call: UnloadAdapter(call=call, name=name)))

    async def start_job(self, **fields: Any) -> None:
        """Returns when the job may get units. Raises what the engine raises.

        fields: those of StartJob, without `call`.
        """
        await self._calls.ask(lambda call: StartJob(call=call, **fields))

    def act_job(self, job: str, action: str) -> None:
        """Pauses, resumes, cancels or hands over a job: `action` is one of ActJob's. A job that has ended stays as it is.
        Raises EngineUnavailable."""
        self.supervisor.send(ActJob(id=job, action=cast(Literal["pause", "resume", "cancel", "hand_over"], action)))

    def tell_step(self, job: str, data: bytes) -> None:
        """Passes an envelope (stepmessages.py) to the engine as a member of a job. Raises EngineUnavailable."""
        self.supervisor.send(StepTold(id=job, data=data))

    def watch_load(self, every_s: float) -> None:
        """The engine, and those that follow it after a restart, reports its load every so many seconds; 0: no more."""
        self._load_every_s = every_s
        if self.ready:
            self.supervisor.send(WatchLoad(every_s=every_s))

    async def _ask_for_load(self) -> None:
        if self._load_every_s > 0:
            self.watch_load(self._load_every_s)

    def charge_tenants(self, tokens: Mapping[str, int]) -> None:
        """Other engines have served tenants so many tokens, which count for their turns here. Raises EngineUnavailable."""
        self.supervisor.send(ChargeTenants(tokens=dict(tokens)))

    async def stats(self) -> dict[str, Any]:
        """Engine.metrics(), and time_s, when it was measured by the monotonic clock. Raises EngineUnavailable."""
        return cast(dict[str, Any], await self._calls.ask(lambda call: GetStats(call=call)))
