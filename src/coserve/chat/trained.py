"""Which characters of a rendered conversation are trained: those that a model has to produce after the prompt of each turn.

    prompt of turn 1    <s>user\\nHi<e>\\n<s>assistant\\n
    through turn 1      <s>user\\nHi<e>\\n<s>assistant\\nHello<e>\\n
    prompt of turn 3    <s>user\\nHi<e>\\n<s>assistant\\nHello<e>\\n<s>user\\nBye<e>\\n<s>assistant\\n
                                                     |-------|       up to the end-of-turn token, not the white space after it

Every prompt is rendered as a request's is. The text through a turn must begin with its prompt. Turns are trained in one text as
long as each one's text begins the next one's prompt. A template that writes a turn differently once the conversation goes on
(Qwen3's, which takes thoughts out of earlier answers) gives several texts, each of which ends with a trained turn.

Where the prompt opens a thought that the template doesn't write again (DeepSeek-R1's ends with `<think>`), the answer begins
with the turn's thought and the end of it.

Owns: these texts and ranges. Does not own: rendering (template.py), marks of control tokens (control.py), tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from coserve.chat.reasoning import END, START
from coserve.chat.template import PROBE, Message
from coserve.core import InvalidRequest

_OPEN_THOUGHT = re.compile(rf"{START}\s*\Z")
_QUESTION = ({"role": "user", "content": PROBE},)


class Render(Protocol):
    """Writes messages as text. Raises InvalidRequest."""

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str: ...


class TrainedText(NamedTuple):
    """A conversation or its beginning as text. spans: the characters [start, end) that are trained. turns: whose they are, as
    positions among the messages."""

    text: str
    spans: list[tuple[int, int]]
    turns: list[int]


class UndefinedTurn(InvalidRequest):
    """A template doesn't start a turn as it starts a reply."""


