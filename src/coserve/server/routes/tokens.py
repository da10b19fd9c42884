"""/tokenize, /detokenize and the list of models, as vLLM's clients and OpenAI's expect them."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response

from coserve.chat.template import ChatExtras
from coserve.chat.tools import read_tools
from coserve.core import InvalidRequest
from coserve.server.bodies.forms import Form
from coserve.server.bodies.parse import MAX_VALUES
from coserve.server.bodies.reader import body_reader
from coserve.server.inference.fields import DETOKENIZE, TOKENIZE
from coserve.server.inference.limits import COUNTED_TOKENS, check_amounts
from coserve.server.inference.pieces import PiecesResponse, encode_large
from coserve.server.inference.prompts import conversation_prompt, final_content, text_prompts
from coserve.server.inference.protocol import DetokenizeRequest, TokenizeRequest
from coserve.server.inference.templates import chat_tokenizer
from coserve.server.inference.thoughts import find_style, read_variables
from coserve.server.models import ServedModel
from coserve.server.services import Served, Services, Tenant, named_model
from coserve.text.detokenizer import whole_text

router = APIRouter(tags=["models"])
_TOKENIZE_FORM = Form(model=TokenizeRequest, prepare=lambda body: check_amounts(TOKENIZE.apply(body)), max_values=MAX_VALUES)
_DETOKENIZE_FORM = Form(model=DetokenizeRequest, prepare=DETOKENIZE.apply, max_values=MAX_VALUES)
TokenizeBody = Annotated[TokenizeRequest, Depends(body_reader(_TOKENIZE_FORM))]
DetokenizeBody = Annotated[DetokenizeRequest, Depends(body_reader(_DETOKENIZE_FORM))]


@router.get("/v1/models", response_model=dict[str, Any])
def list_models(services: Served, tenant: Tenant) -> Response:
    """The base model's names and the tenant's adapters."""
    data = [_entry(services, model) for model in services.models.list(tenant)]
    return PiecesResponse(encode_large({"object": "list", "data": data}))


@router.get("/v1/models/{model:path}")
def retrieve_model(services: Served, tenant: Tenant, model: str) -> dict[str, Any]:
    """One of them."""
    return _entry(services, services.models.find(tenant, model))


@router.post("/tokenize", openapi_extra=_TOKENIZE_FORM.openapi, response_model=dict[str, Any])
async def tokenize(services: Served, tenant: Tenant, body: TokenizeBody) -> Response:
    """Token ids of a text or a conversation."""
    await named_model(services, tenant, body.model)  # must be there; all models share the base's tokenizer
    info = services.engine.info
    limit, run = max(info.max_model_len, COUNTED_TOKENS), partial(services.work.run, tenant)
    tools = [] if body.tools is None else read_tools(body.tools, "tools")
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("prompt: give either prompt or messages", param="prompt")
    for name in ("continue_final_message", "chat_template", "chat_template_kwargs"):
        if body.messages is None and getattr(body, name):
            raise InvalidRequest(f"{name}: is for messages; a prompt is a text as it is", param=name)
    if body.messages is not None:
        continued = final_content(
            body.messages, continue_final_message=body.continue_final_message, add_generation_prompt=body.add_generation_prompt
        )
        tokenizer = await chat_tokenizer(services.tokenizer, services.templates, run, body.chat_template)
        style = find_style(services.config.reasoning_parser, tokenizer)
        variables = read_variables(body.chat_template_kwargs, tokenizer, style)
        tokens = await conversation_prompt(
            tokenizer, body.messages, run=run, limit=limit,
            add_generation_prompt=body.add_generation_prompt is not False and continued is None,
            add_special_tokens=bool(body.add_special_tokens), allow_control_tokens=services.config.allow_control_tokens,
            extras=ChatExtras(tools=tools, variables=variables),
            continue_final=continued is not None, always_beside=body.chat_template is not None,
        )
    elif tools:
        raise InvalidRequest("tools: are for messages; a prompt is a text as it is", param="tools")
    elif body.prompt:
        special = body.add_special_tokens is not False
        prompts = await text_prompts(
            services.tokenizer, body.prompt, run=run, vocab_size=info.vocab_size, limit=limit, add_special_tokens=special
        )
        tokens = prompts[0].ids
    else:
        tokens = []
    return PiecesResponse(encode_large({"tokens": tokens, "count": len(tokens), "max_model_len": info.max_model_len}))


@router.post("/detokenize", openapi_extra=_DETOKENIZE_FORM.openapi)
async def detokenize(services: Served, tenant: Tenant, body: DetokenizeBody) -> dict[str, Any]:
    """The text of token ids, special tokens written out."""
    await named_model(services, tenant, body.model)
    last, most = services.engine.info.vocab_size - 1, max(services.engine.info.max_model_len, COUNTED_TOKENS)
    if len(body.tokens) > most:
        raise InvalidRequest(f"tokens: {len(body.tokens)} token ids, at most {most} are taken", param="tokens")
    if body.tokens and max(body.tokens) > last:
        raise InvalidRequest(f"tokens: token ids must be from 0 to {last}", param="tokens")
    return {"prompt": await services.work.run(tenant, partial(whole_text, services.tokenizer, body.tokens))}


def _entry(services: Services, model: ServedModel) -> dict[str, Any]:
    base = services.models.base_names[0]
    return {
        "id": model.name, "object": "model", "created": model.created, "owned_by": "coserve", "root": base,
        "parent": None if model.adapter is None else base, "max_model_len": services.engine.info.max_model_len,
    }
