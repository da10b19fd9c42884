"""Executes a step plan on the device: the pass and sampling, then units, optimizer slices and copies.

    pass over all layers [decode | prefill | fused window] -> logits -> sampling | units | optimizer slices | copies
                                                                            |-> tokens: all that the host waits for

A device that works beside the host (CUDA) goes on with what follows sampling, while the host gives the tokens to their requests
and plans the next iteration. The host waits for an iteration without tokens too, so that it is never far ahead: for the one
before it if requests run, else for its own end, so that a request that comes does not find a queue. Owns no policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coserve.core import RankFailed, Sampled, Span, StepPlan, StepResult, TokenLogprob, WorkUnit
from coserve.engine.device import EngineDevice
from coserve.engine.jobs import LiveJob
from coserve.engine.marks import ClockMark, CudaMark, Mark, RunningSteps
from coserve.engine.requests import LiveRequest
from coserve.grammar.matcher import Grammars, Masks
from coserve.runtime import sampler
from coserve.runtime.fused import TrainWindow
from coserve.runtime.sampler import SamplerRow
from coserve.runtime.spans import RowSpan
from coserve.runtime.transfer import to_device
from coserve.training.batchwork import Microbatch


class Lookup(NamedTuple):
    """The requests, micro-batches and jobs of a plan, by number. tables: a request's block table."""

    requests: Mapping[int, LiveRequest]
    tables: Callable[[int], Sequence[int]]
    microbatches: Mapping[int, Microbatch]
    jobs: Mapping[int, LiveJob]
    owners: Mapping[int, int]
    """The job of each micro-batch."""


_Part = tuple[LiveRequest, Span]
"""A request's rows in a batch."""


