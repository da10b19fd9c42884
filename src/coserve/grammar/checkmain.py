"""The process in which grammars are tried: python checkmain.py, started by check.py. It imports nothing of coserve.

    check.py --a socket per grammar--> this process --fork--> a child per grammar: reads it, tries it, answers, ends

Compiling takes seconds and gigabytes for some small schemas, and overflows the stack for some grammars. Here that ends one
child, which has little time, memory and stack, and low priority. A child that ends without an answer says that the grammar is
too much.

Owns: the trial. Does not own: who asks, what is said to the user (check.py).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import socket
import threading
from types import SimpleNamespace
from typing import Any

import llguidance

_NICE = 10
_CHUNK = 1 << 16
_STEPS = 16
"""Tokens that are taken: some limits of the library apply to the text's course only."""


def read_all(source: socket.socket, size: int) -> bytes:
    """Exactly so many bytes. Raises EOFError."""
    data = bytearray()
    while len(data) < size:
        part = source.recv(min(_CHUNK, size - len(data)))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def virtual_bytes() -> int:
    """This process's address space. Raises OSError where the system doesn't tell."""
    with open("/proc/self/statm", encoding="ascii") as pages:
        return int(pages.read().split()[0]) * resource.getpagesize()


def first_error(tokenizer: llguidance.LLTokenizer, grammar: str, limits: dict[str, Any]) -> str:
    """What is wrong with a grammar, in the library's words; nothing if it can be compiled and some tokens can be taken."""
    start = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**limits))
    known = (1 << tokenizer.vocab_size - 1) - 1  # without the library's own end of text
    first = start.deep_copy()
    if not int.from_bytes(first.compute_bitmask(), "little") & known:
        return str(first.get_error()) or "no token of the model can begin a text that it allows"
    for takes_last in (False, True):
        matcher = start.deep_copy()
        for _ in range(_STEPS):
            allowed = 0 if matcher.is_stopped() else int.from_bytes(matcher.compute_bitmask(), "little") & known
            if not allowed or not matcher.consume_token((allowed if takes_last else allowed & -allowed).bit_length() - 1):
                break
        if matcher.is_error():
            return str(matcher.get_error())
    return ""


def answer(asker: socket.socket, tokenizer: llguidance.LLTokenizer, settings: dict[str, Any]) -> None:
    """Tries one grammar, in a child."""
    size = int.from_bytes(read_all(asker, 8), "little")
    grammar = read_all(asker, size).decode()
    asker.sendall(b"?")
    with contextlib.suppress(OSError):  # no /proc, and so no limit
        memory = virtual_bytes() + settings["memory_bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, settings["cpu_s"])  # then the signal ends this process
    threading.stack_size(settings["stack_bytes"])
    found: list[str] = []
    trial = threading.Thread(target=lambda: found.append(first_error(tokenizer, grammar, settings["limits"])))
    trial.start()
    trial.join()
    asker.sendall(b"!" + found[0].encode())


def main() -> None:
    """Answers until the other end of standard input is closed."""
    control = socket.socket(fileno=0)
    settings = pickle.loads(read_all(control, int.from_bytes(read_all(control, 8), "little")))
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(SimpleNamespace(**settings["table"])))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for children
    os.nice(_NICE)
    while True:
        message, sockets, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        with socket.socket(fileno=sockets[0]) as asker:
            if os.fork() == 0:
                code = 1
                try:
                    answer(asker, tokenizer, settings)
                    code = 0
                finally:
                    os._exit(code)


if __name__ == "__main__":
    main()
