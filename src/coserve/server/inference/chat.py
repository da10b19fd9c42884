"""A chat request put to the engine: for every route that answers a conversation's next turn.

Owns: the order of the steps from a body to the engine. Does not own: the steps, and what the answer looks like (responses.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from coserve.chat.template import ChatExtras
from coserve.server.inference.answers import Answers, Question
from coserve.server.inference.deltas import OutputReader
from coserve.server.inference.limits import check_logprobs
from coserve.server.inference.prompts import ThreadRunner, conversation_prompt, final_content, output_limit
from coserve.server.inference.protocol import ChatRequest, GenerationRequest
from coserve.server.inference.responses import Tally
from coserve.server.inference.structured import asked_field, asks_grammar, check_grammar, tried_grammar
from coserve.server.inference.templates import chat_tokenizer
from coserve.server.inference.thoughts import ReasoningCounter, find_style, read_thoughts
from coserve.server.inference.toolcalling import ToolCalling
from coserve.server.services import Services, named_model


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedChat:
    """A chat that the engine is about to answer.

    model: the name of the model that answers. run: runs long work in a thread. new_reader: makes a reader for one output.
    shown_ids: of special tokens that the outputs' texts show.
    """

    model: str
    prompt_ids: list[int]
    run: ThreadRunner
    answers: Answers
    tally: Tally
    new_reader: Callable[[], OutputReader]
    shown_ids: frozenset[int]


async def ask_chat(services: Services, tenant: str, body: ChatRequest) -> AskedChat:
    """Checks a body, renders its conversation and gets an adapter ready. Raises InvalidRequest, NotFound and the like."""
    arrival_s = time.monotonic()
    name = await named_model(services, tenant, body.model)
    body.check()
    info = services.engine.info
    run: ThreadRunner = partial(services.work.run, tenant)
    continued = final_content(
        body.messages, continue_final_message=body.continue_final_message, add_generation_prompt=body.add_generation_prompt
    )
    tokenizer = await chat_tokenizer(services.tokenizer, services.templates, run, body.chat_template)
    if body.chat_template is not None and body.tool_use.callable:
        await run(lambda: tokenizer.tool_prompt)  # tries the request's template out, which may take long
    tools = ToolCalling(body.tool_use, tokenizer, services.config.tool_call_parser)
    thoughts = read_thoughts(body, tokenizer, find_style(services.config.reasoning_parser, tokenizer))
    ids = await conversation_prompt(
        tokenizer, body.messages, run=run, limit=info.max_model_len,
        add_generation_prompt=body.add_generation_prompt is not False and continued is None,
        add_special_tokens=bool(body.add_special_tokens), allow_control_tokens=services.config.allow_control_tokens,
        extras=ChatExtras(tools=body.tool_use.tools, variables=thoughts.variables), continue_final=continued is not None,
        always_beside=body.chat_template is not None,
    )
    begin = thoughts.begin(tokenizer, ids, continued)
    asked_by = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = output_limit(
        len(ids), body.max_completion_tokens or body.max_tokens, default=None, limit=info.max_model_len,
        prompt_field="messages", tokens_field=asked_by,
    )
    grammar = await tried_grammar(services, run, body, _composer(services, body, tools, thoughts.compose(begin)), field="tools")
    sampling = body.sampling(
        max_tokens=max_tokens, vocab_size=info.vocab_size, draw_seed=services.draw_seed, grammar=grammar
    )
    shown_ids = body.shown_ids(services.tokenizer) | tools.marker_ids | thoughts.marker_ids
    sampling = replace(sampling, shown_special_ids=tuple(sorted(shown_ids)))
    if not body.stream:
        check_logprobs([ids], [sampling], "top_logprobs")
    answers = await ask(services, tenant, name, body, [Question(ids, sampling)], arrival_s)
    counter = None if thoughts.style is None else partial(ReasoningCounter, tokenizer, ids, begin, shown_ids)
    return AskedChat(
        model=name, prompt_ids=ids, run=run, answers=answers, tally=Tally([len(ids)], body.num_outputs, counter),
        new_reader=thoughts.reader(begin, partial(tools.new_reader, held=grammar is not None)), shown_ids=shown_ids,
    )


def _composer(
    services: Services, body: ChatRequest, tools: ToolCalling, behind_thoughts: Callable[[str | None], str | None] | None
) -> Callable[[str | None], str | None] | None:
    """Makes the grammar of an output from that of its content; None if it may be anything. behind_thoughts: makes it from that
    of an answer, where thoughts come first."""
    if not (tools.enforces or asks_grammar(body)):
        return None

    def compose(content: str | None) -> str | None:
        answer = tools.compose(content, check=partial(check_grammar, services)) if tools.reads else content
        return answer if behind_thoughts is None else behind_thoughts(answer)

    return compose


async def ask(
    services: Services, tenant: str, name: str, body: GenerationRequest, questions: Sequence[Question], arrival_s: float
) -> Answers:
    """Loads the model's adapter if need be, and asks. Raises what `ModelRegistry.prepare` raises."""
    model = await services.models.prepare(tenant, name)
    if not body.by_id and (body.num_logprobs is not None or body.prompt_logprobs is not None):
        await asyncio.to_thread(services.tokenizer.token_bytes.name, 0)  # builds a table of all names, which takes long
    return Answers(
        services, questions, tenant=tenant, model=model, arrival_s=arrival_s, tpot_ms=body.slo_tpot_ms,
        ttft_ms=body.slo_ttft_ms, grammar_field=asked_field(body),
    )
