"""What a request says to the model, in tokens: a conversation or texts, and how much output the context leaves.

Owns: which messages and prompts are taken. Does not own: the chat template (text/tokenizer.py), the fields' types
(protocol.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from coserve.chat.messages import CALL_FIELDS, REASONING, ROLES, TOOL_ROLES, UNSUPPORTED, is_neutral, join_parts
from coserve.chat.template import NO_EXTRAS, ChatExtras
from coserve.config.values import shown
from coserve.core import ContextExceeded, InvalidRequest, invalid_field
from coserve.server.inference.protocol import ChatMessage, ContentPart
from coserve.server.inference.toolturns import ToolTurns
from coserve.text.detokenizer import shown_text
from coserve.text.tokenizer import ChatTokenizer, TextRules

_LONG_CHARS = 4096
"""Longer prompts are tokenized in a thread, so that others' tokens aren't held up."""
_MESSAGE_CHARS = 64
"""Characters that a message, or a part of one, counts for beside its text, since template and checks take time for each."""
_MAX_PROMPTS = 1024
_OWN_CALL_FIELDS = {"assistant": ("tool_calls", "function_call"), "tool": ("tool_call_id",)}
"""Fields of calls and results, by the role whose messages have them."""
Result = TypeVar("Result")


class ThreadRunner(Protocol):
    """Runs work in a thread: WorkPool.run of a tenant."""

    def __call__(self, work: Callable[[], Result], /) -> Awaitable[Result]: ...


class Prompt(NamedTuple):
    """text: the given one; for a prompt of ids, their text."""

    ids: list[int]
    text: str


async def conversation_prompt(
    tokenizer: ChatTokenizer, messages: Sequence[ChatMessage], *, run: ThreadRunner, limit: int,
    add_generation_prompt: bool = True, add_special_tokens: bool = False, allow_control_tokens: bool = False,
    extras: ChatExtras = NO_EXTRAS, continue_final: bool = False, always_beside: bool = False,
) -> list[int]:
    """A conversation in tokens. limit: of the context, in tokens. allow_control_tokens: whether control tokens that a message
    writes out count as such; if not, they are plain text. extras: what the template is given beside the messages.
    continue_final: whether the last message stays open, see `final_content`. always_beside: whether a thread does it, however
    short it is. Raises InvalidRequest."""
    rules = TextRules(allow_control_tokens=allow_control_tokens)

    def encode() -> list[int]:
        turns = template_messages(messages, keep_developer=tokenizer.knows_developer)
        _check_size(tokenizer, sum(map(_num_characters, turns)), limit, "messages")
        _check_size(tokenizer, _num_characters(extras.tools), limit, "tools")
        _check_size(tokenizer, _num_characters(extras.variables), limit, "chat_template_kwargs")
        ids = tokenizer.encode_chat(
            turns, add_generation_prompt=add_generation_prompt, add_special_tokens=add_special_tokens, rules=rules,
            extras=extras, continue_final=continue_final, max_chars=limit * tokenizer.longest_token,
        )
        _check_size(tokenizer, len(ids), limit, "messages", "tokens")
        return ids

    size = _num_characters(extras.tools)
    for message in messages:
        parts = message.content if isinstance(message.content, list) else [message]
        texts = (part.text if isinstance(part, ContentPart) else part.content for part in parts)
        size += sum(_MESSAGE_CHARS + len(text or "") for text in texts)
        size += _num_characters(message.tool_calls) + _num_characters(message.function_call)
        size += len(message.reasoning_content or message.reasoning or "")
    size += _num_characters(extras.variables)
    return await (run(encode) if always_beside else _beside(run, encode, size))


async def text_prompts(
    tokenizer: ChatTokenizer, prompt: Any, *, run: ThreadRunner, vocab_size: int, limit: int, add_special_tokens: bool = True
) -> list[Prompt]:
    """The prompts of a completion: a text, token ids, or a list of either. Control tokens written out in a text are control
    tokens: a raw prompt is the caller's own template. limit: of the context, in tokens. Raises InvalidRequest."""

    def encode(item: str | list[int]) -> Prompt:
        _check_size(tokenizer, len(item), limit, "prompt", "characters" if isinstance(item, str) else "token ids")
        if isinstance(item, str):
            ids = tokenizer.encode(item, add_special_tokens)
            _check_size(tokenizer, len(ids), limit, "prompt", "tokens")  # before the next one is read
            return Prompt(ids, item)
        return Prompt(item, shown_text(tokenizer, item))

    prompts = await _beside(run, lambda: [encode(item) for item in _split(prompt, vocab_size)], _prompt_size(prompt))
    if not all(prompt.ids for prompt in prompts):
        raise InvalidRequest("prompt: is empty; give at least one token", param="prompt")
    return prompts


def template_messages(messages: Sequence[ChatMessage], *, keep_developer: bool = False) -> list[dict[str, Any]]:
    """Messages for a chat template: plain texts, calls and results. keep_developer: whether the template knows the role
    developer, which otherwise becomes system.

    Raises InvalidRequest for roles and parts that aren't supported, and results that answer no call.
    """
    turns = []
    tools = ToolTurns()
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if message.role not in (*ROLES, *TOOL_ROLES):
            known = ", ".join((*ROLES, *TOOL_ROLES))
            raise invalid_field(f"{place}.role", f"must be one of {known}")
        for name, neutral in UNSUPPORTED.items():
            if name in REASONING:
                continue
            own = _OWN_CALL_FIELDS.get(message.role, ())
            if name in CALL_FIELDS and name not in own and not is_neutral(getattr(message, name), neutral):
                raise invalid_field(f"{place}.{name}", f"is no field of a message of role {message.role}; leave it out")
            if name not in CALL_FIELDS and not is_neutral(getattr(message, name), neutral):
                raise invalid_field(f"{place}.{name}", "is not supported yet; leave it out")
        role = "system" if message.role == "developer" and not keep_developer else message.role
        turn: dict[str, Any] = {"role": role, "content": _content(message, place)}
        if (thoughts := _thoughts(message, place)) is not None:
            turn["reasoning_content"] = thoughts
        if message.name is not None:
            turn["name"] = message.name
        if message.role in TOOL_ROLES:
            turn |= tools.result(message, place)
        elif message.role == "assistant" and (calls := tools.calls(message, place)):
            turn["tool_calls"] = calls
        turns.append(turn)
    return turns


