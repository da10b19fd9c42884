"""The table of formats, by vLLM's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coserve.chat.toolformats.events import CallReader
from coserve.chat.toolformats.jsoncalls import JsonCallReader
from coserve.chat.toolformats.mistral import ARGS, CALL_ID, CALLS, MistralReader
from coserve.chat.toolformats.qwenxml import QwenXmlReader

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """A way of writing calls.

    markers: what it writes around calls; in some vocabularies these are special tokens, which must then show in the text.
    new_reader: makes a reader for one output, given the request's tools.
    """

    markers: tuple[str, ...]
    new_reader: Callable[[Tools], CallReader]


def _json_format(*markers: str, ends: tuple[str, ...] = ()) -> CallFormat:
    return CallFormat(
        markers=(*markers, *ends),
        new_reader=lambda tools: JsonCallReader([tool["function"]["name"] for tool in tools], markers, ends),
    )


FORMATS: Mapping[str, CallFormat] = {
    "hermes": _json_format("<tool_call>", ends=("</tool_call>",)),
    "granite": _json_format("<|tool_call|>", "<tool_call>", ends=("</tool_call>",)),
    "llama3_json": _json_format("<|python_tag|>"),
    "mistral": CallFormat(
        markers=(CALLS, CALL_ID, ARGS), new_reader=lambda tools: MistralReader([tool["function"]["name"] for tool in tools]),
    ),
    "qwen3_xml": CallFormat(markers=("<tool_call>", "</tool_call>"), new_reader=QwenXmlReader),
}
