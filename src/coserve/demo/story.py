"""The demo's story, through a server of its own and the openai client.

    serve -> measure -> a job alone -> the same job beside Poisson chat -> ask base and tuned

Owns: the order, which seconds count as what. Does not own: the parts; what is written to disk (command.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from coserve.bench.metrics import SloInMs
from coserve.demo.client import Connection, connect
from coserve.demo.display import Board, Display
from coserve.demo.job import SEED, create_job
from coserve.demo.questions import ask_both, questions
from coserve.demo.report import DemoReport
from coserve.demo.server import START_S, DemoFailed, Server, beside, open_server, serve_command
from coserve.demo.traffic import BURST, Chat, Traffic, chat_rate, measure, summarize
from coserve.demo.watch import TokensAt, Watch, rate, trained_until

TPOT_MS, TTFT_MS = 150.0, 3000.0
"""The demo's objectives: about 1.25 times what a token takes transformers.generate at batch 8 on two cores, and the server's
default to the first token."""
ALONE_S = 15.0
"""How long the job trains before chat comes."""
MAX_CHAT_S = 120.0
"""Chat ends with the job, or after so long: a slow machine then finishes the job without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """One demo. data_dir: the server's, new; log: file of the server's lines; model: as for `coserve serve`."""

    data_dir: Path
    log: Path
    objectives: SloInMs
    model: str | None = None
    options: tuple[str, ...] = ()
    """More of `coserve serve`."""
    alone_s: float = ALONE_S

    def arguments(self) -> list[str]:
        """For `coserve serve`."""
        return [
            *([] if self.model is None else [self.model]), "--data-dir", str(self.data_dir),
            "--slo-tpot-ms", f"{self.objectives.tpot_ms:g}", "--slo-ttft-ms", f"{self.objectives.ttft_ms:g}", *self.options,
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """samples: the server's counters over time; chat_s: when chat began and ended (the samples' clock); tuned: the model's
    name; job: its id."""

    report: DemoReport
    chats: tuple[Chat, ...]
    samples: tuple[TokensAt, ...]
    chat_s: tuple[float, float]
    tuned: str
    job: str


async def run_demo(
    settings: DemoSettings, display: Display, finish: Callable[[DemoResult, Server], Awaitable[None]]
) -> None:
    """Plays the story; then runs `finish` while the server still runs.

    Raises DemoFailed if the server ends, the job fails or a question isn't answered; the server is stopped in any case.
    """
    began = time.perf_counter()
    async with open_server(serve_command(settings.arguments()), settings.log, display.dim) as server:

        async def play() -> None:
            await server.wait_ready(START_S)
            await finish(await Story(settings, display, connect(server.url), began).play(), server)

        await beside(play(), server.read())


class Story:
    """One run. began_s: when it started, for what is shown."""

    def __init__(self, settings: DemoSettings, display: Display, connection: Connection, began_s: float) -> None:
        self.settings, self.display, self.connection, self.began_s = settings, display, connection, began_s
        self.watch = Watch(connection, self._show)
        self.traffic: Traffic | None = None
        self.chat_s = (0.0, 0.0)

    async def play(self) -> DemoResult:
        """All of it. Raises DemoFailed."""
        try:
            return await self._play()
        except self.connection.refusals as error:
            raise DemoFailed(f"the server refused or broke off a request: {error}") from error
        finally:
            self.display.close_board()
            if self.traffic is not None:
                self.traffic.cancel()

    async def _play(self) -> DemoResult:
        self.display.say(f"watch it: {self.connection.url}/")
        base = (await self.connection.client.models.list()).data[0].id
        self.traffic = await self._measure(base)
        await beside(self._train(base, self.traffic), self.watch.run())
        self.display.close_board()
        job = self.watch.job
        assert job is not None and job.fine_tuned_model is not None
        self.display.step(4, f"Ask {base} and {job.fine_tuned_model} {len(questions())} held-out questions, all at once")
        answers = await ask_both(self.connection, base, job.fine_tuned_model)
        samples, losses = self.watch.samples, self.watch.losses
        first_s = next(sample.time_s for sample in samples if sample.finetune_tokens > 0)
        return DemoResult(
            report=DemoReport(
                figures=summarize(self.traffic.chats, self.settings.objectives), answers=answers,
                tpot_slo_ms=self.settings.objectives.tpot_ms,
                finetune_tokens_per_s=rate(samples, "finetune_tokens", *self.chat_s),
                finetune_alone_tokens_per_s=rate(samples, "finetune_tokens", first_s, self.chat_s[0]),
                loss_first=losses[min(losses)], loss_last=losses[max(losses)], duration_s=time.perf_counter() - self.began_s,
            ),
            chats=tuple(self.traffic.chats), samples=tuple(samples), chat_s=self.chat_s, tuned=job.fine_tuned_model, job=job.id,
        )

    async def _measure(self, base: str) -> Traffic:
        """How fast this machine chats; the rate of the chat to come."""
        self.display.step(1, f"Measure what this machine can do with a burst of {BURST} chats")
        capacity, chats = await measure(self.connection, base)
        failed = next((chat.error for chat in chats if chat.error is not None), None)
        if failed is not None:
            raise DemoFailed(f"a first chat failed: {failed}")
        figures, wanted = summarize(chats, self.settings.objectives), self.settings.objectives.tpot_ms
        traffic = Traffic(self.connection, base, chat_rate(capacity), SEED)
        self.display.say(
            f"   about {capacity:.2f} requests/s; chat will come at {traffic.rate:.2f} requests/s, by a Poisson process. "
            f"Objective: {wanted:.0f} ms per token"
        )
        if figures.tpot_ms_p50 is not None and figures.tpot_ms_p50 > wanted:
            self.display.say(
                f"   this machine takes {figures.tpot_ms_p50:.0f} ms per token without any training: chat will miss that "
                "objective (--slo-tpot-ms sets another one)", "yellow",
            )
        return traffic

    async def _train(self, base: str, traffic: Traffic) -> None:
        """The job, alone and then beside chat, to its end."""
        self.display.step(2, f"Finetune {base} on 99 chats about the invented town of Vellmoor: first alone")
        watch = self.watch
        watch.job = await create_job(self.connection, base)
        await watch.until(lambda: bool(watch.samples) and watch.samples[-1].finetune_tokens > 0)
        await self._pass(self.settings.alone_s)
        self.display.step(3, "The same job, while chat comes and goes at random times")
        began = watch.samples[-1].time_s
        self.chat_s = began, began
        chatting = asyncio.create_task(traffic.run())
        try:
            await self._pass(MAX_CHAT_S)
        finally:
            chatting.cancel()
        self.chat_s = began, trained_until(watch.samples) if self._job_ended() else watch.samples[-1].time_s
        await traffic.drain()
        await watch.until(self._job_ended)

    async def _pass(self, seconds: float) -> None:
        """Waits, but not longer than the job runs."""
        until = time.perf_counter() + seconds
        await self.watch.until(lambda: time.perf_counter() >= until or self._job_ended())

    def _job_ended(self) -> bool:
        return self.watch.job is not None and self.watch.job.status == "succeeded"

    def _show(self) -> None:
        losses, chats = self.watch.losses, [] if self.traffic is None else self.traffic.chats
        self.display.update(Board(
            elapsed_s=time.perf_counter() - self.began_s, step=max(losses, default=0), num_steps=self.watch.num_steps,
            loss=losses[max(losses)] if losses else None, finetune_rate=self.watch.recent("finetune_tokens"),
            inference_rate=self.watch.recent("inference_tokens"), figures=summarize(chats, self.settings.objectives),
            num_running=0 if self.traffic is None else self.traffic.num_running, objectives=self.settings.objectives,
        ))
