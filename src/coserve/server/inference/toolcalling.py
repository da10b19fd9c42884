"""How one request's calls of tools are read from its outputs, and when a grammar holds the outputs to them.

    server's setting    auto    as the model's chat template writes calls; else in Hermes' way, which the model is then told
                        NAME    in this way, a name of chat/toolformats/formats.py
                        none    not at all: an output is text

    a call is required, or named                    a grammar of calls, with the parameters of all tools
    strict tools, one call at most, allowed tools   a grammar of text and calls, with the parameters of strict tools
    a response format as well                       a grammar of calls or of that format
    anything else                                   no grammar

Owns: which way and which grammar it is, for a server and for a request. Does not own: the ways and grammars themselves
(coserve.chat.toolformats).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from coserve.chat.toolformats.formats import FORMATS
from coserve.chat.toolformats.grammar import call_grammar, enforced, schema_grammar
from coserve.config.values import AUTO
from coserve.core import ConfigError, InvalidRequest
from coserve.server.inference.deltas import OutputReader, PlainReader
from coserve.server.inference.toolfields import ToolUse
from coserve.server.inference.toolreader import ToolReader, new_call_id, new_short_id
from coserve.server.settings import NO_PARSER, PARSER_ALIASES
from coserve.text.tokenizer import ChatTokenizer


def call_format(parser: str) -> str | None:
    """The format that a server's setting names, None if it names none. parser: ServerConfig.tool_call_parser."""
    return None if parser in (AUTO, NO_PARSER) else PARSER_ALIASES.get(parser, parser)


def check_call_format(parser: str, tokenizer: ChatTokenizer) -> None:
    """Raises ConfigError if the model is told to write calls in another way than the setting says."""
    named = call_format(parser)
    told = tokenizer.tool_prompt.call_format if tokenizer.has_chat_template else None
    if None not in (told, named) and told != named:
        raise ConfigError(
            f"tool_call_parser: the model's chat template tells it of no tools, so it is told to write calls as {told} reads "
            f"them; give {told} or auto, got {parser!r}", param="tool_call_parser",
        )


class ToolCalling:
    """One request. parser: ServerConfig.tool_call_parser."""

    def __init__(self, use: ToolUse, tokenizer: ChatTokenizer, parser: str) -> None:
        """Raises InvalidRequest if the model must call a tool, and calls aren't read."""
        self._use, self._special = use, tokenizer.special_tokens
        self._name = tokenizer.tool_prompt.call_format if use.callable else ""
        self._format = FORMATS[self._name] if use.callable and parser != NO_PARSER else None
        if use.required and self._format is None:
            field = "function_call" if use.old else "tool_choice"
            message = f"{field}: this server doesn't read calls of tools (--tool-call-parser none), so none can be required"
            raise InvalidRequest(message, param=field)
        self._short_ids = self._format is FORMATS["mistral"]
        markers = () if self._format is None else self._format.markers
        self.marker_ids = frozenset(self._special[marker] for marker in markers if marker in self._special)
        """Special tokens that the text must show for calls to be read."""

    def new_reader(self, *, held: bool = False) -> OutputReader:
        """A reader for one output. held: whether a grammar of `compose` holds it."""
        if self._format is None:
            return PlainReader()
        make = self._format.new_strict_reader if held else self._format.new_reader
        new_id = new_short_id if self._short_ids else new_call_id
        return ToolReader(make(self._use.callable), new_id=new_id, parallel=self._use.parallel)

    @property
    def reads(self) -> bool:
        """Whether an output may have calls."""
        return self._format is not None

    @property
    def enforces(self) -> bool:
        """Whether outputs are held to a grammar, whatever else the request asks for."""
        use = self._use
        strict = any(tool["function"].get("strict") for tool in use.callable)
        return self.reads and (use.required or strict or use.restricted or not use.parallel)

    def compose(self, content: str | None, check: Callable[[str, str], None]) -> str | None:
        """The grammar of an output that may have calls; None if it may be anything. content: that of an output without calls.
        check: is given the grammar of each tool's arguments and the field that it comes from. Raises what that raises."""
        use = self._use
        if not self.enforces and content is None:
            return None
        tools = []
        for tool in use.callable:
            tools.append(enforced(tool, schema=use.required or bool(tool["function"].get("strict"))))
            check(schema_grammar(tools[-1]), self._field(tool))
        return call_grammar(
            self._name, tools, self._special, required=use.required, parallel=use.parallel, content=content
        )

    def _field(self, tool: Mapping[str, Any]) -> str:
        """Where the request has a tool's parameters."""
        place = next(number for number, other in enumerate(self._use.tools) if other is tool)
        return f"functions[{place}].parameters" if self._use.old else f"tools[{place}].function.parameters"
