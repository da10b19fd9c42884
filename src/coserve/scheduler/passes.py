"""The requests' part of an inference pass while it is planned: its spans, and what the pass costs so far."""

from __future__ import annotations

from coserve.core import PassCost, Span
from coserve.scheduler.prefix import PrefixKey
from coserve.scheduler.requests import RequestState


class PassDraft:
    """The spans so far. requests: the numbers of their requests. cost: of a pass with these spans."""

    def __init__(self) -> None:
        self.decode: list[Span] = []
        self.prefill: list[Span] = []
        self.requests: set[int] = set()
        self.cost = PassCost(0, 0, 0, 0, 0, 0, 0, 0, 0)
        self._keys: set[PrefixKey] = set()

    def cost_with(self, request: RequestState, span: Span, *, decode: bool = False) -> PassCost:
        """The cost with one more span. decode: it computes a sampled token; otherwise it is a chunk of a prompt."""
        cost, new_adapter = self.cost, request.key.adapter is not None and request.key not in self._keys
        cost = cost._replace(
            rows=cost.rows + span.length, head_rows=cost.head_rows + span.logits,
            adapter_segments=cost.adapter_segments + new_adapter,
        )
        if decode:
            return cost._replace(decode_rows=cost.decode_rows + 1, decode_context=cost.decode_context + span.end)
        pairs = span.length * (span.start + span.end + 1) // 2
        return cost._replace(prefill_pairs=cost.prefill_pairs + pairs, prefill_spans=cost.prefill_spans + 1)

    def add(self, request: RequestState, length: int, *, decode: bool = False) -> None:
        """Plans the request's next `length` tokens."""
        span = request.next_span(length)
        self.cost = self.cost_with(request, span, decode=decode)
        (self.decode if decode else self.prefill).append(span)
        self.requests.add(request.id)
        self._keys.add(request.key)
        request.advance(span)
