"""Bodies of the inference routes, with OpenAI's names and vLLM's beside them.

Owns: types and ranges of fields, and their way into a SamplingConfig. Does not own: what becomes of fields that aren't here
(fields.py), prompts in tokens (prompts.py). None always means: not given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from coserve.chat.messages import ROLES, TOOL_ROLES
from coserve.config.settings import SamplingConfig
from coserve.config.values import BEST_EFFORT, SloMs, is_number, shown
from coserve.core import InvalidRequest
from coserve.server.bodies.forms import Body
from coserve.server.inference.thoughts import Effort
from coserve.server.inference.toolfields import (
    FUNCTION_CALL_SCHEMA,
    FUNCTIONS_SCHEMA,
    TOOL_CHOICE_SCHEMA,
    TOOLS_SCHEMA,
    ToolUse,
    read_tool_use,
)
from coserve.text.tokenizer import ChatTokenizer

MAX_OUTPUTS = 128
"""Of one prompt."""
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_TEMPLATE = 1 << 17
"""Characters of a request's chat template."""
DEFAULT_COMPLETION_TOKENS = 16

_INT64 = 1 << 63
_INT31 = (1 << 31) - 1
_LEAST_MS, _MOST_MS = 1e-3, 1e7
_PLAIN = (
    "min_tokens", "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos",
    "n", "prompt_logprobs",
)
"""Fields that go into a SamplingConfig as they are."""
_TEXT_OR_TEXTS: dict[str, Any] = {"anyOf": [
    {"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_STOPS}, {"type": "null"},
]}
_PROMPT: dict[str, Any] = {"anyOf": [
    {"type": "string", "minLength": 1},
    {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
    {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
    {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}, "minItems": 1},
]}
_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]}
"""A JSON schema, or its text."""
Positive = Annotated[int, Field(ge=1, le=_INT31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


def _check_objective(value: Any) -> Any:
    """One sentence for all that is wrong, where a union of types would have one for each type."""
    if value is None or (isinstance(value, str) and value == BEST_EFFORT):
        return value
    if is_number(value) and _LEAST_MS <= value <= _MOST_MS:
        return float(value)
    raise PydanticCustomError(
        "objective", 'must be a positive number of milliseconds ({least} to {most}) or "none" (best effort), got {given}',
        {"least": f"{_LEAST_MS:g}", "most": f"{_MOST_MS:.0f}", "given": shown(value)},
    )


SloField = Annotated[SloMs | None, PlainValidator(_check_objective), WithJsonSchema({"anyOf": [
    {"type": "number", "minimum": _LEAST_MS, "maximum": _MOST_MS}, {"type": "string", "const": BEST_EFFORT}, {"type": "null"},
]})]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
TemplateSource = Annotated[str, Field(max_length=MAX_TEMPLATE)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=_INT31)]], Field(fail_fast=True)]


class StreamOptions(Body):
    """include_obfuscation is a hint that nothing here needs."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class ResponseSchema(Body):
    """OpenAI's `json_schema`. strict: the schema is enforced in any case."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[Any, Field(alias="schema"), WithJsonSchema(_SCHEMA)] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's: what the answer is."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: ResponseSchema | None = None


class StructuredOutputs(Body):
    """vLLM's: what the output must match, by one of the first five; the rest tells how, and how to fall back."""

    json_: Annotated[Any, Field(alias="json"), WithJsonSchema(_SCHEMA)] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_fallback: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


class GenerationRequest(Body):
    """What chat and completions share. Times are milliseconds."""

    model: str | None = None
    """None: the first served name of the base model."""
    max_tokens: Positive | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_INT31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT31)] | None = None
    """-1 and 0: all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    """By token id, as a JSON key."""
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    """None: a fresh one for each request."""
    stop: Annotated[Any, WithJsonSchema(_TEXT_OR_TEXTS)] = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_OUTPUTS)] | None = None
    prompt_logprobs: NumLogprobs | None = None
    return_token_ids: bool | None = None
    """The ids of the prompt and of the output too."""
    skip_special_tokens: bool | None = None
    """None and true: special tokens don't show in the text of the output."""
    return_tokens_as_token_ids: bool | None = None
    """Log-probabilities call tokens by their ids, as `token_id:7`."""
    response_format: ResponseFormat | None = None
    """What the output must match, by OpenAI's name; then by vLLM's and SGLang's. At most one of all (structured.py)."""
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[Any, WithJsonSchema(_SCHEMA)] = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    json_schema: Annotated[Any, WithJsonSchema(_SCHEMA)] = None
    regex: str | None = None
    ebnf: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    slo_tpot_ms: SloField = None
    """Objective of this request: per output token after the first. "none": best effort; None: the server's."""
    slo_ttft_ms: SloField = None
    """Objective of this request: to the first token; otherwise as slo_tpot_ms."""

    @property
    def num_outputs(self) -> int:
        """Per prompt."""
        return self.n or 1

    @property
    def by_id(self) -> bool:
        """Whether log-probabilities name tokens by their ids."""
        return bool(self.return_tokens_as_token_ids)

    def shown_ids(self, tokenizer: ChatTokenizer) -> frozenset[int]:
        """Special tokens that the output's text shows."""
        return tokenizer.special_ids if self.skip_special_tokens is False else frozenset()

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to tell at each place; None: no log-probabilities."""
        raise NotImplementedError

    def check(self) -> None:
        """What several fields say together. Raises InvalidRequest."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options: is for stream=true only", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            message = "prompt_logprobs: is not supported in a stream; leave one of them out"
            raise InvalidRequest(message, param="prompt_logprobs")

    def sampling(
        self, *, max_tokens: int, vocab_size: int, draw_seed: Callable[[], int], grammar: str | None = None
    ) -> SamplingConfig:
        """For max_tokens of output. draw_seed: called if the request gives no seed. grammar: what the output must match. Raises
        InvalidRequest, ConfigError."""
        given: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN if getattr(self, name) is not None}
        return SamplingConfig(
            **given, max_tokens=max_tokens, logprobs=self.num_logprobs, stop=_stops(self.stop), top_k=max(0, self.top_k or 0),
            logit_bias=_biases(self.logit_bias or {}, vocab_size),
            stop_token_ids=tuple(_in_vocabulary("stop_token_ids", token, vocab_size) for token in self.stop_token_ids or ()),
            seed=draw_seed() if self.seed is None else self.seed, grammar=grammar,
        )


