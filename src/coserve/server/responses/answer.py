"""A response as it grows: OpenAI's response object, and the events of its stream.

    created, in_progress | events of the output's items | completed, incomplete, or failed and error

A response that isn't streamed is the object that a stream would end with. Owns: the object, the numbers of events, how a
response ends. Does not own: items (output.py), how events are sent (inference/sse.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from coserve.core import CapacityError, CoserveError
from coserve.server.errors import error_body
from coserve.server.inference.deltas import ContentDelta, Delta, OutputReader, ReasoningDelta
from coserve.server.inference.responses import Tally, chat_logprobs
from coserve.server.inference.walk import TokenWalk
from coserve.server.link.messages import Tokens
from coserve.server.records import now
from coserve.server.responses.body import CreateResponse
from coserve.server.responses.output import OutputItems, make_id
from coserve.server.responses.tokens import WritingTokens

Status = Literal["in_progress", "completed", "incomplete", "failed"]
_TOOL_FIELDS = ("name", "description", "parameters", "strict")


class ResponseAnswer:
    """The answer to one body. Its methods yield the events of a stream, each a JSON object with its `type`."""

    def __init__(
        self, body: CreateResponse, model: str, tally: Tally, reader: OutputReader, walk: TokenWalk | None = None
    ) -> None:
        """tally: counts the tokens. reader: reads the output. walk: names tokens, where log-probabilities were asked for."""
        self._body, self._model, self._tally, self._reader, self._walk = body, model, tally, reader, walk
        self._id, self._created_at = make_id("resp"), now()
        self._output = OutputItems()
        self._tokens = WritingTokens()
        self._status: Status = "in_progress"
        self._num_events = 0
        self._last: type[Delta] | None = None

    def push(self, tokens: Tokens) -> Iterator[dict[str, Any]]:
        """Adds new tokens; the last ones end the response."""
        if not self._num_events:
            yield from self._numbered([self._event("response.created"), self._event("response.in_progress")])
        deltas = self._reader.push(tokens.text)
        if tokens.finish_reason:
            deltas += self._reader.finish()
        if self._walk is not None:
            self._tokens.add(chat_logprobs(tokens.logprobs, self._walk)["content"])
        for delta in deltas:
            yield from self._numbered(self._output.push(delta, self._logprobs(delta)))
        if tokens.finish_reason:
            status: Literal["incomplete", "completed"] = "incomplete" if tokens.finish_reason == "length" else "completed"
            yield from self._numbered(self._output.finish(status))
            self._status = status
            yield from self._numbered([self._event(f"response.{status}")])

    def fail(self, error: CoserveError) -> Iterator[dict[str, Any]]:
        """Ends the response with an error. Events about the response are sent only if there were some before."""
        details = error_body(error)["error"]
        if self._num_events:
            yield from self._numbered(self._output.close("incomplete"))
            self._status = "failed"
            code = "rate_limit_exceeded" if isinstance(error, CapacityError) else "server_error"
            yield from self._numbered([self._event("response.failed", {"code": code, "message": details["message"]})])
        flat = {name: details[name] for name in ("code", "message", "param")}
        yield from self._numbered([{"type": "error", **flat, "error": details}])

    def object(self, error: dict[str, Any] | None = None) -> dict[str, Any]:
        """The response object as it is now. error: why it failed."""
        body, status = self._body, self._status
        text, reasoning = body.text, body.reasoning
        return {
            "id": self._id, "object": "response", "created_at": self._created_at, "status": status, "background": False,
            "completed_at": now() if status == "completed" else None, "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "metadata": body.metadata or {},
            "model": self._model, "output": self._output.items if status != "in_progress" else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None,
            "reasoning": {"effort": reasoning and reasoning.effort, "summary": reasoning and reasoning.summary},
            "service_tier": "default", "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": (text and text.format) or {"type": "text"}, "verbosity": (text and text.verbosity) or "medium"},
            "tool_choice": body.tool_choice or "auto",
            "tools": [{"type": "function", **{name: tool.get(name) for name in _TOOL_FIELDS}} for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0, "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled", "usage": self._usage() if status != "in_progress" else None,
        }

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        """Of the tokens that have written a delta of the text."""
        follows, self._last = isinstance(delta, self._last or ()), type(delta)
        if self._walk is None or not isinstance(delta, ContentDelta | ReasoningDelta):
            return []
        return self._tokens.take(delta.text, follows=follows)

    def _usage(self) -> dict[str, Any]:
        found = self._tally.usage()
        return {
            "input_tokens": found["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": found["prompt_tokens_details"]["cached_tokens"], "cache_write_tokens": 0},
            "output_tokens": found["completion_tokens"],
            "output_tokens_details": {
                "reasoning_tokens": found.get("completion_tokens_details", {}).get("reasoning_tokens", 0),
            },
            "total_tokens": found["total_tokens"],
        }

    def _event(self, name: str, error: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"type": name, "response": self.object(error)}

    def _numbered(self, events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for event in events:
            yield {**event, "sequence_number": self._num_events}
            self._num_events += 1
