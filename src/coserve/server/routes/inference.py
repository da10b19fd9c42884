"""/v1/chat/completions and /v1/completions, whole or as a stream of events.

Owns: the way of a request from its body through the engine to its response. Does not own: any of its steps (inference/).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from coserve.config.settings import SamplingConfig
from coserve.core import InvalidRequest
from coserve.server.bodies.forms import Form
from coserve.server.bodies.parse import MAX_VALUES
from coserve.server.bodies.reader import body_reader
from coserve.server.inference.answers import Answers, Question
from coserve.server.inference.chat import ask, ask_chat
from coserve.server.inference.fields import CHAT, COMPLETIONS
from coserve.server.inference.limits import check_amounts, check_logprobs
from coserve.server.inference.prompts import Prompt, ThreadRunner, output_limit, text_prompts
from coserve.server.inference.protocol import DEFAULT_COMPLETION_TOKENS, ChatRequest, CompletionRequest, GenerationRequest
from coserve.server.inference.responses import ChatChoiceStream, Tally, chat_response, completion_choices, completion_response
from coserve.server.inference.sse import DONE, EventStream
from coserve.server.inference.structured import tried_grammar
from coserve.server.inference.walk import TokenWalk
from coserve.server.inference.whole import respond_whole
from coserve.server.link.messages import Tokens
from coserve.server.records import new_id, now
from coserve.server.services import Served, Services, Tenant, named_model

router = APIRouter(tags=["inference"])
CHAT_FORM = Form(model=ChatRequest, prepare=lambda body: check_amounts(CHAT.apply(body)), max_values=MAX_VALUES)
COMPLETION_FORM = Form(
    model=CompletionRequest, prepare=lambda body: check_amounts(COMPLETIONS.apply(body)), max_values=MAX_VALUES
)
ChatBody = Annotated[ChatRequest, Depends(body_reader(CHAT_FORM))]
CompletionBody = Annotated[CompletionRequest, Depends(body_reader(COMPLETION_FORM))]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exchange:
    """A request that is being answered.

    run: runs long work in a thread. head: fields with which the response and every chunk begin. whole: makes the response's
    body once all outputs have ended. parts: makes the choices to send for a choice's new tokens. opening: further fields of
    the first chunk.
    """

    body: GenerationRequest
    run: ThreadRunner
    head: dict[str, Any]
    tally: Tally
    answers: Answers
    whole: Callable[[], dict[str, Any]]
    parts: Callable[[int, Tokens], Iterator[dict[str, Any]]]
    opening: dict[str, Any] = field(default_factory=dict)


@router.post("/v1/chat/completions", openapi_extra=CHAT_FORM.openapi)
async def create_chat_completion(request: Request, services: Served, tenant: Tenant, body: ChatBody) -> Response:
    """A conversation's next turn."""
    asked = await ask_chat(services, tenant, body)
    ids, tokenizer = asked.prompt_ids, services.tokenizer
    head = _head(services, "chatcmpl", asked.model)
    streams: dict[int, ChatChoiceStream] = {}

    def whole() -> dict[str, Any]:
        return chat_response(
            head, asked.tally, body, ids, tokenizer=tokenizer, new_reader=asked.new_reader, shown_ids=asked.shown_ids
        )

    def parts(choice: int, tokens: Tokens) -> Iterator[dict[str, Any]]:
        if choice not in streams:
            walk = TokenWalk(tokenizer, context=ids, by_id=body.by_id, shown_ids=asked.shown_ids)
            streams[choice] = ChatChoiceStream(choice, walk, body, asked.new_reader())
        return streams[choice].parts(tokens)

    exchange = _Exchange(
        body=body, run=asked.run, head=head, tally=asked.tally, answers=asked.answers, whole=whole, parts=parts,
        opening={"prompt_token_ids": ids} if body.return_token_ids else {},
    )
    return await _respond(request, exchange, "chat.completion.chunk")


