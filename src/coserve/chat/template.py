"""A model's chat template: Jinja source that turns messages into text. Compiled by transformers, with its filters and globals.

Owns: rendering, the date that templates read, which roles a template has of its own, which variables it reads, where a message
that is to be continued ends. Does not own: tokens, how a model is told of tools whose template doesn't (toolprompt.py).
"""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any

from transformers.utils.chat_template_utils import (
    _compile_jinja_template,
    _get_template_literal_text,
    _get_template_variables,
    _render_with_assistant_indices,
)

from coserve.chat.toolprobe import probe_tools
from coserve.chat.toolprompt import Message, ToolPrompt
from coserve.core import ContextExceeded, CoserveError, InvalidRequest, one_line

PROBE = "coserve-probe"
_NO_ROLE = "qzxcourier"
"""A role that no template knows."""
_MAX_REASON = 300
"""Characters that are shown of what a template says when it refuses a conversation."""
_OWN_VARIABLES = frozenset({
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "bos_token",
    "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token", "additional_special_tokens",
})
"""Variables that are set by whoever renders a conversation, or that transformers takes for its own."""
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatExtras:
    """What a chat template is given beside the messages. tools: OpenAI's tools, each {"type": "function", "function": {...}}.
    variables: further variables by name, as a client's `chat_template_kwargs` has them (`enable_thinking`)."""

    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)


NO_EXTRAS = ChatExtras()


