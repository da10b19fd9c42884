"""A response that is sent whole, once every output has ended.

Owns: collecting tokens unless the client leaves, and on which thread a long response is encoded. Does not own: what is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import Request, Response

from coserve.server.inference.answers import Answers
from coserve.server.inference.pieces import PiecesResponse, encode_large
from coserve.server.inference.prompts import ThreadRunner
from coserve.server.inference.sse import unless_gone
from coserve.server.link.messages import Tokens

CLIENT_LEFT = 499
"""The status of a request whose client has left. Only the log shows it."""
LONG_ANSWER = 1 << 10
"""A response with more tokens and log-probabilities than this is encoded in a thread."""


def weight(tokens: Tokens) -> int:
    """How many tokens and log-probabilities there are."""
    return len(tokens.token_ids) + sum(1 + len(entry.top) for entry in tokens.logprobs + tokens.prompt_logprobs)


async def respond_whole(
    request: Request, answers: Answers, run: ThreadRunner, take: Callable[[int, Tokens], object], whole: Callable[[], Any]
) -> Response:
    """take: is given each prompt's number and new tokens. whole: makes the response's body once all outputs have ended. Raises
    what iterating the answers raises."""

    async def collect() -> list[bytes]:
        size = 0
        async for prompt, tokens in answers:
            take(prompt, tokens)
            size += weight(tokens)
        if size > LONG_ANSWER:
            return await run(lambda: encode_large(whole()))
        return [msgspec.json.encode(whole())]

    try:
        content = await unless_gone(request.receive, collect())
    finally:
        await answers.aclose()
    return Response(status_code=CLIENT_LEFT) if content is None else PiecesResponse(content)
