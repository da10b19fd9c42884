"""Whether a grammar can be used: asked by a server before a request goes to the engine.

Every grammar is tried in a child of a process of its own (checkmain.py), so that one which takes too long, too much memory or
too much stack is refused and harms nobody. What was found is remembered.

Owns: that process, what is said about a wrong grammar. Does not own: the trial.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pickle
import re
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from coserve.core import CoserveError, InvalidRequest
from coserve.grammar.build import check_text
from coserve.grammar.table import FOOTER, LIMITS, TokenTable

CPU_S = 2.0
"""Of processor time, for one grammar. A schema of 100 kB takes about a tenth of it."""
MEMORY_BYTES = 512 << 20
"""Beyond what the process has before."""
STACK_BYTES = 2 << 20
"""A quarter of what threads usually have, so that a grammar that passes can be compiled elsewhere."""
_WAIT_S = 60.0
"""For an answer, on a machine that is busy."""
_REMEMBERED = 4096
_MAX_MESSAGE = 500
BEGUN, ENDED = b"?", "!"
"""A child's reply: that it begins, and before what it has found (checkmain.py)."""
_EXCERPT = re.compile(r"\s*(\d+ \|.*|\^+|<non-verbose/>)")
_PLACE = re.compile(r"(?:at )?(\d+)\(\d+\): ")
_OF_SCHEMA = "failed to compile JSON schema: "
_LENIENT = 'leave it out, or have it ignored by "x-guidance": {{"lenient": true}} in the schema'
_IN_WORDS = (
    (re.compile(r"Unimplemented keys: \[(.*?)\]"), f"the schema's {{}} can't be enforced; {_LENIENT}"),
    (re.compile(r"Unknown format: (.*)"), f"the schema's format {{}} can't be enforced; {_LENIENT}"),
    (re.compile(r"Enable 'coerce_one_of' option"),
     'the schema\'s oneOf can\'t be enforced; use anyOf, or have it read as anyOf by "x-guidance": {{"coerce_one_of": true}}'),
    (re.compile(r"Current row has \d+ items"),
     "too many texts are possible at one place; have fewer optional properties or alternatives"),
    (re.compile(r"too many (?:states|expressions)|precomputation failed|limit for this grammar"),
     "its patterns are too large together; simplify them"),
    (re.compile(r"^NoExtensionBias$"), "no text can match it to its end"),
    (re.compile(r"(unknown special token: .*?);"), "{}"),
)
"""Errors of the library that say too little, or speak of its own options."""


class GrammarChecker:
    """Tries grammars for one tokenizer. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._found: OrderedDict[bytes, str | None] = OrderedDict()

    def prepare(self, read_table: Callable[[], TokenTable]) -> None:
        """Starts the process ahead of the first grammar. It then takes about a second of processor time, on its own."""
        with self._lock:
            if self._control is None:
                self._start(read_table())

    def check(self, grammar: str, read_table: Callable[[], TokenTable], *, field: str = "grammar") -> None:
        """Takes some 10 ms for most grammars, and about a second for the first one if nothing was prepared. read_table: is
        called when the process is started. field: is named in errors. Raises InvalidRequest if the grammar can't be used."""
        check_text(grammar, field)
        key = hashlib.sha256(grammar.encode()).digest()
        with self._lock:
            known = key in self._found
            found = self._found.get(key)
        if not known:
            found = self._try(grammar, read_table)
            with self._lock:
                self._found[key] = found
                while len(self._found) > _REMEMBERED:
                    self._found.popitem(last=False)
        if found is not None:
            raise InvalidRequest(f"{field}: {found}", param=field)

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._end()

    def _try(self, grammar: str, read_table: Callable[[], TokenTable]) -> str | None:
        """What is wrong with a grammar. Raises CoserveError if it can't be tried."""
        for _ in range(2):
            reply, process = self._ask((grammar + FOOTER).encode(), read_table)
            if reply == BEGUN:
                return f"it takes more than {CPU_S:g} s or {MEMORY_BYTES >> 20} MB to compile; simplify it"
            if reply:
                return explained(reply.removeprefix(BEGUN).decode().removeprefix(ENDED)) or None
            with self._lock:
                if self._process is process:  # it has ended by itself
                    self._end()
        raise CoserveError("the process that tries grammars ends as soon as it is started; the log says why")

    def _ask(self, data: bytes, read_table: Callable[[], TokenTable]) -> tuple[bytes, subprocess.Popen[bytes] | None]:
        """A child's reply, as far as it came, and the process that was asked, which is started if need be."""
        ours, theirs = socket.socketpair()
        ours.settimeout(_WAIT_S)
        reply, process = b"", self._process
        with ours, contextlib.suppress(OSError):  # the process or its child has ended, or hangs
            with theirs, self._lock:
                if self._control is None:
                    self._start(read_table())
                assert self._control is not None
                process = self._process
                socket.send_fds(self._control, [b"?"], [theirs.fileno()])
            ours.sendall(len(data).to_bytes(8, "little") + data)
            while part := ours.recv(1 << 16):
                reply += part
        return reply, process

    def _start(self, table: TokenTable) -> None:
        settings = pickle.dumps({
            "table": dataclasses.asdict(table), "limits": dict(LIMITS), "cpu_s": CPU_S,
            "memory_bytes": MEMORY_BYTES, "stack_bytes": STACK_BYTES,
        })
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("checkmain.py"))], stdin=theirs.fileno(),
                start_new_session=True,  # Ctrl-C is for the server, which then ends it
            )
        with contextlib.suppress(OSError):  # noticed at the next message
            self._control.sendall(len(settings).to_bytes(8, "little") + settings)

    def _end(self) -> None:
        control, process, self._control, self._process = self._control, self._process, None, None
        if control is not None and process is not None:
            control.close()
            try:
                process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def explained(error: str) -> str:
    """The library's words about a grammar as a part of a sentence for its author, without the excerpt of the grammar."""
    lines = [line for line in error.strip().splitlines() if line.strip() and not _EXCERPT.fullmatch(line)]
    text = " ".join(line.strip() for line in lines)
    place = _PLACE.match(text)
    text = text[place.end() :] if place else text
    if text.startswith(_OF_SCHEMA):  # the whole schema is one line of the grammar
        text, place = text.removeprefix(_OF_SCHEMA), None
    for pattern, words in _IN_WORDS:
        found = pattern.search(text)
        if found is not None:
            text = words.format(*(group.replace('"', "") for group in found.groups()))
    return (text if place is None else f"line {place[1]}: {text}")[:_MAX_MESSAGE]
