"""Chat templates that requests bring: a tokenizer for each.

Owns: how many are kept, what is said where none is taken. Does not own: how they are rendered (coserve.chat.foreign).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import partial

from coserve.chat.foreign import ForeignTemplate, TemplateProcess
from coserve.core import InvalidRequest
from coserve.server.inference.prompts import ThreadRunner
from coserve.text.tokenizer import ChatTokenizer

MAX_KEPT = 8
"""Templates that are kept for further requests."""


class RequestTemplates:
    """The model's tokenizer with templates of requests. Any thread may use it."""

    def __init__(self, tokenizer: ChatTokenizer, process: TemplateProcess | None = None) -> None:
        self._tokenizer, self._process = tokenizer, process or TemplateProcess()
        self._kept: OrderedDict[str, ChatTokenizer] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, source: str) -> ChatTokenizer:
        """The tokenizer with a template, which takes a moment if the template is new. Raises InvalidRequest if it isn't Jinja,
        and what `TemplateProcess.ask` raises."""
        with self._lock:
            if source in self._kept:
                self._kept.move_to_end(source)
                return self._kept[source]
        found = self._tokenizer.with_template(source, partial(ForeignTemplate, process=self._process))
        found.template.check()
        with self._lock:
            self._kept[source] = found
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return found

    def close(self) -> None:
        """Ends the process that renders."""
        self._process.close()


async def chat_tokenizer(
    tokenizer: ChatTokenizer, templates: RequestTemplates | None, run: ThreadRunner, source: str | None
) -> ChatTokenizer:
    """The tokenizer for a request. templates: None if requests may bring none. source: of the one that it brings. Raises
    InvalidRequest and what `RequestTemplates.find` raises."""
    if source is None:
        return tokenizer
    if templates is None:
        raise InvalidRequest(
            "chat_template: this server takes no template from a request, unless it is started with "
            "--trust-request-chat-template; leave the field out", param="chat_template",
        )
    return await run(partial(templates.find, source))
