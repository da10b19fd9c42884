"""Executes a step plan on the device: the pass, units, optimizer slices and copies, then sampling.

    pass over all layers [decode | prefill | fused window] -> logits | units | optimizer slices | copies | sampling

Sampling comes last, so that an iteration waits for the device only once: when it reads the tokens, or at its end if there are
none. Owns no policy.
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
from coserve.engine.requests import LiveRequest
from coserve.runtime.fused import TrainWindow
from coserve.runtime.sampler import SamplerRow, prompt_logprobs, sample_rows
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


class StepRunner:
    """Runs plans on a device."""

    def __init__(self, device: EngineDevice, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = device, clock

    @torch.no_grad()
    def run(self, plan: StepPlan, lookup: Lookup) -> StepResult:
        """Runs one iteration. If a job's unit, slice or copy raises, only that job is told (`LiveJob.fail`). Raises RankFailed,
        which such an error becomes where several ranks share the model."""
        started = self.clock()
        spans, logits = self._pass(plan, lookup)
        for work in plan.units:
            if not work.fused:
                self._guard(lookup, work, lambda work=work: self._unit(work, lookup))  # type: ignore[misc]
        for part in plan.optimizer:
            self._try(lookup.jobs[part.job], lambda part=part: lookup.jobs[part.job].optimize(part))  # type: ignore[misc]
        for copy in plan.copies:
            if copy.job in lookup.jobs:
                self._try(lookup.jobs[copy.job], lambda copy=copy: lookup.jobs[copy.job].copy_adapter(copy))  # type: ignore[misc]
        tokens, prompts = self._sample(spans, logits, lookup)
        if not tokens and not prompts:  # nothing was read from the device, whose time counts
            self.device.wait()
        return StepResult(tokens=tokens, prompt_logprobs=prompts, seconds=self.clock() - started)

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

    def _pass(self, plan: StepPlan, lookup: Lookup) -> tuple[list[Span], Tensor | None]:
        """The spans in batch order, and the logits [rows that need them, V] in the same order; None if no row needs any."""
        window = self._window(plan, lookup)
        if not plan.spans:
            return [], None
        decode, prefill = (
            sorted(
                (s for s in part if s.request in lookup.requests), key=lambda s: (lookup.requests[s.request].slot, s.end)
            )
            for part in (plan.decode, plan.prefill)
        )
        spans = [*decode, *prefill]
        ids: list[int] = []
        for span in spans:
            ids += self._ids(lookup.requests[span.request], span)
        rows = [[self._row_span(span, lookup) for span in part] for part in (decode, prefill)]
        self._run_pass(ids, rows, window, plan.fused, lookup)
        chosen: list[int] = []
        end = 0
        for span in spans:
            end += span.length
            chosen += range(end - span.logits, end)
        return spans, self.device.logits(chosen) if chosen else None

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

    @staticmethod
    def _row_span(span: Span, lookup: Lookup) -> RowSpan:
        return RowSpan(span.start, span.end, lookup.tables(span.request), lookup.requests[span.request].slot)

    # --- tokens ---

    def _sample(
        self, spans: Sequence[Span], logits: Tensor | None, lookup: Lookup
    ) -> tuple[dict[int, list[Sampled]], dict[int, list[TokenLogprob]]]:
        tokens: dict[int, list[Sampled]] = {}
        prompts: dict[int, list[TokenLogprob]] = {}
        if logits is None:
            return tokens, prompts
        chosen: list[int] = []
        rows: list[SamplerRow] = []
        sampled: list[int] = []
        first = 0
        for span in spans:
            request = lookup.requests[span.request]
            if span.logits > 1 or (span.logits and request.state.every_logit):
                prompts[span.request] = self._prompt_logprobs(request, span, logits[first : first + span.logits])
            first += span.logits
            if span.samples:
                chosen.append(first - 1)
                state = request.state
                position = len(state.prompt) + len(state.output)
                rows.append(SamplerRow(request.sampling, request.seed, position, state.prompt, state.output, request.ending))
                sampled.append(span.request)
        if not rows:
            return tokens, prompts
        if len(chosen) < logits.shape[0]:
            logits = logits[to_device(chosen, logits.device)]
        for number, result in zip(sampled, sample_rows(logits, rows), strict=True):
            tokens[number] = [result]
        return tokens, prompts

    @staticmethod
    def _prompt_logprobs(request: LiveRequest, span: Span, logits: Tensor) -> list[TokenLogprob]:
        """Log-probabilities of the prompt tokens that the span's rows with logits predict."""
        following = request.state.prompt[span.end - span.logits + 1 : span.end + 1]
        count = request.sampling.prompt_logprobs or 0
        return prompt_logprobs(logits[: len(following)], following, count) if following else []
