"""The requests of an engine: which are refused, how one begins, gets its tokens and ends.

Owns: the live requests, and which adapter version each uses. Does not own: handles and texts (requests.py), when a request
runs (scheduler/). Only the engine's thread changes it; any thread may call `check`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from coserve.config.settings import SamplingConfig
from coserve.core import ContextExceeded, CoserveError, InvalidRequest, Slo, StepPlan, StepResult
from coserve.engine.adapters import AdapterRegistry, AdapterVersion
from coserve.engine.requests import Chunk, LiveRequest, OutputStart, RequestHandle
from coserve.grammar.matcher import GrammarMatcher
from coserve.runtime.loaded import LoadedModel
from coserve.runtime.spans import NO_ADAPTER
from coserve.scheduler.admission import Seats
from coserve.scheduler.blocks import BlockPool
from coserve.scheduler.hybrid import HybridScheduler
from coserve.scheduler.prefix import PrefixKey
from coserve.scheduler.requests import RequestState
from coserve.text.stream import TextStream


class RequestTable(Seats):
    """Outputs under way, by number. new_number: returns a number that nothing else has. now: the engine's clock."""

    def __init__(
        self, model: LoadedModel, blocks: BlockPool, scheduler: HybridScheduler, adapters: AdapterRegistry,
        new_number: Callable[[], int], now: Callable[[], float],
    ) -> None:
        self.model, self.blocks, self.scheduler, self.adapters = model, blocks, scheduler, adapters
        self.new_number, self.now = new_number, now
        scheduler.admission.seats = self
        adapters.wake = lambda version: scheduler.admission.unpark(version.name, version.number)
        adapters.fail = self.fail_version
        self.live: dict[int, LiveRequest] = {}
        self.num_finished = self.num_cancelled = 0

    def check(self, ids: Sequence[int], sampling: SamplingConfig) -> None:
        """Raises InvalidRequest if the model or the cache can't run this prompt with these settings."""
        arch = self.model.architecture
        if not ids:
            raise InvalidRequest("prompt: is empty; give at least one token", param="prompt")
        if min(ids) < 0 or max(ids) >= arch.vocab_size:
            raise InvalidRequest(f"prompt: token ids must be from 0 to {arch.vocab_size - 1}", param="prompt")
        for name, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            if any(not 0 <= token < arch.vocab_size for token in tokens):
                raise InvalidRequest(f"{name}: token ids must be from 0 to {arch.vocab_size - 1}", param=name)
        total = len(ids) + sampling.max_tokens
        if total > arch.max_position_embeddings:
            raise ContextExceeded(
                f"prompt: {len(ids)} tokens and max_tokens {sampling.max_tokens} exceed the model's "
                f"{arch.max_position_embeddings}; shorten one of them", param="max_tokens",
            )
        room = self.blocks.guaranteed_blocks * self.blocks.block_tokens
        if total > room:
            raise ContextExceeded(
                f"prompt: {len(ids)} tokens and max_tokens {sampling.max_tokens} exceed the {room} tokens that the key-value "
                "cache is guaranteed; shorten one of them, or raise memory_bytes", param="max_tokens",
            )

    def begin_outputs(
        self, ids: Sequence[int], sampling: SamplingConfig, matchers: Sequence[GrammarMatcher], emitted: Sequence[Sequence[int]]
    ) -> list[OutputStart]:
        """Where the outputs of a prompt begin. matchers: one for each, if there is a grammar. emitted: tokens that each came
        with; empty: none. Takes a few microseconds for each of those. Raises InvalidRequest."""
        if emitted and len(emitted) != sampling.n:
            raise InvalidRequest(
                f"emitted: must have a list for each of {sampling.n} outputs, got {len(emitted)}", param="emitted",
            )
        size = self.model.architecture.vocab_size
        for index, tokens in enumerate(emitted):
            if tokens and not (min(tokens) >= 0 and max(tokens) < size and len(tokens) <= sampling.max_tokens):
                raise InvalidRequest(
                    f"emitted[{index}]: must be at most max_tokens={sampling.max_tokens} token ids from 0 to {size - 1}",
                    param="emitted",
                )
        starts: list[OutputStart] = []
        for index in range(sampling.n):
            stream = TextStream(
                self.model.tokenizer, sampling.stop, context=ids, min_tokens=sampling.min_tokens,
                shown_ids=sampling.shown_special_ids,
            )
            tokens = emitted[index] if emitted else ()
            starts.append(OutputStart.after(tokens, stream, matchers[index] if matchers else None))
        return starts

    def admit(
        self, handle: RequestHandle, adapter: str | None, tenant: str, objectives: Slo, numbers: list[int],
        starts: Sequence[OutputStart],
    ) -> None:
        """Begins a request. numbers: the list to which the numbers of its outputs that run are added. starts: where they begin.
        """
        sampling = handle.sampling
        lives: list[LiveRequest] = []
        for index, start in enumerate(starts):
            try:
                version = None if adapter is None else self.adapters.acquire(adapter)
            except CoserveError as error:
                for live in lives:
                    self._release(live)
                self.refuse(handle, error)
                return
            key = PrefixKey(tenant, None, 0) if version is None else PrefixKey(tenant, version.name, version.number)
            state = RequestState(
                id=self.new_number(), tenant=tenant, prompt=handle.prompt_ids, max_tokens=max(1, sampling.max_tokens), key=key,
                arrival_s=handle.arrival_s, tpot_s=objectives.tpot_s, ttft_s=objectives.ttft_s, given=len(start.emitted),
                output=list(start.emitted),
            )
            ending = self._ending(sampling, version)
            if start.matcher is not None:
                start.matcher.set_ending(ending, sampling.stop_token_ids)
            lives.append(LiveRequest(
                handle=handle, index=index, state=state, sampling=sampling, stream=start.stream, ending=ending, version=version,
                slot=NO_ADAPTER, matcher=start.matcher,
            ))
        self._start(handle, lives, numbers)

    def _start(self, handle: RequestHandle, lives: Sequence[LiveRequest], numbers: list[int]) -> None:
        """Has the outputs run that haven't ended by what they came with."""
        reasons = [live.resume() for live in lives]
        failed = next((live.failed for live in lives if live.failed is not None), None)
        if failed is not None:
            for live in lives:
                self._release(live)
            self.refuse(handle, failed)
            return
        running = [live for live, reason in zip(lives, reasons, strict=True) if reason is None]
        if handle.sampling.prompt_logprobs is not None and len(running) == len(lives):  # they are told when an output has ended
            running[0].state.every_logit, running[0].state.cacheable = True, False
        numbers += [live.state.id for live in running]
        self.live |= {live.state.id: live for live in running}
        for live, reason in zip(lives, reasons, strict=True):
            if reason is not None:
                self._release(live)
                handle.push(Chunk(index=live.index, text="", finish_reason=reason), self.now())
        if running:
            running[0].siblings += running[1:]
            self.scheduler.add_request(running[0].state)

    def _ending(self, sampling: SamplingConfig, version: AdapterVersion | None) -> frozenset[int]:
        """The token ids that end an output: the request's, the base model's, and those that its adapter was taught."""
        asked = frozenset(sampling.stop_token_ids)
        if sampling.ignore_eos:
            return asked
        taught = frozenset() if version is None else frozenset(self.adapters.end_token_ids(version))
        return asked | self.model.end_token_ids | taught

    def refuse(self, handle: RequestHandle, error: CoserveError) -> None:
        """Ends, with an error, a request that can't begin."""
        handle.error = error
        for index in range(handle.sampling.n):
            handle.push(Chunk(index=index, text="", finish_reason="error"), self.now())

    def cancel(self, numbers: Sequence[int]) -> None:
        """Ends those of the numbered outputs that are under way."""
        for number in numbers:
            request = self.live.get(number)
            if request is not None:
                request.end("cancelled", self.now())
                self._end_request(number)
                self.num_cancelled += 1

    def _end_request(self, number: int) -> None:
        request = self.live[number]
        self.scheduler.remove_request(number)
        del self.live[number]
        for sibling in request.siblings:
            if sibling.state.id in self.live:
                self.scheduler.add_request(sibling.state)
        self._release(request)

    def _release(self, request: LiveRequest) -> None:
        if request.version is not None:
            self.adapters.release(request.version)

    # --- the scheduler's seats: slots of adapters ---

    def claim(self, state: RequestState) -> bool:
        """Takes the adapter's slot for a request that is about to run. False if there is none now."""
        request = self.live[state.id]
        if request.version is None:
            return True
        slot = self.adapters.claim(request.version, state.tenant)
        request.slot = NO_ADAPTER if slot is None else slot
        return slot is not None

    def unclaim(self, state: RequestState, *, has_run: bool) -> None:
        """Gives back the slot of a request that stops running. has_run: False if it could not begin."""
        request = self.live[state.id]
        if request.version is not None:
            request.slot = NO_ADAPTER
            self.adapters.unclaim(request.version, has_run=has_run)

    def fail_version(self, version: AdapterVersion, error: CoserveError) -> None:
        """Ends the requests on a version that can't be read."""
        for number, request in list(self.live.items()):
            if request.version == version:
                request.handle.error = error
                request.end("error", self.now())
                self._end_request(number)

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> None:
        """Gives the requests what an iteration has sampled for them."""
        starts = {span.request: span.start for span in plan.spans} if result.prompt_logprobs else {}
        for number, logprobs in result.prompt_logprobs.items():
            have = self.live[number].handle.prompt_logprobs
            have += logprobs[len(have) - starts[number] :]  # after a preemption, rows with known log-probabilities run again
        for number, tokens in result.tokens.items():
            request = self.live.get(number)
            if request is None:  # another output of its request has failed
                continue
            if request.failed is not None:  # the token is of no meaning
                self._fail_request(request.handle, request.failed)
                continue
            state = request.state
            if request.handle.begun_s is None and state.begun_s is not None:
                request.handle.begun_s = min(state.begun_s, now)  # as planned; the device may have been free earlier
                request.handle.cached_tokens = min(state.cached_tokens, len(state.prompt))
            if request.siblings:
                for sibling in request.siblings:
                    self.scheduler.add_request(sibling.state)
                request.siblings.clear()
            if request.accept(tokens, now):
                self._end_request(number)
                self.num_finished += 1
            elif request.failed is not None:
                self._fail_request(request.handle, request.failed)

    def _fail_request(self, handle: RequestHandle, error: CoserveError) -> None:
        """Ends all outputs of a request that are under way."""
        handle.error = error
        for number, request in [(number, live) for number, live in self.live.items() if live.handle is handle]:
            request.end("error", self.now())
            self._end_request(number)

    def fail_all(self, error: CoserveError) -> None:
        """Ends all requests with the engine's error, even if cleaning up fails, so that no caller waits for ever."""
        for number, request in list(self.live.items()):
            request.handle.error = error
            with contextlib.suppress(Exception):
                request.handle.push(Chunk(index=request.index, text="", finish_reason="error"), self.now())
            with contextlib.suppress(Exception):
                self._end_request(number)
        self.live.clear()
