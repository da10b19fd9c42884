"""/v1/responses: OpenAI's Responses API, whole or as a stream of events. Nothing is stored.

Owns: the way of a body through a chat to its response. Does not own: any of its steps (responses/, inference/).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from functools import partial
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from coserve.core import CoserveError, NotFound
from coserve.server.bodies.reader import body_reader
from coserve.server.inference.chat import AskedChat, ask_chat
from coserve.server.inference.pieces import encode_large
from coserve.server.inference.protocol import ChatRequest
from coserve.server.inference.sse import Event, EventStream, NamedEvent
from coserve.server.inference.walk import TokenWalk
from coserve.server.inference.whole import LONG_ANSWER, respond_whole, weight
from coserve.server.link.messages import Tokens
from coserve.server.responses.answer import ResponseAnswer
from coserve.server.responses.body import RESPONSE_FORM, CreateResponse
from coserve.server.responses.translate import ChatTranslation, translate
from coserve.server.routes.inference import CHAT_FORM
from coserve.server.services import Served, Tenant

router = APIRouter(tags=["inference"])
ResponseBody = Annotated[CreateResponse, Depends(body_reader(RESPONSE_FORM))]
_MANY_ITEMS = 64
"""A longer input becomes a chat in a thread."""


@router.post("/v1/responses", openapi_extra=RESPONSE_FORM.openapi)
async def create_response(request: Request, services: Served, tenant: Tenant, body: ResponseBody) -> Response:
    """The answer to an input: messages, reasoning and calls of tools so far."""
    work = partial(_translated, body)
    many = isinstance(body.input, list) and len(body.input) > _MANY_ITEMS
    translation, chat = await services.work.run(tenant, work) if many else work()
    try:
        asked = await ask_chat(services, tenant, chat)
    except CoserveError as error:
        raise translation.renamed(error) from error
    walk = None
    if body.gives_logprobs:
        walk = TokenWalk(services.tokenizer, context=asked.prompt_ids, shown_ids=asked.shown_ids)
    answer = ResponseAnswer(body, asked.model, asked.tally, asked.new_reader(), walk)

    def take(prompt: int, tokens: Tokens) -> list[dict[str, Any]]:
        asked.tally.outputs[asked.tally.add(prompt, tokens)].logprobs.clear()  # the answer has them where they belong
        return list(answer.push(tokens))

    if not body.stream:
        return await respond_whole(request, asked.answers, asked.run, take, answer.object)

    async def events() -> AsyncGenerator[Event, None]:
        size = 0
        async for prompt, tokens in asked.answers:
            size += weight(tokens)
            for event in take(prompt, tokens):
                yield await _encoded(event, asked, size)

    def failed(error: CoserveError) -> Iterable[Event]:
        return [NamedEvent(event["type"], msgspec.json.encode(event)) for event in answer.fail(error)]

    return EventStream(events(), asked.answers.aclose, failed)


@router.get("/v1/responses/{response_id}")
@router.delete("/v1/responses/{response_id}")
@router.get("/v1/responses/{response_id}/input_items")
@router.post("/v1/responses/{response_id}/cancel")
def find_response(tenant: Tenant, response_id: str) -> Response:
    """Always 404: no response is stored, and none is made in the background. One that is being made ends when its client
    leaves."""
    raise NotFound("response_id: responses are not stored here; keep what POST /v1/responses has answered", param="response_id")


def _translated(body: CreateResponse) -> tuple[ChatTranslation, ChatRequest]:
    translation = translate(body)
    try:
        return translation, CHAT_FORM.read(translation.fields)
    except CoserveError as error:
        raise translation.renamed(error) from error


async def _encoded(event: dict[str, Any], asked: AskedChat, size: int) -> NamedEvent:
    """size: tokens and log-probabilities so far, all of which the last events have again."""
    if size <= LONG_ANSWER or event["type"].endswith(".delta"):
        return NamedEvent(event["type"], msgspec.json.encode(event))
    return NamedEvent(event["type"], b"".join(await asked.run(lambda: encode_large(event))))
