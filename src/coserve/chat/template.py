"""A model's chat template: Jinja source that turns messages into text. Compiled by transformers, with its filters and globals.

Owns: rendering, the date that templates read, which roles a template has of its own. Does not own: tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices

from coserve.core import InvalidRequest, one_line

Message = Mapping[str, Any]
"""A chat message: role, content, possibly name, and for an assistant possibly `tool_calls` (with arguments as objects),
`reasoning_content` and `weight` (0: not trained). One of role tool may have `tool_call_id`."""

PROBE = "coserve-probe"
_NO_ROLE = "qzxcourier"
"""A role that no template knows."""
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatExtras:
    """What a chat template is given beside the messages. tools: OpenAI's tools, each {"type": "function", "function": {...}}.
    variables: further variables by name, as a client's `chat_template_kwargs` has them (`enable_thinking`)."""

    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)


NO_EXTRAS = ChatExtras()


class ChatTemplate:
    """One template. special_tokens: what it may write by name (`bos_token` and so on)."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)

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

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, now: datetime | None = None,
        extras: ChatExtras = NO_EXTRAS,
    ) -> str:
        """The conversation as text. now: what templates that write today's date are told; None: the machine's clock.

        Raises InvalidRequest if the template refuses the conversation.
        """
        try:
            template = _compile_jinja_template(self.source)
            variables = {**self._variables(messages, now, extras), "add_generation_prompt": add_generation_prompt}
            return str(template.render(variables))
        except Exception as error:  # a template is foreign code: whatever it raises is about these messages
            raise _refused(error) from error

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
            raise _refused(error) from error
        return text, spans

    def _variables(self, messages: Sequence[Message], now: datetime | None, extras: ChatExtras) -> dict[str, Any]:
        """What the template sees; plain data only, as templates are foreign code. Extra variables replace no other one."""
        turns = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        tools = [dict(tool) for tool in extras.tools] or None
        variables = {**extras.variables, **self._special_tokens, "messages": turns, "tools": tools, "documents": None}
        return variables if now is None else {**variables, "strftime_now": now.strftime}

    def _try_role(self, role: str) -> str | None:
        messages = [{"role": role, "content": PROBE}, {"role": "user", "content": "x"}]
        try:
            return self.render(messages, add_generation_prompt=False)
        except InvalidRequest:
            return None

    @staticmethod
    def _nameless(text: str | None) -> str | None:
        """Without the names of the two roles that are compared."""
        return None if text is None else re.sub(f"developer|{_NO_ROLE}", "", text, flags=re.IGNORECASE)


def _refused(error: Exception) -> InvalidRequest:
    return InvalidRequest(f"the model's chat template refuses the conversation: {one_line(error, 300)}", param="messages")
