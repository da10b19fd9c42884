"""/v1/chat/completions and /v1/completions, whole or as a stream of events.

Owns: the way of a request from its body through the engine to its response. Does not own: any of its steps (inference/).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from coserve.core import InvalidRequest
from coserve.server.inference.answers import Answers, Asker, Question
from coserve.server.inference.bodies import body_reader, openapi_body
from coserve.server.inference.fields import CHAT, COMPLETIONS
from coserve.server.inference.prompts import Prompt, conversation_prompt, output_limit, text_prompts
from coserve.server.inference.protocol import DEFAULT_COMPLETION_TOKENS, ChatRequest, CompletionRequest, GenerationRequest
from coserve.server.inference.responses import (
    Echo,
    Tally,
    TokenTexts,
    chat_choices,
    chat_response,
    completion_choices,
    completion_response,
)
from coserve.server.inference.sse import DONE, EventStream, unless_gone
from coserve.server.link.messages import Tokens
from coserve.server.records import new_id, now
from coserve.server.services import Served, Services, Tenant

router = APIRouter(tags=["inference"])
ChatBody = Annotated[ChatRequest, Depends(body_reader(ChatRequest, CHAT))]
CompletionBody = Annotated[CompletionRequest, Depends(body_reader(CompletionRequest, COMPLETIONS))]
_CLIENT_LEFT = 499
"""Nobody reads it but a log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exchange:
    """A request on its way. head: what every response and chunk begins with; whole: the response's body in the end; parts:
    choices of the chunks for a choice's new tokens."""

    body: GenerationRequest
    head: dict[str, Any]
    tally: Tally
    answers: Answers
    whole: Callable[[], dict[str, Any]]
    parts: Callable[[int, Tokens], Iterator[dict[str, Any]]]


@router.post("/v1/chat/completions", openapi_extra=openapi_body(ChatRequest))
async def create_chat_completion(request: Request, services: Served, tenant: Tenant, body: ChatBody) -> Response:
    """A conversation's next turn."""
    arrival_s = time.perf_counter()
    name = await _model_name(services, tenant, body)
    info = services.engine.info
    ids = await conversation_prompt(
        services.tokenizer, body.messages, limit=info.max_model_len,
        add_generation_prompt=body.add_generation_prompt is not False,
        allow_control_tokens=services.config.allow_control_tokens,
    )
    asked_by = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = output_limit(
        len(ids), body.max_completion_tokens or body.max_tokens, default=None, limit=info.max_model_len,
        prompt_field="messages", tokens_field=asked_by,
    )
    sampling = body.sampling(
        max_tokens=max_tokens, vocab_size=info.vocab_size, logprobs=body.num_logprobs, draw_seed=services.draw_seed
    )
    answers = await _ask(services, tenant, name, body, [Question(ids, sampling)], arrival_s)
    tally, texts, begun = Tally([len(ids)], body.num_outputs), TokenTexts(services.tokenizer), set[int]()
    head = _head(services, "chatcmpl", name)
    logprobs = body.num_logprobs is not None

    def whole() -> dict[str, Any]:
        return chat_response(head, tally, texts, logprobs=logprobs, prompt_logprobs=body.prompt_logprobs is not None)

    def parts(choice: int, tokens: Tokens) -> Iterator[dict[str, Any]]:
        first = choice not in begun
        begun.add(choice)
        return chat_choices(choice, tokens, texts, first=first, logprobs=logprobs)

    return await _respond(request, _Exchange(body=body, head=head, tally=tally, answers=answers, whole=whole, parts=parts),
                          "chat.completion.chunk")