def final_content(
    messages: Sequence[ChatMessage], *, continue_final_message: bool | None, add_generation_prompt: bool | None
) -> str | None:
    """The last message's content, if the request's output is to continue it. Raises InvalidRequest where that can't be."""
    if not continue_final_message:
        return None
    field, last, place = "continue_final_message", messages[-1], f"messages[{len(messages) - 1}]"
    if add_generation_prompt:
        raise invalid_field(field, "can't stand beside add_generation_prompt, which begins another message; leave one out")
    if last.role != "assistant":
        raise invalid_field(field, f"the last message must be the assistant's, its role is {shown(last.role)}")
    if last.tool_calls or last.function_call:
        raise invalid_field(field, "the last message ends with calls of tools; only a text can be continued")
    if last.content is None:
        raise invalid_field(f"{place}.content", "is missing; it is what is to be continued")
    return _content(last, place)


def output_limit(
    num_prompt: int, asked: int | None, *, default: int | None, limit: int, prompt_field: str, tokens_field: str = "max_tokens"
) -> int:
    """How many tokens the output may have: the number asked for, else the default, else what the context leaves.

    limit: of the context, in tokens. Raises InvalidRequest, naming the field, if the context can't hold so many.
    """
    left = limit - num_prompt
    if left < (asked != 0):
        raise ContextExceeded(
            f"{prompt_field}: this model's maximum context length is {limit} tokens, output included, and the prompt alone has "
            f"{num_prompt}; shorten it", param=prompt_field,
        )
    if asked is None:
        return left if default is None else min(default, left)
    if asked > left:
        raise ContextExceeded(
            f"{tokens_field}: {num_prompt} tokens of prompt and {asked} of output exceed this model's maximum context length "
            f"of {limit} tokens; ask for at most {left}", param=tokens_field,
        )
    return asked


def _num_characters(value: Any) -> int:
    """Characters of a value's texts and names, and at least one for each of its other values."""
    count, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, Mapping):
            left += [*item.values(), *item]
        elif isinstance(item, list | tuple):
            left += item
        else:
            count += len(item) if isinstance(item, str) else item is not None
    return count


def _check_size(tokenizer: ChatTokenizer, size: int, limit: int, field: str, unit: str = "characters") -> None:
    """Refuses a prompt that can't fit the context however it is tokenized: tokenizing megabytes takes minutes and gigabytes.

    unit: what `size` counts: characters, tokens or token ids.
    """
    if size > limit * (tokenizer.longest_token if unit == "characters" else 1):
        raise ContextExceeded(
            f"{field}: this model's maximum context length is {limit} tokens, output included, and the prompt alone has {size} "
            f"{unit}; shorten it", param=field,
        )


def _content(message: ChatMessage, place: str) -> str:
    """A message's text; parts are joined by line ends."""
    if isinstance(message.content, list):
        return join_parts([part.model_dump() for part in message.content], f"{place}.content")
    if message.content is None and message.role != "assistant":
        raise invalid_field(f"{place}.content", "is missing")
    return message.content or ""


def _thoughts(message: ChatMessage, place: str) -> str | None:
    """An assistant's thoughts; None if it has none."""
    given = {name: getattr(message, name) for name in REASONING if getattr(message, name)}
    for name in given:
        if message.role != "assistant":
            raise invalid_field(f"{place}.{name}", "is for messages of the assistant; leave it out")
    if len({*given.values()}) > 1:
        raise invalid_field(f"{place}.reasoning", "says something else than reasoning_content; leave one of them out")
    return next(iter(given.values()), None)


def _split(prompt: Any, vocab_size: int) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise InvalidRequest("prompt: must be a text, token ids, or a list of either", param="prompt")
    if type(prompt[0]) is int:
        return [_token_ids(prompt, "prompt", vocab_size)]
    if len(prompt) > _MAX_PROMPTS:
        raise InvalidRequest(f"prompt: at most {_MAX_PROMPTS} prompts in one request, got {len(prompt)}", param="prompt")
    return [
        item if isinstance(item, str) else _token_ids(item, f"prompt[{number}]", vocab_size)
        for number, item in enumerate(prompt)
    ]


def _token_ids(value: Any, place: str, vocab_size: int) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise invalid_field(place, "must be a text or a list of token ids")
    if value and not 0 <= min(value) <= max(value) < vocab_size:
        raise invalid_field(place, f"token ids must be from 0 to {vocab_size - 1}")
    return value


def _prompt_size(prompt: Any) -> int:
    """Characters or ids of a prompt that hasn't been looked at yet."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return sum(len(item) if isinstance(item, str | list) else 1 for item in prompt)
    return len(prompt) if isinstance(prompt, str | list) else 0


async def _beside(run: ThreadRunner, work: Callable[[], Result], size: int) -> Result:
    """The result of `work`. It runs in a thread if `size`, in characters or ids, is large."""
    return await run(work) if size > _LONG_CHARS else work()
