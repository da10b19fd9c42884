"""The body of /v1/responses: OpenAI's fields, and those of vLLM's and ours that a chat has too.

Owns: types of fields, what becomes of those that aren't implemented, amounts. Does not own: what fields mean for a chat
(translate.py), what an item of the input may hold (items.py). None always means: not given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import WithJsonSchema, create_model

from coserve.core import InvalidRequest
from coserve.server.bodies.forms import Body, Form
from coserve.server.bodies.pairs import Pairs
from coserve.server.bodies.parse import MAX_VALUES
from coserve.server.inference.fields import FieldPolicy
from coserve.server.inference.limits import MAX_MESSAGES, check_amounts
from coserve.server.inference.protocol import GenerationRequest, NumLogprobs, Positive

LOGPROBS = "message.output_text.logprobs"
"""What `include` asks for to get log-probabilities."""
_INCLUDABLE = (LOGPROBS, "reasoning.encrypted_content")
"""Reasoning is given openly, so that it can be given back without being encrypted."""
SHARED = (
    "model", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "slo_tpot_ms", "slo_ttft_ms",
    "skip_special_tokens", "structured_outputs",
)
"""Fields that a chat has too, with the same meaning, and that pass to it as they are."""
_TEXTS = ("input_text", "output_text")
_INPUT: dict[str, Any] = {"anyOf": [
    {"type": "string"},
    {"type": "array", "minItems": 1, "items": {"type": "object", "properties": {
        "type": {"type": "string", "enum": ["message", "reasoning", "function_call", "function_call_output"]},
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "object", "required": ["type", "text"], "properties": {
                "type": {"type": "string", "enum": [*_TEXTS, "reasoning_text"]}, "text": {"type": "string"},
            }}},
        ]},
        "call_id": {"type": "string"}, "name": {"type": "string"}, "arguments": {"type": "string"},
        "output": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
    }}},
]}
_TOOLS: dict[str, Any] = {"anyOf": [
    {"type": "array", "items": {"type": "object", "required": ["type", "name"], "properties": {
        "type": {"type": "string", "const": "function"}, "name": {"type": "string"}, "description": {"type": "string"},
        "parameters": {"type": "object"}, "strict": {"type": "boolean"},
    }}},
    {"type": "null"},
]}
_TOOL_CHOICE: dict[str, Any] = {"anyOf": [
    {"type": "string", "enum": ["none", "auto", "required"]},
    {"type": "object", "required": ["type"], "properties": {"type": {"type": "string", "enum": ["function", "allowed_tools"]}}},
    {"type": "null"},
]}
_Summary = Literal["auto", "concise", "detailed"]


class ResponseStreamOptions(Body):
    """include_obfuscation is a hint that nothing here needs. A stream always ends with the usage."""

    include_obfuscation: bool | None = None


class ResponseReasoning(Body):
    """summary, and generate_summary, its old name, ask for a summary of the reasoning. What a client gets is the reasoning
    itself."""

    effort: str | None = None
    summary: _Summary | None = None
    generate_summary: _Summary | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class ResponseText(Body):
    """How the answer's text is to be. format: {"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "name",
    "schema", "strict", "description"}."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None




def _of_a_chat(name: str) -> Any:
    field = GenerationRequest.model_fields[name]
    return field.annotation, field


_Shared: Any = create_model("_Shared", __base__=Body, **{name: _of_a_chat(name) for name in SHARED})


class CreateResponse(_Shared):
    """/v1/responses. store: taken with either value; nothing is stored. max_output_tokens: default: what the context leaves."""

    input: Annotated[Any, WithJsonSchema(_INPUT)]
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    top_logprobs: NumLogprobs | None = None
    include: list[str] | None = None
    tools: Annotated[Any, WithJsonSchema(_TOOLS)] = None
    tool_choice: Annotated[Any, WithJsonSchema(_TOOL_CHOICE)] = None
    parallel_tool_calls: bool | None = None
    text: ResponseText | None = None
    reasoning: ResponseReasoning | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    metadata: Pairs | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def gives_logprobs(self) -> bool:
        """Whether log-probabilities were asked for."""
        return LOGPROBS in (self.include or ())

    def check(self) -> None:
        """What several fields say together. Raises InvalidRequest."""
        for number, name in enumerate(self.include or ()):
            if name not in _INCLUDABLE:
                raise InvalidRequest(
                    f"include[{number}]: must be one of {', '.join(_INCLUDABLE)}; other data doesn't occur here",
                    param=f"include[{number}]",
                )
        if self.top_logprobs and not self.gives_logprobs:
            raise InvalidRequest(f'top_logprobs: is for include=["{LOGPROBS}"] only', param="top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options: is for stream=true only", param="stream_options")


_CHATS = {
    "messages": "input", "max_tokens": "max_output_tokens", "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format", "reasoning_effort": "reasoning.effort", "logprobs": f'include=["{LOGPROBS}"]',
}
"""A chat's fields, and what they are called in this API."""
RESPONSES = FieldPolicy(
    implemented=CreateResponse.model_fields,
    ignored=frozenset({"user", "safety_identifier", "prompt_cache_key", "max_tool_calls"}),
    neutral={
        "background": (False,),
        "conversation": (),
        "previous_response_id": (),
        "prompt": (),
        "truncation": ("disabled",),
        "service_tier": ("auto", "default"),
        "context_management": ([],),
        "moderation": (),
        "prompt_cache_retention": ("in_memory", "in-memory"),
        "prompt_cache_options": ({}, {"mode": "implicit"}),
        "n": (1,),
        **dict.fromkeys(_CHATS, ()),
        # vLLM's
        "cache_salt": (),
        "enable_response_messages": (False,),
        "include_stop_str_in_output": (False,),
        "mm_processor_kwargs": ({},),
        "previous_input_messages": (),
        "priority": (0,),
        "request_id": (),
        "vllm_xargs": ({},),
    },
    reasons={
        **{name: f"is {own} in this API" for name, own in _CHATS.items()},
        "background": "a response can't be made in the background, since nothing is stored here; wait for it, or stream it",
        "conversation": "conversations are not stored here; give the conversation so far in input and leave this out",
        "n": "a response has one output; ask several times",
        "previous_response_id": (
            "responses are not stored here; give the conversation so far in input (what was asked, and the items of the "
            "response's output) and leave this out"
        ),
        "prompt": "prompts are not stored here; give instructions and input and leave this out",
        "truncation": 'must be "disabled", as an input that is too long is refused and not cut; leave out its first items',
    },
)


def _prepare(body: Mapping[str, Any]) -> Mapping[str, Any]:
    fields = check_amounts(RESPONSES.apply(body))
    items = fields.get("input")
    if isinstance(items, list):
        lists = [item[name] for item in items if isinstance(item, dict) for name in ("content", "summary", "output")
                 if isinstance(item.get(name), list)]
        count = len(items) + sum(map(len, lists))
        if count > MAX_MESSAGES:
            message = f"input: {count} items and parts of items, at most {MAX_MESSAGES} are taken"
            raise InvalidRequest(message, param="input")
    return fields


RESPONSE_FORM = Form(model=CreateResponse, prepare=_prepare, max_values=MAX_VALUES)
