"""How one request's calls of tools are read from its outputs.

    server's setting    auto    as the model's chat template writes calls; else in Hermes' way, which the model is then told
                        NAME    in this way, a name of chat/toolformats/formats.py
                        none    not at all: an output is text

Owns: which way it is, for a server and for a request. Does not own: the ways themselves (coserve.chat.toolformats).
"""

from __future__ import annotations

from coserve.chat.toolformats.formats import FORMATS
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
        self._use = use
        self._format = FORMATS[tokenizer.tool_prompt.call_format] if use.callable and parser != NO_PARSER else None
        if use.required and self._format is None:
            field = "function_call" if use.old else "tool_choice"
            message = f"{field}: this server doesn't read calls of tools (--tool-call-parser none), so none can be required"
            raise InvalidRequest(message, param=field)
        self._short_ids = self._format is FORMATS["mistral"]
        special, markers = tokenizer.special_tokens, () if self._format is None else self._format.markers
        self.marker_ids = frozenset(special[marker] for marker in markers if marker in special)
        """Special tokens that the text must show for calls to be read."""

    def new_reader(self) -> OutputReader:
        """A reader for one output."""
        if self._format is None:
            return PlainReader()
        new_id = new_short_id if self._short_ids else new_call_id
        return ToolReader(self._format.new_reader(self._use.callable), new_id=new_id, parallel=self._use.parallel)
