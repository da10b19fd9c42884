"""One HTTP request's questions to the engine: a stream for each prompt, all merged into one, and a meter for each prompt.

    prompts p0 p1   n = 2     choices: p0/0 p0/1 p1/0 p1/1, numbered 0 1 2 3

Owns: opening, merging and closing the streams, and their meters. Does not own: the wire (link/engineclient.py), responses.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from coserve.config.settings import SamplingConfig
from coserve.config.values import SloMs
from coserve.core import CapacityError, CoserveError, InvalidRequest
from coserve.server.errors import EngineUnavailable
from coserve.server.link.messages import Tokens
from coserve.server.link.streams import RequestStream
from coserve.server.models import ServedModel
from coserve.server.places import Claim
from coserve.server.services import Services
from coserve.server.stats.metrics import RequestMeter

GRAMMAR = "grammar"
"""The field that the engine's errors name (SamplingConfig)."""
_AT_ONCE = 32
"""After so many prompts sent, or chunks passed on, the event loop serves other requests."""


class Question(NamedTuple):
    """A prompt and how to sample from it. `sampling.n` outputs are wanted."""

    prompt_ids: list[int]
    sampling: SamplingConfig


class _Run(NamedTuple):
    """One prompt's stream and meter."""

    stream: RequestStream
    meter: RequestMeter


class Answers:
    """The engine's answers to some questions, which all have the same n. It must be closed, however it ends."""

    def __init__(
        self, services: Services, questions: Sequence[Question], *, tenant: str, model: ServedModel, arrival_s: float,
        tpot_ms: SloMs | None, ttft_ms: SloMs | None, grammar_field: str = GRAMMAR,
    ) -> None:
        """Nothing is sent to the engine until somebody iterates. arrival_s: when the request came, by the monotonic clock.
        tpot_ms, ttft_ms: its latency objectives; None: the server's. grammar_field: what errors of the grammar name."""
        self._services, self._questions, self._tenant, self._model = services, questions, tenant, model
        self._arrival_s, self._tpot_ms, self._ttft_ms = arrival_s, tpot_ms, ttft_ms
        self._grammar_field = grammar_field
        self._runs: list[_Run] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._claim: Claim | None = None
        self._refused: CapacityError | None = None

    async def __aiter__(self) -> AsyncIterator[tuple[int, Tokens]]:
        """Yields (number of the prompt, its new tokens) until every output has ended.

        Raises the first error of any prompt: CapacityError, or EngineUnavailable, also where the server cancelled an output.
        """
        self._claim = self._take_places()
        for number, question in enumerate(self._questions, start=1):
            if self._refused is not None:
                raise self._refused
            self._runs.append(self._ask(question))
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)  # others' tokens first
        if len(self._runs) == 1:
            async for tokens in self._follow(self._runs[0]):
                yield 0, tokens
            return
        inbox: asyncio.Queue[tuple[int, Tokens | Exception | None]] = asyncio.Queue()
        self._pumps = [asyncio.create_task(self._pump(number, run, inbox)) for number, run in enumerate(self._runs)]
        left, taken = len(self._pumps), 0
        while left:
            number, item = await inbox.get()
            taken += 1
            if taken % _AT_ONCE == 0:
                await asyncio.sleep(0)  # `get` of what is there already leaves the loop no turn
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield number, item

    def _take_places(self) -> Claim:
        outputs = sum(question.sampling.n for question in self._questions)
        try:
            return self._services.shares.places.take(self._tenant, outputs, self._refuse)
        except CapacityError:
            self._services.metrics.rejected("capacity")
            raise

    def _refuse(self, error: CapacityError) -> None:
        """Ends the request, whose places in the queue have been given to another tenant."""
        self._refused = error
        for run in self._runs:
            run.stream.refuse(error)

    async def aclose(self) -> None:
        """Closes the streams. Outputs that haven't ended are cancelled in the engine."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        if self._claim is not None:
            self._services.shares.places.give_back(self._claim)
        for number, run in enumerate(self._runs, start=1):
            run.meter.end("cancelled")  # of no effect if it has ended
            await run.stream.aclose()
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)

    def _ask(self, question: Question) -> _Run:
        services = self._services
        meter = services.metrics.begin(
            model=self._model.name, prompt_tokens=len(question.prompt_ids), sampling=question.sampling,
            arrival_s=self._arrival_s, ttft_ms=self._ttft_ms, tpot_ms=self._tpot_ms,
        )
        try:
            stream = services.engine.generate(
                prompt_ids=question.prompt_ids, sampling=question.sampling, adapter=self._model.adapter, tenant=self._tenant,
                tpot_ms=self._tpot_ms, ttft_ms=self._ttft_ms, arrival_s=self._arrival_s,
            )
        except CoserveError as error:
            meter.end("error")
            if isinstance(error, EngineUnavailable):
                services.metrics.rejected("unavailable")
            raise
        return _Run(stream, meter)

    async def _follow(self, run: _Run) -> AsyncIterator[Tokens]:
        """Yields one prompt's tokens and counts them in its meter."""
        left = self._questions[0].sampling.n
        try:
            async for tokens in run.stream:
                run.meter.tokens(tokens)
                if self._claim is not None:
                    self._claim.begun = True
                    self._services.shares.places.give_back(self._claim, int(tokens.finish_reason is not None))
                if tokens.finish_reason == "cancelled":
                    raise EngineUnavailable("the request was cancelled by the server; try again")
                left -= tokens.finish_reason is not None
                if not left:
                    run.meter.end(str(tokens.finish_reason))
                yield tokens
        except CapacityError:
            self._services.metrics.rejected("capacity")
            run.meter.end("error")
            raise
        except InvalidRequest as error:
            run.meter.end("error")
            if error.param != GRAMMAR:
                raise
            field = self._grammar_field
            raise InvalidRequest(f"{field}{str(error).removeprefix(GRAMMAR)}", param=field) from error
        except Exception:
            run.meter.end("error")
            raise

    async def _pump(self, number: int, run: _Run, inbox: asyncio.Queue[tuple[int, Tokens | Exception | None]]) -> None:
        try:
            async for tokens in self._follow(run):
                inbox.put_nowait((number, tokens))
                if inbox.qsize() > _AT_ONCE:
                    await asyncio.sleep(0)
            inbox.put_nowait((number, None))
        except Exception as error:
            inbox.put_nowait((number, error))
