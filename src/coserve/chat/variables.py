"""Variables that a request, or a line of training data, gives to a chat template: `chat_template_kwargs`.

Owns: which are taken. Does not own: what a template reads (template.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coserve.chat.reasoning import ThoughtStyle
from coserve.chat.template import ChatTemplate
from coserve.config.values import is_nested_deeper, shown
from coserve.core import invalid_field

SWITCHES = ("enable_thinking", "thinking")
"""Variables with which chat templates turn thinking on and off."""
MAX_VARIABLES, MAX_DEPTH = 64, 32
"""Of chat_template_kwargs: names, and lists and objects within each other."""
_FIELD = "chat_template_kwargs"


def check_variables(given: Mapping[str, Any] | None, template: ChatTemplate, style: ThoughtStyle | None) -> dict[str, Any]:
    """The variables that the template reads, of a request's or a training line's chat_template_kwargs. style: how the model
    thinks. Raises InvalidRequest for all others, but for a switch that asks for what happens anyway."""
    if given is None:
        return {}
    if len(given) > MAX_VARIABLES:
        raise invalid_field(_FIELD, f"{len(given)} variables, at most {MAX_VARIABLES} are taken")
    if is_nested_deeper(given, MAX_DEPTH):
        raise invalid_field(_FIELD, f"is nested too deeply; at most {MAX_DEPTH} lists and objects within each other")
    found = {}
    for name, value in given.items():
        place = f"{_FIELD}.{name}" if name.isidentifier() and name.isascii() and len(name) <= 80 else _FIELD
        if template.sets(name):
            raise invalid_field(place, "is set by the server itself; leave it out")
        if name in template.reads:
            found[name] = value
        elif name not in SWITCHES or value is not (style is not None) or template.reads.intersection(SWITCHES):
            known = ", ".join(sorted(each for each in template.reads if not template.sets(each))) or "none"
            raise invalid_field(place, f"the chat template reads no variable {shown(name)}; those that it reads: {known}")
    return found
