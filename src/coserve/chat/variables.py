"""Variables that a request, or a line of training data, gives to a chat template: `chat_template_kwargs`.

Owns: which are taken. Does not own: what a template reads (template.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coserve.chat.reasoning import ThoughtStyle
from coserve.chat.template import ChatTemplate
from coserve.config.values import shown
from coserve.core import InvalidRequest

SWITCHES = ("enable_thinking", "thinking")
"""Variables with which chat templates turn thinking on and off."""
MAX_VARIABLES, MAX_DEPTH = 64, 32
"""Of chat_template_kwargs: names, and lists and objects within each other."""
_FIELD = "chat_template_kwargs"
_MAX_MESSAGE = 900


def check_variables(given: Mapping[str, Any] | None, template: ChatTemplate, style: ThoughtStyle | None) -> dict[str, Any]:
    """The variables that the template reads, of a request's or a training line's chat_template_kwargs. style: how the model
    thinks. Raises InvalidRequest for all others, but for a switch that asks for what happens anyway."""
    if given is None:
        return {}
    if len(given) > MAX_VARIABLES:
        raise InvalidRequest(f"{_FIELD}: {len(given)} variables, at most {MAX_VARIABLES} are taken", param=_FIELD)
    if _depth(given) > MAX_DEPTH:
        raise InvalidRequest(f"{_FIELD}: is nested too deeply; at most {MAX_DEPTH} lists and objects within each other",
                             param=_FIELD)
    found = {}
    for name, value in given.items():
        place = f"{_FIELD}.{name}" if name.isidentifier() and name.isascii() and len(name) <= 80 else _FIELD
        if template.sets(name):
            raise InvalidRequest(f"{place}: is set by the server itself; leave it out", param=place)
        if name in template.reads:
            found[name] = value
        elif name not in SWITCHES or value is not (style is not None) or template.reads.intersection(SWITCHES):
            known = ", ".join(sorted(each for each in template.reads if not template.sets(each))) or "none"
            message = f"{place}: the chat template reads no variable {shown(name)}; those that it reads: {known}"
            raise InvalidRequest(message[:_MAX_MESSAGE], param=place)
    return found


def _depth(value: Any) -> int:
    """Lists and objects within each other."""
    depth, level = 0, [value]
    while level:
        inner = [item for item in level if isinstance(item, dict | list)]
        depth += bool(inner)
        level = [item for each in inner for item in (each.values() if isinstance(each, dict) else each)]
    return depth