class ContentPart(BaseModel):
    """A part of a message. Other types than text come as they are, to be refused by name."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Annotated[str, Field(json_schema_extra={"enum": ["text"]})]
    text: str | None = None


class ChatMessage(Body):
    """One turn. tool_calls, tool_call_id, function_call: see toolturns.py. reasoning_content, reasoning: thoughts of the
    assistant. What else its turn may bring along from an earlier response is taken if it's empty; refusal, annotations and
    provider_specific_fields (litellm's notes) in any case, as they are no part of the conversation. type: as lm-eval ("text")
    and the Responses API ("message") write beside the role."""

    role: Annotated[str, Field(json_schema_extra={"enum": [*ROLES, *TOOL_ROLES]})]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    type: Literal["text", "message"] | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    provider_specific_fields: Any = None
    parsed: Any = None
    """What openai's client has made of the content, in a message that it gives back. It doesn't count either."""


class ThinkingSwitch(Body):
    """DeepSeek's way to turn thinking on and off."""

    type: Literal["enabled", "disabled"]


class ChatRequest(GenerationRequest):
    """/v1/chat/completions. max_completion_tokens counts where max_tokens is given too; default: what the context leaves.
    reasoning_effort and the fields after it: see thoughts.py."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    """The output goes on with the last message, which is the assistant's."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its own, beside those that the chat template writes."""
    chat_template: TemplateSource | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    thinking: ThinkingSwitch | None = None
    include_reasoning: bool | None = None
    """false: thoughts are left out of the answer."""
    separate_reasoning: bool | None = None
    """false: the answer's text is as the model has written it, thoughts and tags included."""
    stream_reasoning: bool | None = None
    """false: a stream has thoughts in one piece, at their end."""

    @property
    def asked_thinking(self) -> bool | None:
        """Whether `thinking` turns it on or off."""
        return None if self.thinking is None else self.thinking.type == "enabled"
    tools: Annotated[Any, WithJsonSchema(TOOLS_SCHEMA)] = None
    tool_choice: Annotated[Any, WithJsonSchema(TOOL_CHOICE_SCHEMA)] = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[Any, WithJsonSchema(FUNCTIONS_SCHEMA)] = None
    function_call: Annotated[Any, WithJsonSchema(FUNCTION_CALL_SCHEMA)] = None

    @functools.cached_property
    def tool_use(self) -> ToolUse:
        """What its fields say about tools. Raises InvalidRequest."""
        return read_tool_use(self.tools, self.tool_choice, self.parallel_tool_calls, self.functions, self.function_call)

    def check(self) -> None:
        super().check()
        _ = self.tool_use
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs: is for logprobs=true only", param="top_logprobs")

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """/v1/completions. best_of: only n itself, as there is no choosing among more."""

    prompt: Annotated[Any, WithJsonSchema(_PROMPT)]
    max_tokens: Annotated[int, Field(ge=0, le=_INT31)] | None = None
    """0: no output; with echo and logprobs the prompt is scored."""
    echo: bool | None = None
    logprobs: NumLogprobs | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_OUTPUTS)] | None = None
    add_special_tokens: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def scores_prompt(self) -> int | None:
        """Likeliest tokens to tell at each place of the prompt, for echo or prompt_logprobs; None: no log-probabilities."""
        asked = [count for count in (self.logprobs if self.echo else None, self.prompt_logprobs) if count is not None]
        return max(asked, default=None)

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != self.num_outputs:
            raise InvalidRequest("best_of: with another value than n is not supported yet; leave it out", param="best_of")
        if self.stream and self.echo and self.logprobs is not None:
            raise InvalidRequest("echo: with logprobs is not supported in a stream; leave one of them out", param="echo")


class TokenizeRequest(Body):
    """/tokenize: a text or a conversation. add_special_tokens: default true for a text, false for a conversation. The fields
    after it are of conversations."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: TemplateSource | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[Any, WithJsonSchema(TOOLS_SCHEMA)] = None


class DetokenizeRequest(Body):
    """/detokenize."""

    model: str | None = None
    tokens: TokenIds


def _stops(stop: Any) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("stop: must be a text or a list of texts", param="stop")
    if len(texts) > MAX_STOPS:
        raise InvalidRequest(f"stop: at most {MAX_STOPS} texts, got {len(texts)}", param="stop")
    return tuple(texts)


def _biases(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise InvalidRequest(f"logit_bias: keys must be token ids, got {key[:40]!r}", param="logit_bias")
        biases[_in_vocabulary("logit_bias", int(key), vocab_size)] = float(value)
    return biases


def _in_vocabulary(name: str, token: int, vocab_size: int) -> int:
    if not 0 <= token < vocab_size:
        raise InvalidRequest(f"{name}: token ids must be from 0 to {vocab_size - 1}, got {token}", param=name)
    return token
