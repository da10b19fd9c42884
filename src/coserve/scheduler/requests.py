"""A request as the scheduler sees it: integers, deadlines, and where its tokens are.

    prompt + output (committed) | in flight (sampled by plans that are not committed yet)
    0 ......... computed ....................................... total
                 ^ the next span starts here; decoding when only the last token is left to compute
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from coserve.core import Span
from coserve.scheduler.prefix import PrefixKey

RESERVES = 2.0
"""Tokens run ahead of their deadlines by RESERVES x reserve x the TPOT objective, at most by one objective. So an error in the
last prediction does not make the last token late."""
RAMP_TOKENS = 8
"""That lead is built up over a request's first RAMP_TOKENS tokens, so that a new request doesn't stop finetuning."""


@dataclass(slots=True, kw_only=True)
class RequestState:
    """One output of one request. Times are seconds of the engine's clock.

    ttft_s, tpot_s: its objectives; math.inf where it has none (best effort). key: what its prefix may be shared under.
    cacheable: whether it may take cached blocks; prompt logprobs need every row. given: how many first tokens of its output
    were sampled elsewhere; it is served like one that was preempted behind them. computed: how many of its first tokens have
    their K and V in the cache or in a plan. every_logit: whether the logits of each of its prompt's rows are wanted, once.
    logits_planned: of how many first rows they have been planned. begun_s: when its first row was planned. fcfs_s: when it
    would have its first token if requests were served as they come (fairness.py). uncached_tokens: what the prefix cache did
    not have of its prompt when it came. cached_tokens: what it had when the request last began to run.
    """

    id: int
    tenant: str
    prompt: Sequence[int]
    max_tokens: int
    key: PrefixKey
    arrival_s: float
    ttft_s: float
    tpot_s: float
    cacheable: bool = True
    every_logit: bool = False
    given: int = 0
    output: list[int] = field(default_factory=list)
    computed: int = 0
    logits_planned: int = 0
    in_flight: int = 0
    begun_s: float | None = None
    fcfs_s: float = math.inf
    first_token_s: float | None = None
    running: bool = False
    uncached_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0

    @property
    def total(self) -> int:
        """Tokens so far, those in flight included."""
        return len(self.prompt) + len(self.output) + self.in_flight

    @property
    def num_sampled(self) -> int:
        return len(self.output) + self.in_flight

    @property
    def decoding(self) -> bool:
        """Whether its next span is one sampled token."""
        sampled = len(self.output) + self.in_flight
        return sampled > 0 and self.computed == len(self.prompt) + sampled - 1

    @property
    def prompt_left(self) -> int:
        """Tokens to compute before its next one can be sampled, as far as the prefix cache is known to lack them; 0 while it
        decodes."""
        if not self.running:
            return self.uncached_tokens
        return 0 if self.decoding or self.sampled_enough else self.total - self.computed

    @property
    def sampled_enough(self) -> bool:
        """Whether no more tokens may be sampled."""
        return len(self.output) + self.in_flight >= self.max_tokens

    def next_span(self, length: int) -> Span:
        """The span of its next `length` tokens. It samples a token if it reaches the last one."""
        end = self.computed + length
        last = end == self.total
        logits = int(last)
        if self.every_logit and self.logits_planned < len(self.prompt):
            logits = max(logits, end - max(self.computed, self.logits_planned))
        return Span(self.id, self.computed, length, logits, last)

    def advance(self, span: Span) -> None:
        """Goes on behind a span that was planned."""
        end = span.start + span.length
        self.computed = end
        if end > self.logits_planned:
            self.logits_planned = end
        self.in_flight += span.samples

    def begin_tokens(self, now: float) -> None:
        """Its first token here has come. If it came with others, deadlines go on as if those had been in time."""
        self.first_token_s = now
        if self.given and self.tpot_s < math.inf:
            self.first_token_s -= self.given * self.tpot_s

    def tokens(self) -> list[int]:
        """Committed tokens."""
        return [*self.prompt, *self.output]

    @property
    def deadline_s(self) -> float:
        """When its next token is due, in seconds of the engine's clock; math.inf if nothing is due (best effort)."""
        if self.first_token_s is None:
            return self.arrival_s + self.ttft_s
        return self.first_token_s + self.num_sampled * self.tpot_s

    def slack_s(self, now: float, reserve: float, prompt_s: float = 0.0) -> float:
        """Seconds that its next token may take.

        reserve: the relative error of a prediction that its tokens' lead allows for. prompt_s: the time of somebody's prompt
        that may come before its last token. That time is put aside evenly over its tokens.
        """
        sampled, tpot_s = len(self.output) + self.in_flight, self.tpot_s
        deadline_s = (
            self.arrival_s + self.ttft_s if self.first_token_s is None else self.first_token_s + sampled * tpot_s)
        if deadline_s == math.inf:
            return math.inf
        ahead = 0.0
        if tpot_s < math.inf:
            ahead = min(1.0, RESERVES * reserve) * (sampled / RAMP_TOKENS if sampled < RAMP_TOKENS else 1.0) * tpot_s
        return deadline_s - ahead - prompt_s * sampled / self.max_tokens - now

    def margins(self, now: float, reserve: float, token_s: float, prompt_s: float) -> tuple[float, float, float]:
        """`slack_s` without a prompt, `prompt_share_s` and `feasible_until_s` at once: each iteration asks every request."""
        first_s, tpot_s = self.first_token_s, self.tpot_s
        if first_s is None or tpot_s == math.inf:
            return self.slack_s(now, reserve), self.prompt_share_s(prompt_s), self.feasible_until_s(token_s)
        sampled, most = len(self.output) + self.in_flight, self.max_tokens
        ahead = min(1.0, RESERVES * reserve) * (sampled / RAMP_TOKENS if sampled < RAMP_TOKENS else 1.0) * tpot_s
        slack = first_s + sampled * tpot_s - ahead - now
        return slack, prompt_s * sampled / most, first_s + (most - 1) * tpot_s - (most - sampled) * token_s

    def prompt_share_s(self, prompt_s: float) -> float:
        """The part of a prompt's time that is put aside by now."""
        return prompt_s * (len(self.output) + self.in_flight) / self.max_tokens

    def infeasible(self, now: float, token_s: float) -> bool:
        """Whether it will miss its objective even if each of its tokens takes only `token_s` from now on."""
        return now > self.feasible_until_s(token_s)

    def feasible_until_s(self, token_s: float) -> float:
        """The time after which it is infeasible, in seconds of the scheduler's clock."""
        if self.first_token_s is None:
            return self.arrival_s + self.ttft_s
        if self.tpot_s == math.inf:
            return math.inf
        left = self.max_tokens - (len(self.output) + self.in_flight)
        return self.first_token_s + (self.max_tokens - 1) * self.tpot_s - left * token_s
