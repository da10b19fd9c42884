"""The hybrid token scheduler: what each iteration runs, so that requests keep their deadlines and jobs get all the rest.

    budget = least slack of running requests, a reserve kept back, at most the ITL cap; if none runs, the preemption quantum
    |-- decode --|-- prefill, earliest TTFT deadline first --|-- finetuning units ------------|

State advances when a plan is made, not when it is committed: plan n + 1 may be made before plan n's tokens are known.
Policies other than `coserve` are settings of the same code (policies.py). Owns: the order and size of work. Does not own:
tensors, texts, what tokens mean, when a request has ended, how long an iteration may be (deadlines.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence

from coserve.config.settings import SchedulerConfig
from coserve.core import AdapterCopy, CapacityError, Contents, PassCost, Span, StepPlan
from coserve.scheduler.blocks import BlockPool
from coserve.scheduler.deadlines import Deadlines
from coserve.scheduler.fairness import TokenCounters
from coserve.scheduler.latency import LatencyModel, kind_of
from coserve.scheduler.policies import Policy, Turn
from coserve.scheduler.prefix import PrefixKey
from coserve.scheduler.requests import RequestState
from coserve.scheduler.seats import FREE_SEATS
from coserve.scheduler.slo import best_effort, default_slo, profile_slo
from coserve.scheduler.turns import FairTurns
from coserve.scheduler.units import Chosen, UnitPicker
from coserve.scheduler.waiting import WaitingRequests, by_arrival, by_deadline, is_overdue
from coserve.scheduler.work import JobWork, MicrobatchWork

LEAST_CHUNK = 16
"""Prompt tokens below which a chunk waits for a larger one."""
PROMPT_STEP = 0.1
"""Share by which a new request moves the mean time that prompts take."""
MOST_SKIPPED = 16
"""Prompts behind one that waits for slack, among which late ones are looked for."""
LATE = 0.8
"""Share of its TTFT objective after which a prompt that waits beside jobs is late."""


class HybridScheduler:
    """Requests and jobs of one engine. An iteration's work grows with those that run, not with those that wait."""

    def __init__(self, config: SchedulerConfig, latency: LatencyModel, pool: BlockPool, num_layers: int) -> None:
        self.config, self.latency, self.pool = config, latency, pool
        profile = profile_slo(latency)
        self.objectives = default_slo(config, profile)
        """Of requests that set none."""
        self.policy, self.deadlines = Policy(config.policy), Deadlines(config, latency, best_effort(self.objectives, profile))
        self.picker = UnitPicker(latency, num_layers, config.max_window_tokens)
        self.requests: dict[int, RequestState] = {}
        self.jobs: dict[int, JobWork] = {}
        self.tenants, self.trainers, self.job_counters = TokenCounters(), TokenCounters(), TokenCounters()
        """Of tenants, what their requests and what their jobs have had: finetuning takes what inference leaves, so that it
        doesn't count against a tenant's requests."""
        self.num_preemptions = 0
        self._copies: list[AdapterCopy] = []
        self._running: dict[int, RequestState] = {}
        self._waiting = WaitingRequests()
        self._turns = FairTurns()
        self._typical_prompt_s = 0.0
        self.seats = FREE_SEATS
        self._parked: dict[PrefixKey, dict[int, RequestState]] = {}
        """Requests that wait for a seat, by the adapter version in their keys: out of the way of all others."""
        self._by_tenant: Counter[str] = Counter()
        self._number = 0
        self._awake: set[int] = set()
        self._owed_s = 0.0

    # --- requests and jobs ---

    def add_request(self, request: RequestState) -> None:
        """A request waits for its first span."""
        self._enter_tenant(request.tenant)
        self._by_tenant[request.tenant] += 1
        self.requests[request.id] = request
        seconds = self._prompt_seconds(request)
        self._typical_prompt_s += PROMPT_STEP * (seconds - self._typical_prompt_s)
        request.fcfs_s = self._turns.enter(request.tenant, request.arrival_s, seconds, len(self._by_tenant))
        self._waiting.add(request)

    def remove_request(self, number: int) -> RequestState | None:
        """A request ended or was cancelled: its blocks are free, tokens in flight are dropped at their commit."""
        request = self.requests.pop(number, None)
        if request is None:
            return None
        self._by_tenant[request.tenant] -= 1
        if not self._by_tenant[request.tenant]:
            del self._by_tenant[request.tenant]
            self._turns.leave(request.tenant)
        if request.running:
            del self._running[number]
            self.pool.free(number)
            self.seats.unclaim(request, has_run=True)
        else:
            self._waiting.discard(request)
            parked = self._parked.get(request.key, {})
            if parked.pop(number, None) is not None and not parked:
                del self._parked[request.key]
        return request

    def unpark(self, adapter: str, version: int) -> None:
        """Requests of an adapter version that waited for a seat may ask again, each in its tenant's order."""
        for key in [key for key in self._parked if (key.adapter, key.version) == (adapter, version)]:
            for request in self._parked.pop(key).values():
                self._waiting.add(request)

    def add_job(self, job: JobWork) -> None:
        """A job may get units."""
        self.jobs[job.id] = job

    def remove_job(self, number: int) -> None:
        """A job ended."""
        self.jobs.pop(number, None)
        self._awake.discard(number)
        self.job_counters.leave(number)

    def add_microbatch(self, work: MicrobatchWork) -> None:
        """A micro-batch of a job has its memory and may get units."""
        self.jobs[work.job].microbatches[work.id] = work

    def copy_adapter(self, copy: AdapterCopy) -> None:
        """The next plan carries the copy."""
        self._copies.append(copy)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + sum(map(len, self._parked.values()))

    # --- one iteration ---

    def schedule(self, now: float) -> StepPlan:
        """The next plan; it is empty if there is nothing to do."""
        jobs = self._active_jobs()
        works = [work for job in jobs for work in job.microbatches.values()]
        only = self.policy.microbatch(works)
        has_finetuning = any(work.ready for work in works) or any(job.optimizer_left for job in jobs)
        turn = self.policy.turn(self._has_inference(), has_finetuning, self._can_wait(jobs, only, now))
        decode: list[Span] = []
        prefill: list[Span] = []
        running = self._running.values()
        budget = self.deadlines.for_prompts(running, now)
        spare = self.deadlines.for_jobs(running, now, self._typical_prompt_s)
        if turn is not Turn.FINETUNING:
            self._share_places(now)
            decode = self._decode()
            prefill, waits = self._prefill(now, decode, budget)
            spare = 0.0 if waits or self._others_late(now) else spare
        cost = self._pass_cost(decode, prefill)
        chosen = self._finetune(now, turn, jobs, only, spare, cost)
        copies, self._copies = tuple(self._copies), []
        elements = sum(part.end - part.start for part in chosen.optimizer)
        contents = Contents(chosen.inference, chosen.costs, elements, chosen.refresh_seconds)
        predicted_s = self.latency.seconds(contents)
        plan = StepPlan(
            number=self._number, decode=tuple(decode), prefill=tuple(prefill), units=chosen.units, optimizer=chosen.optimizer,
            copies=copies, kind=kind_of(contents), contents=contents, predicted_s=predicted_s,
            finetune_share=chosen.seconds / predicted_s if predicted_s > 0 else 0.0,
        )
        if not plan.empty:
            self._number += 1
            self.policy.planned(plan)
            self._account(plan, chosen, has_finetuning)
        return plan

    def commit(self, plan: StepPlan, tokens: Mapping[int, Sequence[int]], now: float, seconds: float) -> None:
        """A plan has run. tokens: per request, what was sampled; seconds: what it took. Requests that are gone are left out."""
        for span in plan.spans:
            request = self.requests.get(span.request)
            if request is None:
                continue
            if span.samples:
                request.in_flight -= 1
                request.output += tokens[span.request]
                if request.first_token_s is None:
                    request.first_token_s = now
            if request.running:
                self._seal(request, span)
        contents = plan.contents
        if contents.inference or contents.units or contents.optimizer_elements:
            self.latency.observe(contents, seconds)

    def _seal(self, request: RequestState, span: Span) -> None:
        """Blocks that the span filled may be shared. A request that was preempted meanwhile has only what it computed since."""
        size, end = self.pool.block_tokens, min(span.end, request.computed)
        if end // size > span.start // size:
            tokens = request.tokens()
            self.pool.seal(request.id, request.key, tokens, min(end, len(tokens)))

    def _has_inference(self) -> bool:
        return self.policy.inference and bool(self.requests)

    def _active_jobs(self) -> list[JobWork]:
        """Jobs that may get units: those of the tenant that has had least, the one that has had least among them first."""
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

    def _enter_tenant(self, tenant: str) -> None:
        """A tenant has something more to run. Only one that had nothing is lifted to the others' level: whoever is behind
        and asks again keeps what it is owed."""
        if tenant not in self._by_tenant:
            self.tenants.enter(tenant, self._by_tenant)

    def _can_wait(self, jobs: Sequence[JobWork], work: MicrobatchWork | None, now: float) -> bool:
        """Whether every request is running and can wait while the micro-batch, or without one the jobs' optimizer steps, run
        from end to end. One that nothing is due to can, once requests have had as much time as that."""
        if not self.policy.adapts:
            return False
        if work is not None:
            seconds = self.picker.whole_seconds(work)
        else:
            stepping = [job for job in jobs if job.optimizer_left]
            lefts = ((job.optimizer_left, job.refreshing(job.optimizer_left)) for job in stepping)
            seconds = sum(self.latency.optimizer_seconds(*left) for left in lefts)
        reserve = self.deadlines.reserve()
        had = self.policy.inference_s >= seconds
        return not self._waiting and all(
            r.slack_s(now, reserve) > seconds and (had or r.deadline_s < math.inf) for r in self._running.values()
        )

    def _pass_cost(self, decode: Sequence[Span], prefill: Sequence[Span]) -> PassCost | None:
        if not decode and not prefill:
            return None
        rows = len(decode) + sum(span.length for span in prefill)
        pairs = sum(span.length * (span.start + span.end + 1) // 2 for span in prefill)
        keys = {self.requests[span.request].key for span in (*decode, *prefill)}
        head_rows = sum(span.logits for span in (*decode, *prefill))
        adapters = sum(key.adapter is not None for key in keys)
        context = sum(span.end for span in decode)
        return PassCost(rows, head_rows, len(decode), context, pairs, 0, 0, 0, adapters, len(prefill))

    # --- inference ---

    def _decode(self) -> list[Span]:
        """One token of every running request whose prompt is through. Without memory one is preempted."""
        spans: list[Span] = []
        busy: set[int] = set()
        ready = sorted((r for r in self._running.values() if r.decoding), key=lambda r: (r.arrival_s, r.id))
        for request in ready:
            if not request.running or request.sampled_enough or not self._grow(request, request.total, busy):
                continue
            busy.add(request.id)
            spans.append(request.next_span(1))
            request.take(spans[-1])
        return spans

    def _grow(self, request: RequestState, num_tokens: int, busy: Container[int] | None) -> bool:
        """Blocks for a request, if need be at the expense of the most served tenant's latest arrivals; False if there are none.

        busy: requests with spans in this plan, which can't be preempted; None: nobody can.
        """
        while True:
            try:
                self.pool.allocate(request.id, num_tokens)
                return True
            except CapacityError:
                others = [] if busy is None else [r for r in self._running.values() if r.id not in busy]
                victim = max(others, key=lambda r: (self.tenants.served(r.tenant), r.arrival_s, r.id), default=None)
                if victim is None or (victim is request and busy):
                    return False  # it waits, while those in the plan go on
                self.preempt(victim)
                if victim is request:
                    return False

    def preempt(self, request: RequestState) -> None:
        """Takes a request's memory; it waits, and its tokens are computed again under the adapter version it began with."""
        self._release(request, has_run=True)
        request.preemptions += 1
        self.num_preemptions += 1

    def _prefill(self, now: float, decode: Sequence[Span], budget: float) -> tuple[list[Span], bool]:
        """Chunks of prompts, as long as the pass stays in its budget, or in what a late prompt may take; and whether a prompt
        waits for running requests to gain slack. One that does holds up those behind it, but for late ones of its tenant."""
        spans: list[Span] = []
        running = list(self._running.values())
        blocked, skipped, first = False, 0, ""

        def has_place() -> bool:
            return not blocked and skipped <= MOST_SKIPPED and len(running) < self.config.max_num_seqs

        for request in self._prompts(now, has_place):
            if len(decode) + sum(span.length for span in spans) >= self.config.max_num_batched_tokens:
                break
            late = self._late(request, now)
            if skipped and not (late and request.tenant == first):
                skipped += 1
                continue
            limit, most = self._limits(request, running, now, budget, late=late) if decode else (budget, budget)
            was_running = request.running
            if not was_running and not self._admit(request):
                continue
            chunk = self._chunk(request, decode, spans, limit)
            wanted = self._even_part(request, self._chunk(request, decode, spans, most))
            chunk, short = min(chunk, wanted), limit < most and chunk < wanted
            busy = {span.request for span in (*decode, *spans)}
            if short or not chunk or not self._grow(request, request.computed + chunk, busy if was_running else None):
                if not was_running:
                    self._release(request)
                if short or not chunk:
                    skipped, first = skipped + 1, first or request.tenant
                else:
                    blocked = True
                continue
            if not was_running:
                running.append(request)
            if request.begun_s is None:
                request.begun_s = now
            span = request.next_span(chunk)
            spans.append(span)
            request.take(span)
        return spans, skipped > 0

    def _limits(
        self, request: RequestState, running: Sequence[RequestState], now: float, budget: float, *, late: bool
    ) -> tuple[float, float]:
        """What a pass with this prompt may take, and what it is worth to wait for."""
        served = self.tenants.served(request.tenant)
        others = [r for r in running if r.tenant != request.tenant and self.tenants.served(r.tenant) <= served]
        spared = self.deadlines.for_others_prompts(others, now, self._typical_prompt_s)
        limit = spared if late else min(budget, spared)
        return limit, max(limit, min(self.deadlines.cap(running), spared))

    def _share_places(self, now: float) -> None:
        """Where every place is taken, a waiting tenant that has fewer than its share of them gets one from the tenant that has
        most; its latest request waits then, and finds most of its prefix in the cache when it goes on."""
        if not self._waiting or self.num_running < self.config.max_num_seqs:
            return
        first = next(self._waiting.in_order(self.tenants.served, self._waiting.overdue(now)), None)
        if first is None:
            return
        held = Counter(request.tenant for request in self._running.values())
        tenant, most = held.most_common(1)[0]
        share = self.config.max_num_seqs // len(self._by_tenant)
        if held[first.tenant] < share < most:
            others = (request for request in self._running.values() if request.tenant == tenant)
            self.preempt(max(others, key=lambda request: (request.arrival_s, request.id)))

    def _late(self, request: RequestState, now: float) -> bool:
        """Whether a prompt would be through by now, first come, first served: running requests then wait for it. Beside jobs,
        which leave running requests no more slack than they need, not before most of its own objective has passed, or of the
        profile's if it has none."""
        ttft_s = request.ttft_s if request.ttft_s < math.inf else self.deadlines.best_effort.ttft_s
        allowed_s = request.arrival_s + LATE * ttft_s if self._awake else 0.0
        return now > max(request.fcfs_s, allowed_s)

    def _others_late(self, now: float) -> bool:
        """Whether the next of those that wait for a place is late: jobs then leave the machine to those who have one."""
        first = next(self._waiting.in_order(self.tenants.served, self._waiting.overdue(now)), None)
        return first is not None and self._late(first, now)

    def _prompt_seconds(self, request: RequestState) -> float:
        """What a request's prompt, less what the prefix cache has of it, adds to a pass."""
        cached = self.pool.match(request.key, request.tokens()) if request.cacheable else 0
        rows = len(request.prompt) - cached
        pairs = rows * (2 * cached + rows + 1) // 2
        least, whole = PassCost(1, 1, 0, 0, 1, 0, 0, 0, 0, 1), PassCost(rows, 1, 0, 0, pairs, 0, 0, 0, 0, 1)
        return self.latency.pass_seconds(whole) - self.latency.pass_seconds(least)

    def _prompts(self, now: float, has_place: Callable[[], bool]) -> Iterator[RequestState]:
        """Requests whose prompts are not through, in the order in which they get rows. Without a place only those that run:
        they must go on, or they never give their memory back."""

        begun = [r for r in self._running.values() if not r.decoding and not r.sampled_enough and not r.in_flight]
        overdue = {r.tenant for r in begun if is_overdue(r, now)} | self._waiting.overdue(now)

        def precedence(request: RequestState) -> tuple[float, float, int]:
            key = by_arrival if request.tenant in overdue else by_deadline
            return self.tenants.served(request.tenant), *key(request)

        waiting = self._waiting.in_order(self.tenants.served, overdue) if has_place() else iter(())
        first = next(waiting, None)
        for request in sorted(begun, key=precedence):
            before = precedence(request)
            while first is not None and has_place() and precedence(first) < before:
                yield first
                first = next(waiting, None)
            if request.running or has_place():
                yield request
        while first is not None and has_place():
            yield first
            first = next(waiting, None)

    @staticmethod
    def _even_part(request: RequestState, most: int) -> int:
        """Tokens of the next chunk, if what is left of a prompt is cut evenly into as few chunks of at most `most` as it takes:
        many small chunks cost more than a few large ones, so they wait until running requests have gained slack."""
        left = request.total - request.computed
        return -(-left // -(-left // most)) if most else 0

    def _admit(self, request: RequestState) -> bool:
        """A waiting request takes its seat and what the prefix cache has of it; False if there is no seat."""
        if not self.seats.claim(request):
            self._waiting.discard(request)
            self._parked.setdefault(request.key, {})[request.id] = request
            return False
        prefix = request.tokens() if request.cacheable else []
        request.computed = request.cached_tokens = self.pool.acquire(request.id, request.key, prefix)
        request.running = True
        self._waiting.discard(request)
        self._running[request.id] = request
        return True

    def _release(self, request: RequestState, *, has_run: bool = False) -> None:
        self.pool.free(request.id)
        request.running, request.computed = False, 0
        del self._running[request.id]
        self._waiting.add(request)
        self.seats.unclaim(request, has_run=has_run)

    def _chunk(self, request: RequestState, decode: Sequence[Span], spans: Sequence[Span], seconds: float) -> int:
        """The most tokens of a prompt whose pass is predicted to stay within `seconds`."""
        room = self.config.max_num_batched_tokens - len(decode) - sum(span.length for span in spans)
        most = min(request.total - request.computed, room)
        least = min(most, LEAST_CHUNK)

        def fits(chunk: int) -> bool:
            span = request.next_span(chunk)
            cost = self._pass_cost(decode, [*spans, span])
            assert cost is not None
            return self.latency.pass_seconds(cost) + self.latency.constant_seconds <= seconds

        if most <= 0:
            return 0
        if fits(most):
            return most
        if not fits(least):
            return 0 if decode or spans else least  # alone, a chunk always runs
        low, high = least, most
        while high - low > 8:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    # --- finetuning ---

    def _finetune(
        self, now: float, turn: Turn, jobs: Sequence[JobWork], only: MicrobatchWork | None, spare: float, cost: PassCost | None
    ) -> Chosen:
        base = 0.0 if cost is None else self.latency.pass_seconds(cost)
        left = self.policy.seconds(turn, spare - base - self.latency.constant_seconds)
        left = max(min(left, self.config.preemption_quantum_ms / 1e3), self._owed_s)
        if left <= 0 or not jobs or turn is Turn.INFERENCE:
            return Chosen((), (), (), cost, 0.0, {})
        patient = turn is Turn.BOTH and cost is not None

        def stretch(overdue: bool) -> float:
            most = self.deadlines.stretched(self._running.values(), now, overdue=overdue)
            return most - base - self.latency.constant_seconds

        return self.picker.pick(jobs, left, cost, fuse=self.policy.fuses, patient=patient, only=only, stretch=stretch)

    def _account(self, plan: StepPlan, chosen: Chosen, has_finetuning: bool) -> None:
        """Charges tenants and jobs for what they get. Jobs that had units are owed what they got less than their floor."""
        for span in plan.spans:
            self.tenants.charge(self.requests[span.request].tenant, span.length)
        for job, tokens in chosen.tokens.items():
            self.job_counters.charge(job, tokens)
            self.trainers.charge(self.jobs[job].tenant, tokens)
        if has_finetuning:
            due = self.config.finetune_min_share * plan.predicted_s - chosen.seconds
            self._owed_s = min(max(0.0, self._owed_s + due), self.config.preemption_quantum_ms / 1e3)