class StepRunner:
    """Runs plans on a device. mark: makes a mark behind what the device was told; default: the device's own kind. grammars:
    computes the masks of requests with a grammar; None: there are none."""

    def __init__(
        self, device: EngineDevice, clock: Callable[[], float] = time.perf_counter, mark: Callable[[], Mark] | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.device, self.clock, self.grammars = device, clock, grammars
        self._mark = mark or (CudaMark if device.is_cuda else lambda: ClockMark(clock))
        self._running = RunningSteps()

    @torch.no_grad()
    def run(self, plan: StepPlan, lookup: Lookup) -> StepResult:
        """Runs one iteration. If a job's unit, slice or copy raises, only that job is told (`LiveJob.fail`). Raises RankFailed,
        which such an error becomes where several ranks share the model."""
        called = self.clock()
        began = self._mark()
        masks = self._begin_masks(plan, lookup)
        parts, logits = self._pass(plan, lookup)
        sampling = self._sample(parts, logits, masks)
        for work in plan.units:
            if not work.fused:
                self._guard(lookup, work, lambda work=work: self._unit(work, lookup))  # type: ignore[misc]
        for part in plan.optimizer:
            self._try(lookup.jobs[part.job], lambda part=part: lookup.jobs[part.job].optimize(part))  # type: ignore[misc]
        for copy in plan.copies:
            if copy.job in lookup.jobs:
                self._try(lookup.jobs[copy.job], lambda copy=copy: lookup.jobs[copy.job].copy_adapter(copy))  # type: ignore[misc]
        self._running.add(plan, began, self._mark())
        launched = self.clock() if self.device.is_cuda else called
        tokens, prompts = sampling.result()
        if not tokens and not prompts:
            self._running.wait_for_all_but(1 if plan.spans else 0)
        waited_s = self.clock() - launched
        return StepResult(tokens=tokens, prompt_logprobs=prompts, ended=tuple(self._running.take_ended()), waited_s=waited_s)

    def _unit(self, work: WorkUnit, lookup: Lookup) -> None:
        micro = lookup.microbatches[work.microbatch]
        assert micro.state is not None
        self.device.run_unit(micro.state, work.unit, micro.adapter, deterministic=micro.deterministic)

    def _guard(self, lookup: Lookup, work: WorkUnit, action: Callable[[], None]) -> None:
        if work.microbatch in lookup.microbatches:
            self._try(lookup.jobs[lookup.owners[work.microbatch]], action)

    def _try(self, job: LiveJob, action: Callable[[], None]) -> None:
        try:
            action()
        except RankFailed:
            raise
        except Exception as error:  # any other ends this job only
            job.fail(error)

    # --- the pass ---

    def _pass(self, plan: StepPlan, lookup: Lookup) -> tuple[list[_Part], Tensor | None]:
        """The spans in batch order, and the logits [rows that need them, V] in the same order; None if no row needs any."""
        window = self._window(plan, lookup)
        if not (plan.decode or plan.prefill):
            return [], None
        decode, prefill = (self._in_order(part, lookup) for part in (plan.decode, plan.prefill))
        parts = [*decode, *prefill]
        ids: list[int] = []
        for request, span in parts:
            state, place = request.state, span.start - len(request.state.prompt)
            if span.length == 1 and place >= 0:
                ids.append(state.output[place])
            else:
                ids += self._ids(request, span)
        tables = lookup.tables
        rows = [
            [RowSpan(start, start + length, tables(number), request.slot) for request, (number, start, length, _, _) in some]
            for some in (decode, prefill)
        ]
        self._run_pass(ids, rows, window, plan.fused, lookup)
        chosen: Sequence[int] = range(len(ids))
        if sum([span.logits for _, span in parts]) < len(ids):
            chosen, end = [], 0
            for _, span in parts:
                end += span.length
                chosen += range(end - span.logits, end)
        return parts, self.device.logits(chosen) if chosen else None

    @staticmethod
    def _in_order(spans: Sequence[Span], lookup: Lookup) -> list[_Part]:
        """The spans of requests that are still there, by slot, those of a slot by context."""
        found = [(request, span) for span in spans if (request := lookup.requests.get(span.request)) is not None]
        found.sort(key=lambda part: (part[0].slot, part[1].start + part[1].length))
        return found

    def _window(self, plan: StepPlan, lookup: Lookup) -> TrainWindow | None:
        work = plan.fused
        micro = None if work is None else lookup.microbatches.get(work.microbatch)
        if work is None or micro is None:
            return None
        assert micro.state is not None
        return TrainWindow(micro.state, work.unit, micro.adapter)

    def _run_pass(
        self, ids: Sequence[int], rows: Sequence[Sequence[RowSpan]], window: TrainWindow | None, fused: WorkUnit | None,
        lookup: Lookup,
    ) -> None:
        """Runs the pass. If it fails with a training window, the job fails and the pass runs without it."""
        if window is None:
            self.device.run_pass(ids, rows[0], rows[1], None)
            return
        assert fused is not None
        try:
            self.device.run_pass(ids, rows[0], rows[1], window)
        except RankFailed:
            raise
        except Exception as error:  # a job's error must not fail requests
            lookup.jobs[lookup.owners[fused.microbatch]].fail(error)
            self.device.run_pass(ids, rows[0], rows[1], None)

    @staticmethod
    def _ids(request: LiveRequest, span: Span) -> Sequence[int]:
        state = request.state
        known = len(state.prompt)
        if span.end <= known:
            return state.prompt[span.start : span.end]
        if span.start >= known:
            return state.output[span.start - known : span.end - known]
        return state.tokens()[span.start : span.end]

    # --- tokens ---

    def _begin_masks(self, plan: StepPlan, lookup: Lookup) -> Masks | None:
        """Begins to compute, beside the pass, which tokens may follow in outputs with a grammar that get one."""
        if self.grammars is None or not self.grammars.in_use:
            return None
        matchers = {}
        for span in plan.spans:
            request = lookup.requests.get(span.request) if span.samples else None
            if request is not None and request.matcher is not None:
                matchers[span.request] = (request.matcher, len(request.state.output) < request.sampling.min_tokens)
        return Masks(self.grammars, matchers) if matchers else None

    def _sample(self, parts: Sequence[_Part], logits: Tensor | None, masks: Masks | None) -> _Sampling:
        """Queues on the device all that gives tokens and log-probabilities. Waits for the masks, if there are any."""
        sampling = _Sampling()
        if logits is None:
            return sampling
        chosen: list[int] = []
        rows: list[SamplerRow] = []
        first = 0
        for request, span in parts:
            number, _, _, wanted, samples = span
            state = request.state
            if wanted > 1 or (wanted and state.every_logit):
                sampling.add_prompt(request, span, logits[first : first + wanted])
            first += wanted
            if samples:
                chosen.append(first - 1)
                prompt, output = state.prompt, state.output
                allowed = None if masks is None else masks.of(number)
                rows.append(SamplerRow(
                    request.sampling, request.seed, len(prompt) + len(output), prompt, output, request.ending, request.draws,
                    allowed,
                ))
                sampling.sampled.append(number)
        if rows:
            if len(chosen) < logits.shape[0]:
                logits = logits[to_device(chosen, logits.device)]
            sampling.rows = sampler.launch(logits, rows)
        return sampling


class _Sampling:
    """What an iteration samples. sampled: the requests of `rows`, in order. prompts: by request, the log-probabilities of the
    prompt tokens that its rows predict."""

    def __init__(self) -> None:
        self.sampled: list[int] = []
        self.rows: sampler.TokensUnderWay | None = None
        self.prompts: dict[int, sampler.PromptUnderWay | None] = {}

    def add_prompt(self, request: LiveRequest, span: Span, logits: Tensor) -> None:
        """Queues the log-probabilities of the prompt tokens that the span's rows with logits predict."""
        following = request.state.prompt[span.end - span.logits + 1 : span.end + 1]
        count = request.sampling.prompt_logprobs or 0
        launched = sampler.launch_prompt(logits[: len(following)], following, count) if following else None
        self.prompts[span.request] = launched

    def result(self) -> tuple[dict[int, list[Sampled]], dict[int, list[TokenLogprob]]]:
        """Waits for the device to have got so far: by request, the sampled tokens, and the prompts' log-probabilities."""
        prompts = {
            number: [] if launched is None else sampler.prompt_result(launched) for number, launched in self.prompts.items()
        }
        results = [] if self.rows is None else sampler.result(self.rows)
        return {number: [result] for number, result in zip(self.sampled, results, strict=True)}, prompts
