"""The hybrid token scheduler: what each iteration runs, so that requests keep their deadlines and jobs get all the rest.

    budget = least slack of running requests, less a reserve, at most the ITL cap; the preemption quantum if none runs
    |-- decode --|-- prefill, earliest TTFT deadline first --|-- finetuning units ------------|

State advances when a plan is made, not when it is committed, so that plan n + 1 may be made before plan n's tokens are known.
Policies other than `coserve` are settings of the same code (policies.py).

Owns: which requests and jobs there are, what a plan holds, its commit. Does not own: which prompts come (prompts.py), which
requests run (admission.py), which units fit (units.py), how long an iteration may be (deadlines.py); tensors, texts, what
tokens mean, when a request has ended.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import attrgetter

from coserve.config.settings import SchedulerConfig
from coserve.core import AdapterCopy, Contents, PassCost, Span, StepPlan
from coserve.scheduler.admission import Admission
from coserve.scheduler.blocks import BlockPool
from coserve.scheduler.deadlines import Deadlines
from coserve.scheduler.fairness import ElsewhereCharges, FairTurns, TokenCounters
from coserve.scheduler.latency import LatencyModel, kind_of
from coserve.scheduler.policies import Policy, Turn
from coserve.scheduler.prompts import PassDraft, PromptPicker
from coserve.scheduler.requests import RequestState
from coserve.scheduler.riding import FreeRows
from coserve.scheduler.slo import asked_slo, best_effort, profile_slo
from coserve.scheduler.units import Chosen, UnitPicker
from coserve.scheduler.work import JobWork, MicrobatchWork


class HybridScheduler:
    """Requests and jobs of one engine. An iteration's work grows with those that run, not with those that wait."""

    def __init__(self, config: SchedulerConfig, latency: LatencyModel, pool: BlockPool, num_layers: int) -> None:
        self.config, self.latency, self.pool = config, latency, pool
        profile = profile_slo(latency)
        self.slo = asked_slo(config.tpot_ms, config.ttft_ms, profile)
        """Of requests that set none."""
        self.policy, self.deadlines = Policy(config.policy), Deadlines(config, latency, best_effort(self.slo, profile))
        self.tenants, self.trainers, self.job_counters = TokenCounters(), TokenCounters(), TokenCounters()
        """What tenants have had for their requests, what tenants have had for their jobs, and what each job has had. Jobs don't
        count against their tenant's requests, since finetuning takes only what inference leaves."""
        self._elsewhere = ElsewhereCharges(self.tenants)
        self.admission = Admission(pool, self.tenants)
        self.prompts = PromptPicker(config, latency, self.deadlines, self.admission)
        self.picker = UnitPicker(latency, num_layers, config.max_window_tokens)
        self.requests: dict[int, RequestState] = {}
        self.jobs: dict[int, JobWork] = {}
        self._copies: list[AdapterCopy] = []
        self._turns = FairTurns()
        self._by_tenant: Counter[str] = Counter()
        self._number = 0
        self._awake: set[int] = set()
        """Jobs that could get units in the last iteration."""
        self._owed_s = 0.0
        """What jobs got less than their least share of the time, at most a preemption quantum."""

    # --- requests and jobs ---

    def add_request(self, request: RequestState) -> None:
        """A new request waits for its first span.

        Its tenant's counter is lifted to the others' level only if the tenant had no requests. One that is behind and asks
        again keeps what it is owed.
        """
        if request.tenant not in self._by_tenant:
            self.tenants.enter(request.tenant, self._by_tenant)
        self._by_tenant[request.tenant] += 1
        self.requests[request.id] = request
        seconds = self.prompts.expect(request)
        request.fcfs_s = self._turns.enter(request.tenant, request.arrival_s, seconds, len(self._by_tenant))
        self.admission.waiting.add(request)

    def remove_request(self, number: int) -> None:
        """Forgets a request that ended or was cancelled, and frees its blocks. Its tokens in flight are dropped at commit."""
        request = self.requests.pop(number, None)
        if request is None:
            return
        self._by_tenant[request.tenant] -= 1
        if not self._by_tenant[request.tenant]:
            del self._by_tenant[request.tenant]
            self._turns.leave(request.tenant)
        self.admission.remove(request)

    def add_job(self, job: JobWork) -> None:
        """A job may get units."""
        self.jobs[job.id] = job

    def remove_job(self, number: int) -> None:
        """Forgets a job that ended."""
        self.jobs.pop(number, None)
        self._awake.discard(number)
        self.job_counters.leave(number)

    def add_microbatch(self, work: MicrobatchWork) -> None:
        """A micro-batch of a job has its memory and may get units."""
        self.jobs[work.job].microbatches[work.id] = work

    def microbatch(self, number: int) -> MicrobatchWork:
        """The micro-batch with this number, of whichever job."""
        return next(job.microbatches[number] for job in self.jobs.values() if number in job.microbatches)

    def copy_adapter(self, copy: AdapterCopy) -> None:
        """The next plan carries the copy."""
        self._copies.append(copy)

    def charge_elsewhere(self, tokens: Mapping[str, int]) -> None:
        """Tenants were served so many tokens by other engines, which counts for their turns here."""
        self._elsewhere.charge(tokens, self._by_tenant)

    @property
    def num_running(self) -> int:
        return len(self.admission.running)

    @property
    def num_waiting(self) -> int:
        return self.admission.num_waiting

    # --- one iteration ---

    def schedule(self, now: float) -> StepPlan:
        """The next plan; it is empty if there is nothing to do."""
        jobs = self._active_jobs()
        works = [work for job in jobs for work in job.microbatches.values()]
        only = self.policy.microbatch(works)
        has_finetuning = any(work.ready for work in works) or any(job.optimizer_left for job in jobs)
        has_inference = self.policy.inference and bool(self.requests)
        turn = self.policy.turn(has_inference, has_finetuning, self._can_wait(jobs, only, now))
        budget, spare = self.deadlines.limits(self.admission.running.values(), now, self.prompts.typical_s)
        draft, free = PassDraft(), None
        if turn is not Turn.FINETUNING:
            self.prompts.share_places(now, len(self._by_tenant))
            self._decode(draft)
            if self.policy.fuses and has_finetuning:
                free = self._free_rows(draft, spare)
            if self.prompts.pick(draft, now, budget, beside_jobs=bool(jobs), free_rows=free.rows if free else 0):
                spare = 0.0
        chosen = self._finetune(now, turn, jobs, only, spare, draft.cost if draft.requests else None, free)
        copies, self._copies = tuple(self._copies), []
        elements = sum(part.end - part.start for part in chosen.optimizer)
        contents = Contents(chosen.inference, tuple(chosen.costs), elements, chosen.refresh_seconds)
        predicted_s = self.latency.seconds(contents)
        plan = StepPlan(
            number=self._number, decode=tuple(draft.decode), prefill=tuple(draft.prefill), units=tuple(chosen.units),
            optimizer=tuple(chosen.optimizer), copies=copies, kind=kind_of(contents), contents=contents,
            predicted_s=predicted_s, finetune_share=chosen.seconds / predicted_s if predicted_s > 0 else 0.0,
        )
        if not plan.empty:
            self._number += 1
            self.policy.on_planned(plan)
            self._account(plan, chosen, has_finetuning)
        return plan

    def commit(self, plan: StepPlan, tokens: Mapping[int, Sequence[int]], now: float) -> None:
        """A plan has given its tokens: what was sampled, by request. That of removed requests is dropped. Where the device
        works beside the host, what follows the pass may still run."""
        size = self.pool.block_tokens
        for span in plan.spans:
            number, start, length, _, samples = span
            request = self.requests.get(number)
            if request is None:
                continue
            if samples:
                request.in_flight -= 1
                request.output += tokens[number]
                if request.first_token_s is None:
                    request.begin_tokens(now)
            if request.running and (start + length) // size > start // size:
                self._seal(request, span)

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A plan is over, and the device took so many seconds for it."""
        contents = plan.contents
        if contents.inference or contents.units or contents.optimizer_elements:
            self.latency.observe(contents, seconds)

    def rest_seconds(self, plan: StepPlan) -> float:
        """Predicts what a plan takes behind its pass."""
        return self.latency.seconds(plan.contents._replace(inference=None)) - self.latency.constant_seconds

    def _seal(self, request: RequestState, span: Span) -> None:
        """The blocks that the span filled, one at least, may be shared from now on. A request that was preempted meanwhile has
        only what it computed since then."""
        tokens, end = request.tokens(), min(span.end, request.computed)
        self.pool.seal(request.id, request.key, tokens, min(end, len(tokens)))

    def _decode(self, draft: PassDraft) -> None:
        """One token of every running request whose prompt is through. Where memory is short, one is preempted."""
        ready = sorted([r for r in self.admission.running.values() if r.decoding], key=attrgetter("arrival_s", "id"))
        size = self.pool.block_tokens
        for request in ready:
            if not request.running or request.sampled_enough:  # an earlier one may have preempted it
                continue
            if request.computed % size == 0 and not self.admission.allocate(request, request.total, draft.requests):
                continue  # else the block of the token before it has room
            if request.every_logit:
                draft.add(request, 1, decode=True)
            else:
                draft.add_decode(request)

    # --- finetuning ---

    def _active_jobs(self) -> list[JobWork]:
        """Jobs that may get units, in order: by what their tenants' jobs have had, then by what they have had themselves, the
        least first."""
        if not self.policy.finetuning:
            return []
        jobs = [job for job in self.jobs.values() if not job.paused]
        for job in jobs:
            if job.id not in self._awake:  # new, or resumed
                self.job_counters.enter(job.id, self._awake, job.weight)
                training = {self.jobs[number].tenant for number in self._awake if number in self.jobs}
                if job.tenant not in training:
                    self.trainers.enter(job.tenant, training)
        self._awake = {job.id for job in jobs}
        return sorted(jobs, key=lambda j: (self.trainers.served(j.tenant), self.job_counters.served(j.id)))

    def _can_wait(self, jobs: Sequence[JobWork], work: MicrobatchWork | None, now: float) -> bool:
        """Under dynamic-temporal: whether requests can wait while what finetuning has next runs from end to end. That is the
        micro-batch, or without one the optimizer steps of the jobs.

        All requests must run and have slack for it. A best-effort request always has; for its sake requests must have had as
        much time before.
        """
        if not self.policy.adapts:
            return False
        if work is not None:
            seconds = self.picker.shapes.whole_seconds(work)
        else:
            stepping = [job for job in jobs if job.optimizer_left]
            lefts = ((job.optimizer_left, job.slice_refresh_seconds(job.optimizer_left)) for job in stepping)
            seconds = sum(self.latency.optimizer_seconds(*left) for left in lefts)
        reserve = self.deadlines.reserve()
        had = self.policy.inference_s >= seconds
        return not self.admission.waiting and all(
            r.slack_s(now, reserve) > seconds and (had or r.deadline_s < math.inf) for r in self.admission.running.values()
        )

    def _free_rows(self, draft: PassDraft, spare: float) -> FreeRows:
        """Training rows that had best ride beside the draft's decode rows. spare: seconds that an iteration with finetuning may
        take. An iteration that has little time for once counts as one of the TPOT objective's length."""
        if not draft.requests:
            return self.picker.riding.free(None)
        tpot_s = self.slo.tpot_s
        return self.picker.riding.free(draft.cost, max(spare, tpot_s) if tpot_s < math.inf else spare)

    def _finetune(
        self, now: float, turn: Turn, jobs: Sequence[JobWork], only: MicrobatchWork | None, spare: float, cost: PassCost | None,
        free: FreeRows | None,
    ) -> Chosen:
        """Units and optimizer slices. only: the one micro-batch whose turn it is. spare: seconds that an iteration with
        finetuning may take. cost: of the requests' part of the pass, None without one. free: training rows that had best ride
        in a pass; None if none may."""
        base = 0.0 if cost is None else self.latency.pass_seconds(cost)
        left = self.policy.seconds(turn, spare - base - self.latency.constant_seconds)
        left = max(min(left, self.deadlines.quantum_s), self._owed_s)
        if left <= 0 or not jobs or turn is Turn.INFERENCE:
            return Chosen(cost)
        patient = turn is Turn.BOTH and cost is not None

        def stretch(overdue: bool) -> float:
            most = self.deadlines.stretched(self.admission.running.values(), now, overdue=overdue)
            return most - base - self.latency.constant_seconds

        return self.picker.pick(jobs, left, cost, free=free, patient=patient, only=only, stretch=stretch)

    def _account(self, plan: StepPlan, chosen: Chosen, has_finetuning: bool) -> None:
        """Charges tenants and jobs for what they get. If there was finetuning work, jobs are owed what they got less than their
        least share."""
        rows: dict[str, int] = {}
        if len(self._by_tenant) == 1 and plan.spans:  # no need to look at each
            rows[next(iter(self._by_tenant))] = len(plan.decode) + sum(span.length for span in plan.prefill)
        else:
            for span in plan.spans:
                tenant = self.requests[span.request].tenant
                rows[tenant] = rows.get(tenant, 0) + span.length
        for tenant, count in rows.items():
            self.tenants.charge(tenant, count)
        for job, tokens in chosen.tokens.items():
            self.job_counters.charge(job, tokens)
            self.trainers.charge(self.jobs[job].tenant, tokens)
        if has_finetuning:
            due = self.config.finetune_min_share * plan.predicted_s - chosen.seconds
            self._owed_s = min(max(0.0, self._owed_s + due), self.deadlines.quantum_s)