@router.post("/v1/completions", openapi_extra=openapi_body(CompletionRequest))
async def create_completion(request: Request, services: Served, tenant: Tenant, body: CompletionBody) -> Response:
    """Continuations of one or more prompts."""
    arrival_s = time.perf_counter()
    name = await _model_name(services, tenant, body)
    info = services.engine.info
    prompts = await text_prompts(
        services.tokenizer, body.prompt, vocab_size=info.vocab_size, limit=info.max_model_len,
        add_special_tokens=body.add_special_tokens is not False,
    )
    answers = await _ask(services, tenant, name, body, _questions(services, body, prompts), arrival_s)
    tally, texts = Tally([len(prompt.ids) for prompt in prompts], body.num_outputs), TokenTexts(services.tokenizer)
    head = _head(services, "cmpl", name)
    echoes = [Echo(ids=prompt.ids, text=prompt.text) for prompt in prompts] if body.echo else None
    logprobs = body.logprobs is not None
    ends: dict[int, int] = {}

    def whole() -> dict[str, Any]:
        return completion_response(
            head, tally, texts, logprobs=logprobs, prompt_logprobs=body.prompt_logprobs is not None, echoes=echoes
        )

    def parts(choice: int, tokens: Tokens) -> Iterator[dict[str, Any]]:
        echo = echoes[choice // tally.n].text if echoes and choice not in ends else None
        start = ends.get(choice, 0)
        ends[choice] = start + sum(len(texts[entry.token]) for entry in tokens.logprobs)
        return completion_choices(choice, tokens, texts, echo=echo, logprobs=logprobs, offset=start)

    return await _respond(request, _Exchange(body=body, head=head, tally=tally, answers=answers, whole=whole, parts=parts),
                          "text_completion")


async def _model_name(services: Services, tenant: str, body: GenerationRequest) -> str:
    """The model asked for. Raises NotFound, and InvalidRequest for a body that contradicts itself."""
    names = services.models.base_names
    name = names[0] if body.model is None else body.model
    if name not in names:
        await asyncio.to_thread(services.models.find, tenant, name)  # it may have to look into the index
    body.check()
    return name


def _questions(services: Services, body: CompletionRequest, prompts: Sequence[Prompt]) -> list[Question]:
    info, config = services.engine.info, services.config
    limit = config.max_num_seqs + config.max_num_queued_reqs
    if len(prompts) * body.num_outputs > limit:
        raise InvalidRequest(f"prompt: {len(prompts)} prompts with n={body.num_outputs} are more than the {limit} outputs that "
                             "this server takes at once", param="prompt")
    questions = []
    for prompt in prompts:
        max_tokens = output_limit(
            len(prompt.ids), body.max_tokens, default=DEFAULT_COMPLETION_TOKENS, limit=info.max_model_len, prompt_field="prompt"
        )
        sampling = body.sampling(
            max_tokens=max_tokens, vocab_size=info.vocab_size, logprobs=body.logprobs, draw_seed=services.draw_seed
        )
        if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
            sampling = replace(sampling, prompt_logprobs=body.logprobs)
        questions.append(Question(prompt.ids, sampling))
    return questions


async def _ask(
    services: Services, tenant: str, name: str, body: GenerationRequest, questions: Sequence[Question], arrival_s: float
) -> Answers:
    """Makes the model ready. Raises what preparing it raises."""
    model = await services.models.prepare(tenant, name)
    asker = Asker(tenant=tenant, model=model, arrival_s=arrival_s, tpot_ms=body.slo_tpot_ms, ttft_ms=body.slo_ttft_ms)
    return Answers(services, asker, questions)


def _head(services: Services, prefix: str, name: str) -> dict[str, Any]:
    return {
        "id": new_id(prefix), "created": now(), "model": name, "system_fingerprint": services.engine.info.fingerprint,
    }


async def _respond(request: Request, exchange: _Exchange, chunk_object: str) -> Response:
    """A stream, or the whole. Raises the request's error."""
    answers, tally = exchange.answers, exchange.tally
    if exchange.body.stream:
        return EventStream(_events(exchange, chunk_object), answers.aclose)

    async def collect() -> bytes:
        async for prompt, tokens in answers:
            tally.add(prompt, tokens)
        return msgspec.json.encode(exchange.whole())

    try:
        content = await unless_gone(request.receive, collect())
    finally:
        await answers.aclose()
    return Response(status_code=_CLIENT_LEFT) if content is None else Response(content, media_type="application/json")


async def _events(exchange: _Exchange, chunk_object: str) -> AsyncGenerator[bytes, None]:
    """A stream's events: chunks, a chunk of usage if asked for, the end."""
    body, tally, head = exchange.body, exchange.tally, {**exchange.head, "object": chunk_object}
    async for prompt, tokens in exchange.answers:
        choice = tally.add(prompt, tokens)
        for part in exchange.parts(choice, tokens):
            chunk = {**head, "choices": [part]}
            if body.include_usage:
                chunk["usage"] = tally.usage() if body.continuous_usage else None
            yield msgspec.json.encode(chunk)
    if body.include_usage:
        yield msgspec.json.encode({**head, "choices": [], "usage": tally.usage()})
    yield DONE
