"""A reader of outputs that mark reasoning and calls, as models do, for tests of what is made of its deltas."""

from __future__ import annotations

from coserve.server.inference.deltas import CallDelta, ContentDelta, Delta, ReasoningDelta

MARKS = {"<think>": "</think>", "<call>": "</call>"}


class MarkReader:
    """Reads `<think>reasoning</think>text<call>name arguments</call>`. What may be the beginning of a mark is held back, and a
    line end behind a mark is dropped."""

    def __init__(self) -> None:
        self._held, self._inside, self._num_calls = "", "", 0
        self._named = self._behind_mark = False

    def push(self, text: str) -> list[Delta]:
        self._held += text
        found: list[Delta] = []
        while True:
            if self._behind_mark and self._held:
                self._held, self._behind_mark = self._held.removeprefix("\n"), False
            wanted = [MARKS[self._inside]] if self._inside else list(MARKS)
            places = {self._held.find(mark): mark for mark in wanted if mark in self._held}
            if places:
                place = min(places)
                mark = places[place]
                found += self._deltas(self._held[:place])
                self._held, self._behind_mark = self._held[place + len(mark) :], True
                self._num_calls += mark == "</call>"
                self._inside, self._named = "" if self._inside else mark, False
                continue
            keep = max(size for size in range(len(self._held) + 1) if any(
                mark.startswith(self._held[len(self._held) - size :]) for mark in wanted
            ))
            if self._inside == "<call>" and not self._named and " " not in self._held:
                return found  # the name isn't whole
            found += self._deltas(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
            return found

    def finish(self) -> list[Delta]:
        rest, self._held = self._held, ""
        return self._deltas(rest)

    def _deltas(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._inside == "<think>":
            return [ReasoningDelta(text)]
        if not self._inside:
            return [ContentDelta(text)]
        index = self._num_calls
        if self._named:
            return [CallDelta(index, None, None, text)]
        self._named = True
        name, _, arguments = text.partition(" ")
        first = CallDelta(index, f"call_{index}", name, "")
        return [first, CallDelta(index, None, None, arguments)] if arguments else [first]