class ChatTemplate:
    """One template. special_tokens: what it may write by name (`bos_token` and so on). call_format: how the model writes calls
    of tools, a name of toolprompt.CALL_FORMATS; None: as the template says."""

    owner = "the model's"
    """Whose it is, for errors."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any], call_format: str | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._call_format = call_format

    @property
    def has_generation_tags(self) -> bool:
        """Whether it marks what an assistant writes by `{% generation %}`."""
        return _GENERATION_TAG.search(self.source) is not None

    @functools.cached_property
    def knows_developer(self) -> bool:
        """Whether it has a developer role of its own: it renders such a message, and not as it renders any made-up role."""
        found = self._try_role("developer")
        return found is not None and PROBE in found and self._nameless(found) != self._nameless(self._try_role(_NO_ROLE))

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether it renders a system message."""
        return PROBE in (self._try_role("system") or "")

    @functools.cached_property
    def written(self) -> str:
        """All texts that its source writes out, with characters between them that no text holds. Nothing if it isn't Jinja."""
        try:
            return str(_get_template_literal_text(self.source))
        except Exception:
            return ""

    @functools.cached_property
    def reads(self) -> frozenset[str]:
        """Names of the variables that it reads and that somebody else has to set. Empty if it isn't Jinja."""
        try:
            return frozenset(_get_template_variables(self.source))
        except Exception:
            return frozenset()

    def check(self) -> None:
        """Raises InvalidRequest if its source isn't Jinja."""
        try:
            _compile_jinja_template(self.source)
        except Exception as error:
            raise no_template(one_line(error)) from error

    def sets(self, name: str) -> bool:
        """Whether a variable has a value that nobody else may give."""
        return name in _OWN_VARIABLES or name in self._special_tokens

    @functools.cached_property
    def tool_prompt(self) -> ToolPrompt:
        """What of tools, calls and results it is given, and what becomes text before. See toolprobe.py."""
        return probe_tools(self._try, self.source, self._call_format, system=self.takes_system)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, now: datetime | None = None,
        extras: ChatExtras = NO_EXTRAS, continue_final: bool = False, max_chars: int | None = None,
    ) -> str:
        """The conversation as text. now: what templates that write today's date are told; None: the machine's clock.
        continue_final: whether the last message stays open, so that the text ends with its content. max_chars: the most
        characters that the text may have.

        Raises InvalidRequest if the template refuses the conversation or leaves out what is to be continued, ContextExceeded if
        the text is too long.
        """
        tag = f"qzx{secrets.token_hex(12)}"  # no text holds it
        if continue_final:
            messages = [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}{tag} "}]
        try:
            variables = {**self._variables(messages, now, extras), "add_generation_prompt": add_generation_prompt}
            text = self._write(variables, max_chars)
        except CoserveError:
            raise
        except Exception as error:  # a template is foreign code: whatever it raises is about these messages
            raise _refused(error, self.owner, tag) from error
        return _until(tag, text) if continue_final else text

    def _write(self, variables: Mapping[str, Any], max_chars: int | None) -> str:
        """Its text with these variables. Raises ContextExceeded, and whatever the template raises."""
        pieces, size = list[str](), 0
        for piece in _compile_jinja_template(self.source).generate(variables):
            size += len(piece)
            if max_chars is not None and size > max_chars:
                raise too_long(max_chars)
            pieces.append(piece)
        return "".join(pieces)

    def render_generated(
        self, messages: Sequence[Message], *, now: datetime | None = None, extras: ChatExtras = NO_EXTRAS
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the character ranges [start, end) inside `{% generation %}`. Raises InvalidRequest."""
        try:
            text, spans = _render_with_assistant_indices(
                compiled_template=_compile_jinja_template(self.source), add_generation_prompt=False,
                **self._variables(messages, now, extras),
            )
        except Exception as error:
            raise _refused(error, self.owner) from error
        return text, spans

    def _variables(self, messages: Sequence[Message], now: datetime | None, extras: ChatExtras) -> dict[str, Any]:
        """What the template sees; plain data only, as templates are foreign code. Extra variables replace no other one."""
        if extras.tools or any("tool_calls" in message or message["role"] == "tool" for message in messages):
            messages, told = self.tool_prompt.adapt(messages, extras.tools)
            extras = replace(extras, tools=(), variables={**extras.variables, **told})
            return {**self._as_given(messages, now, extras), **told}
        return self._as_given(messages, now, extras)

    def _as_given(self, messages: Sequence[Message], now: datetime | None, extras: ChatExtras) -> dict[str, Any]:
        turns = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        tools = [dict(tool) for tool in extras.tools] or None
        variables = {**extras.variables, **self._special_tokens, "messages": turns, "tools": tools, "documents": None}
        return variables if now is None else {**variables, "strftime_now": now.strftime}

    def _try_role(self, role: str) -> str | None:
        return self._try([{"role": role, "content": PROBE}, {"role": "user", "content": "x"}])

    def _try(self, messages: Sequence[Message], variables: Mapping[str, Any] = MappingProxyType({})) -> str | None:
        """What it renders of messages as they are; None if it refuses them."""
        try:
            given = {**self._as_given(messages, None, NO_EXTRAS), **variables, "add_generation_prompt": False}
            return self._write(given, None)
        except Exception:
            return None

    @staticmethod
    def _nameless(text: str | None) -> str | None:
        """Without the names of the two roles that are compared."""
        return None if text is None else re.sub(f"developer|{_NO_ROLE}", "", text, flags=re.IGNORECASE)


def _refused(error: Exception, owner: str, tag: str = "") -> InvalidRequest:
    """tag: what was put behind a message's content, which the error may repeat."""
    shown = one_line(error)
    if tag:
        shown = shown.replace(f"{tag} ", "").replace(tag, "")
    return InvalidRequest(f"{owner} chat template refuses the conversation: {_cut(shown)}", param="messages")


def no_template(reason: str) -> InvalidRequest:
    """The error of a source that isn't Jinja."""
    return InvalidRequest(f"chat_template: isn't a Jinja template: {_cut(reason)}", param="chat_template")


def _cut(reason: str) -> str:
    return reason if len(reason) <= _MAX_REASON else f"{reason[: _MAX_REASON - 3]}..."


def too_long(max_chars: int) -> ContextExceeded:
    """The error of a rendered conversation with more characters."""
    return ContextExceeded(
        f"messages: with what the chat template adds, the conversation has more than {max_chars} characters, and this model's "
        "context can't hold so many; shorten it", param="messages",
    )


def _until(tag: str, text: str) -> str:
    """A rendered text up to the end of the content that the tag was put behind. Where the template has trimmed the content, the
    text ends with no white space, as transformers has it."""
    place = text.rfind(tag)
    if place < 0:
        raise InvalidRequest(
            "continue_final_message: the model's chat template leaves out the last message's content, so that it can't be "
            "continued", param="continue_final_message",
        )
    return text[:place] if text.startswith(f"{tag} ", place) else text[:place].rstrip()