@router.post("/v1/completions", openapi_extra=COMPLETION_FORM.openapi)
async def create_completion(request: Request, services: Served, tenant: Tenant, body: CompletionBody) -> Response:
    """Continuations of one or more prompts."""
    arrival_s = time.monotonic()
    name = await named_model(services, tenant, body.model)
    body.check()
    info = services.engine.info
    run: ThreadRunner = partial(services.work.run, tenant)
    prompts = await text_prompts(
        services.tokenizer, body.prompt, run=run, vocab_size=info.vocab_size, limit=info.max_model_len,
        add_special_tokens=body.add_special_tokens is not False,
    )
    pose = partial(_questions, services, body, prompts, await tried_grammar(services, run, body))
    questions = await run(pose) if len(prompts) > 1 else pose()
    answers = await ask(services, tenant, name, body, questions, arrival_s)
    tally, tokenizer = Tally([len(prompt.ids) for prompt in prompts], body.num_outputs), services.tokenizer
    head = _head(services, "cmpl", name)
    walks: dict[int, TokenWalk] = {}

    def whole() -> dict[str, Any]:
        return completion_response(head, tally, body, prompts, tokenizer=tokenizer)

    def parts(choice: int, tokens: Tokens) -> Iterator[dict[str, Any]]:
        prompt, first = prompts[choice // tally.n], choice not in walks
        if first:
            walks[choice] = TokenWalk(tokenizer, context=prompt.ids, by_id=body.by_id, shown_ids=body.shown_ids(tokenizer))
        found = completion_choices(choice, tokens, walks[choice], body, echo=prompt.text if body.echo and first else None)
        for number, part in enumerate(found):
            yield {**part, "prompt_token_ids": prompt.ids} if body.return_token_ids and first and not number else part

    exchange = _Exchange(body=body, run=run, head=head, tally=tally, answers=answers, whole=whole, parts=parts)
    return await _respond(request, exchange, "text_completion")


def _questions(
    services: Services, body: CompletionRequest, prompts: Sequence[Prompt], grammar: str | None
) -> list[Question]:
    info, config = services.engine.info, services.config
    limit = config.most_running + config.max_num_queued_reqs
    if len(prompts) * body.num_outputs > limit:
        raise InvalidRequest(f"prompt: {len(prompts)} prompts with n={body.num_outputs} are more than the {limit} outputs that "
                             "this server takes at once", param="prompt")
    common: SamplingConfig | None = None
    questions = []
    for prompt in prompts:
        max_tokens = output_limit(
            len(prompt.ids), body.max_tokens, default=DEFAULT_COMPLETION_TOKENS, limit=info.max_model_len, prompt_field="prompt"
        )
        if common is None:
            common = body.sampling(
                max_tokens=max_tokens, vocab_size=info.vocab_size, draw_seed=services.draw_seed, grammar=grammar
            )
            sampling = common = replace(
                common, prompt_logprobs=body.scores_prompt, shown_special_ids=tuple(sorted(body.shown_ids(services.tokenizer)))
            )
        else:
            seed = services.draw_seed() if body.seed is None else body.seed
            sampling = replace(common, max_tokens=max_tokens, seed=seed)
        questions.append(Question(prompt.ids, sampling))
    if not body.stream:
        check_logprobs([prompt.ids for prompt in prompts], [question.sampling for question in questions], "logprobs")
    return questions


def _head(services: Services, prefix: str, name: str) -> dict[str, Any]:
    return {
        "id": new_id(prefix), "created": now(), "model": name, "system_fingerprint": services.engine.info.fingerprint,
    }


async def _respond(request: Request, exchange: _Exchange, chunk_object: str) -> Response:
    answers, tally = exchange.answers, exchange.tally
    if exchange.body.stream:
        return EventStream(_events(exchange, chunk_object), answers.aclose)
    return await respond_whole(request, answers, exchange.run, tally.add, exchange.whole)


async def _events(exchange: _Exchange, chunk_object: str) -> AsyncGenerator[bytes, None]:
    """A stream's events: chunks, a chunk with the usage if it was asked for, and [DONE]."""
    body, tally, head = exchange.body, exchange.tally, {**exchange.head, "object": chunk_object}
    opening = exchange.opening
    async for prompt, tokens in exchange.answers:
        choice = tally.add(prompt, tokens)
        tally.outputs[choice].logprobs.clear()  # sent below, not kept
        for part in exchange.parts(choice, tokens):
            chunk = {**head, "choices": [part], **opening}
            opening = {}
            if body.include_usage:
                chunk["usage"] = tally.usage() if body.continuous_usage else None
            yield msgspec.json.encode(chunk)
    if body.include_usage:
        yield msgspec.json.encode({**head, "choices": [], "usage": tally.usage()})
    yield DONE
