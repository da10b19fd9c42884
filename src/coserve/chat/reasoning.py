"""Thoughts in a model's output: where they begin, and where its answer does.

    prompt ends with             output                               thoughts    answer
    "assistant\\n"                "<think>\\nHm.\\n</think>\\n\\nYes."      "Hm."       "Yes."
    "assistant\\n<think>\\n"       "Hm.\\n</think>\\n\\nYes."              "Hm."       "Yes."     begun by the template
    "<think>\\n\\n</think>\\n\\n"    "Yes."                               none        "Yes."     ended by the template

Line ends right inside the tags and behind them belong to the tags, as chat templates have it. Only thoughts that come first are
told apart: tags in an answer are text. The tags must show in the output's text, also where the tokenizer calls them special.

Owns: the tags, and which of a text is which. Does not own: the text as it comes, what a response calls the two.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

from coserve.config.values import AUTO

START, END = "<think>", "</think>"
THOUGHT_MARKERS = (START, END)


class ThoughtStyle(NamedTuple):
    """How a model thinks. always: whether its output begins with thoughts even where nothing in the prompt or the output says
    so."""

    always: bool


STYLES: Mapping[str, ThoughtStyle] = {"qwen3": ThoughtStyle(always=False), "deepseek_r1": ThoughtStyle(always=True)}
"""By the names of vLLM's reasoning parsers."""
PARSERS = (AUTO, "none", *STYLES)
"""What the setting reasoning_parser may be. auto: as the chat template says; none: outputs are read as answers."""


class Begin(enum.Enum):
    """What an output begins with. MAYBE: thoughts, if it begins with their tag. THOUGHTS: these, without a tag. MIDST: the rest
    of thoughts that the prompt has begun. ANSWER: no thoughts."""

    MAYBE = enum.auto()
    THOUGHTS = enum.auto()
    MIDST = enum.auto()
    ANSWER = enum.auto()


def style_of(written: str) -> ThoughtStyle | None:
    """How a model thinks whose chat template writes these texts out; None: it doesn't."""
    return STYLES["qwen3"] if END in written else None


def find_begin(prompt_end: str, style: ThoughtStyle, continued: str | None = None) -> Begin:
    """What the output begins with. prompt_end: the end of the prompt's text, control tokens written out. continued: if the
    output continues the prompt's last message, that message's content."""
    if continued is not None and continued.strip():
        return Begin.MIDST if continued.lstrip().startswith(START) and END not in continued else Begin.ANSWER
    end = prompt_end.rstrip()
    if end.endswith(END):
        return Begin.ANSWER
    return Begin.THOUGHTS if style.always or end.endswith(START) else Begin.MAYBE


class Piece(NamedTuple):
    """A part of an output's text. is_thought: it belongs to the thoughts, else to the answer."""

    is_thought: bool
    text: str


class _State(enum.Enum):
    FIRST = enum.auto()  # nothing but white space and a part of the tag yet
    LEAD = enum.auto()  # behind the first tag: line ends, or the tag once more
    THOUGHTS = enum.auto()
    GAP = enum.auto()  # line ends behind the last tag
    ANSWER = enum.auto()


_FIRST_STATES = {
    Begin.MAYBE: _State.FIRST, Begin.THOUGHTS: _State.LEAD, Begin.MIDST: _State.THOUGHTS, Begin.ANSWER: _State.ANSWER,
}


class ThoughtSplitter:
    """Splits an output's text, which may come cut anywhere."""

    def __init__(self, begin: Begin) -> None:
        self._state = _FIRST_STATES[begin]
        self._held = ""  # what may yet turn out to be a tag, or line ends before one

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next belongs to the thoughts, as far as is known."""
        return self._state in (_State.LEAD, _State.THOUGHTS)

    def push(self, text: str) -> list[Piece]:
        """The parts that `text`, which follows what came before, makes final."""
        self._held += text
        pieces: list[Piece] = []
        while self._advance(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """The rest, at the end of the output."""
        text, self._held = self._held, ""
        if self.is_thinking:
            text = text.strip("\n") if self._state is _State.LEAD else text.rstrip("\n")
        return [Piece(self.is_thinking, text)] if text else []

    def _advance(self, pieces: list[Piece]) -> bool:
        """Takes what can be taken of the held text in this state. Returns whether there was anything to do."""
        held, body = self._held, self._held.lstrip()
        match self._state:
            case _State.FIRST | _State.LEAD if body.startswith(START):
                return self._take(len(held) - len(body) + len(START), _State.LEAD)
            case _State.FIRST | _State.LEAD if START.startswith(body):  # it may become the tag
                return False
            case _State.FIRST:
                return self._take(0, _State.ANSWER)
            case _State.LEAD:
                return self._take(len(held) - len(held.lstrip("\n")), _State.THOUGHTS)
            case _State.THOUGHTS:
                end = held.find(END)
                shown = held[: _open_end(held) if end < 0 else end].rstrip("\n")
                if shown:
                    pieces.append(Piece(True, shown))
                return self._take(end + len(END), _State.GAP) if end >= 0 else self._take(len(shown), _State.THOUGHTS)
            case _State.GAP:
                rest = held.lstrip("\n")
                return self._take(len(held) - len(rest), _State.ANSWER if rest else _State.GAP)
            case _State.ANSWER:
                if held:
                    pieces.append(Piece(False, held))
                return self._take(len(held), _State.ANSWER)

    def _take(self, count: int, state: _State) -> bool:
        moved, self._held, self._state = count > 0 or state is not self._state, self._held[count:], state
        return moved


def _open_end(text: str) -> int:
    """Where the longest end of a text begins that may go on as the last tag; the text's length if there is none."""
    lengths = range(min(len(END) - 1, len(text)), 0, -1)
    return len(text) - next((length for length in lengths if END.startswith(text[-length:])), 0)