class _Through(NamedTuple):
    """The conversation through the turn at position `turn`, trained from `start` to `end`. whole: as the template writes it,
    with what it may add at the end of a conversation."""

    turn: int
    text: str
    whole: str
    start: int
    end: int

    @property
    def kept(self) -> str:
        """What the text of a later turn must begin with."""
        return self.text[: self.end]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedTurns:
    """Finds what is trained. render: the template. farewell: what it writes behind a conversation but not behind each turn.
    end_tokens: the texts of tokens that may end a turn. unmark: takes marks out of a text that a user sees (see control.py)."""

    render: Render
    farewell: str
    end_tokens: Collection[str]
    unmark: Callable[[str], str]

    def texts(self, messages: Sequence[Message]) -> list[TrainedText]:
        """One text, or several where the template writes turns differently later on. Each trained turn is trained in one.

        Raises UndefinedTurn, naming the turn, if what to train on is undefined; InvalidRequest if the template refuses.
        """
        groups: list[list[_Through]] = []
        for position in trained_turns(messages):
            prompt = self._prompt(messages, position)
            if not groups or not prompt.startswith(groups[-1][-1].kept):
                groups.append([])
            groups[-1].append(self._through(messages, position, prompt))
        if not groups:
            return [TrainedText(self.render(messages, add_generation_prompt=False), [], [])]
        return [self._text(messages, group, group is groups[-1]) for group in groups]

    def _text(self, messages: Sequence[Message], group: Sequence[_Through], last: bool) -> TrainedText:
        """The text that trains a group of turns. The last one holds the whole conversation, if that keeps the turns' form."""
        final = group[-1]
        text = final.whole if final.whole.startswith(final.kept) else final.text
        if last and final.turn < len(messages) - 1:
            everything = self.render(messages, add_generation_prompt=False)
            text = everything if everything.startswith(final.kept) else text
        return TrainedText(text, [(item.start, item.end) for item in group], [item.turn for item in group])

    def _through(self, messages: Sequence[Message], position: int, prompt: str) -> _Through:
        whole = self.render(messages[: position + 1], add_generation_prompt=False)
        text = self._behind(prompt, whole.removesuffix(self.farewell), messages[position])
        if text is None:
            raise UndefinedTurn(
                f"messages[{position}]: the model's chat template does not start this turn as it starts a reply "
                f"({self.unmark(prompt)[-40:]!r}), so what to train on is undefined; give prompt and completion as strings",
                param="messages",
            )
        closed = text.rstrip()
        ends = len(closed) > len(prompt) and closed.endswith(tuple(self.end_tokens))
        return _Through(position, text, whole, len(prompt), len(closed) if ends else len(text))

    def _prompt(self, messages: Sequence[Message], position: int) -> str:
        """What a request for the turn renders."""
        if position:
            return self.render(messages[:position], add_generation_prompt=True)
        # Templates can't render an empty conversation: look for the start of a reply, or else where a content goes.
        asked, started = (self.render(_QUESTION, add_generation_prompt=start) for start in (False, True))
        asked = asked.removesuffix(self.farewell)
        if started.startswith(asked) and started != asked:
            reply = started[len(asked) :]
            header = _OPEN_THOUGHT.sub("", reply)
            before, found, _ = self.render(messages[:1], add_generation_prompt=False).partition(header)
            if header and found:
                return before + reply
        probe = self.render([{"role": "assistant", "content": PROBE}], add_generation_prompt=False)
        return probe.partition(PROBE)[0]

    @staticmethod
    def _behind(prompt: str, text: str, message: Message) -> str | None:
        """The text through a turn, beginning with its prompt; None if the template's text through it doesn't fit the prompt."""
        if text.startswith(prompt):
            return text if text != prompt else None
        opened = _OPEN_THOUGHT.search(prompt)
        if opened is None or not text.startswith(prompt[: opened.start()]):
            return None
        reply = text[opened.start() :]
        if reply.lstrip().startswith(START):  # with other white space around the tag than the prompt's
            return prompt + reply.lstrip().removeprefix(START).lstrip("\n")
        return f"{prompt}{thought_of(message)}\n{END}\n\n{reply.lstrip(chr(10))}"


def trained_turns(messages: Sequence[Message]) -> list[int]:
    """Positions of the assistant's turns that aren't of weight 0."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1)]


def thought_of(message: Mapping[str, Any]) -> str:
    """What an assistant thought before its answer: `reasoning_content`, or what its content has before `</think>`."""
    thought = message.get("reasoning_content")
    if not isinstance(thought, str):
        before, found, _ = message["content"].partition(END)
        thought = before.rpartition(START)[2] if found else ""
    return thought.strip("\n")


def check_calls(trained: TrainedText, messages: Sequence[Message]) -> None:
    """Raises InvalidRequest, naming the turn, if a trained turn has a call of a tool that the template doesn't write."""
    for turn, (start, end) in zip(trained.turns, trained.spans, strict=True):
        for call in messages[turn].get("tool_calls", ()):
            if trained.text.find(call["function"]["name"], start, end) < 0:
                raise InvalidRequest(
                    f"messages[{turn}].tool_calls: the model's chat template does not write calls of tools; write them as "
                    "content, or leave the example out", param="messages",
                )


def loses_thought(trained: TrainedText, messages: Sequence[Message]) -> bool:
    """Whether a trained turn has `reasoning_content` that the template doesn't write."""
    return any(
        (messages[turn].get("reasoning_content") or "").strip() not in trained.text[start:end]
        for turn, (start, end) in zip(trained.turns, trained.spans, strict=True)
    )


def lacks_thought(trained: TrainedText) -> bool:
    """Whether a trained turn ends at once the thought that its prompt opens."""
    return any(trained.text[start:end].lstrip().startswith(END) for start, end in trained.spans)


def texts_in(value: Any) -> Iterator[str]:
    """Every text in messages, tools and the like, their keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield name
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)
