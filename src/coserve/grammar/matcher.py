"""Which tokens may come next in an output that must match a grammar.

    Grammars (one per engine)  --new_matchers-->  GrammarMatcher (one per output)
        the vocabulary's table                        mask of the next token, then the token that was taken, and so on

A mask is int32 words of 32 tokens each, the lowest bit first: a token may come next if its bit is set. Masks are computed while
a pass runs, on threads of `Grammars`; llguidance gives Python's lock back meanwhile.

Owns: compiled grammars, how far each output has matched, when it is over. Does not own: sampling, grammars as texts (build.py),
what servers allow (check.py).
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from coserve.core import CoserveError, InvalidRequest
from coserve.grammar.build import check_text
from coserve.grammar.check import explained
from coserve.grammar.table import FOOTER, LIMITS, read_token_table
from coserve.text.tokenizer import ChatTokenizer

MAX_THREADS = 4
"""That compute masks. One computes those of 8 requests in well under a millisecond."""
CREDIT_S, TOKEN_S = 0.25, 0.01
"""Processor time that one output's grammar may take in all: at first, and for each token more. Most take 0.1 ms for a token.
Ambiguous grammars take ever more, which the other requests of a batch would have to wait for."""
_BITS = 32


class GrammarMatcher:
    """How far one output has matched its grammar. Only one thread at a time may call it.

    error: why it can't go on, once it can't.
    """

    def __init__(self, compiled: _Compiled, size: int) -> None:
        self._compiled = compiled  # which others can share as long as it is in use
        self._inner: Any = compiled.start.deep_copy()
        self._size = size
        self._words = np.zeros(num_words(size + 1), np.int32)
        self._ending = self._only_at_end = np.zeros(num_words(size), np.int32)
        self._spent_s, self._allowed_s = 0.0, CREDIT_S
        self.error: CoserveError | None = None

    def set_ending(self, tokens: Collection[int], asked: Collection[int] = ()) -> None:
        """The ids that end the output where it matches, whether the grammar knows them or not. asked: those of them that may
        also end it elsewhere, where they go on with the text."""
        self._ending = packed(tokens, self._size)
        self._only_at_end = self._ending & ~packed(asked, self._size)

    def mask(self, *, hold: bool = False) -> np.ndarray:
        """The tokens that may come next, int32 [words]. It is never empty: it allows everything if there is an error. hold:
        whether the output should not end yet; it may all the same where nothing else is left."""
        try:
            return self._mask(hold)
        except Exception as error:  # a bug, which must end this output only
            self.error = self.error or CoserveError(f"the grammar's matcher failed: {error!r}")
            return np.full_like(self._ending, -1)

    def _mask(self, hold: bool) -> np.ndarray:
        began = time.thread_time()
        self._inner.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        accepting = self._inner.is_accepting()
        allowed = self._words[: self._ending.size].copy()
        if self._size % _BITS:  # the last word may have the library's own end of text
            allowed[-1] &= (1 << self._size % _BITS) - 1
        self._check(time.thread_time() - began)
        if accepting:
            allowed |= self._ending
        late = self._ending if hold else self._only_at_end
        chosen = allowed & ~late if hold or not accepting else allowed
        if not chosen.any():  # nothing else is left
            chosen = allowed
        if not chosen.any():
            self._fail("no token of the model can follow, and the output may not end here")
        return chosen if self.error is None else np.full_like(chosen, -1)

    def accept(self, token: int) -> bool:
        """Goes on by a token that the mask allowed and that did not end the output. True if nothing can follow it."""
        began = time.thread_time()
        self._inner.consume_token(token)
        self._allowed_s += TOKEN_S
        self._check(time.thread_time() - began)
        return self.error is None and bool(self._inner.is_stopped())

    def _check(self, seconds: float) -> None:
        self._spent_s += seconds
        if self._inner.is_error():
            self._fail(explained(self._inner.get_error()))
        elif self._spent_s > self._allowed_s:
            self._fail(f"takes more than {TOKEN_S * 1e3:g} ms per token; make it less ambiguous")

    def _fail(self, reason: str) -> None:
        if self.error is None:
            self.error = InvalidRequest(f"grammar: {reason}", param="grammar")
            self._compiled.failed = True


class _Compiled:
    """A grammar, and a matcher that has consumed nothing."""

    def __init__(self, start: Any) -> None:
        self.start = start
        self.failed = False


class Grammars:
    """Compiles grammars for a vocabulary. size: ids that the model can sample. Thread-safe."""

    def __init__(self, tokenizer: ChatTokenizer, size: int) -> None:
        self._tokenizer, self.size = tokenizer, size
        self._lock = threading.Lock()
        self._table: Any = None
        self._compiled: weakref.WeakValueDictionary[str, _Compiled] = weakref.WeakValueDictionary()
        """By text, those that an output uses: what the library has worked out for one serves the others."""
        self._alive: weakref.WeakSet[_Compiled] = weakref.WeakSet()
        """All that an output uses, also those whose text has been compiled again since."""
        self.num_threads = min(MAX_THREADS, max(1, (os.cpu_count() or 1) // 2))
        self._threads: ThreadPoolExecutor | None = None

    def prepare(self) -> None:
        """Makes the vocabulary's table, if it isn't there yet: about 0.2 s for 50,000 tokens, half of it with Python's lock.
        Raises ImportError without llguidance."""
        with self._lock:
            if self._table is None:
                import llguidance

                wrapper = llguidance.TokenizerWrapper(read_token_table(self._tokenizer, self.size))
                self._table = llguidance.LLTokenizer(wrapper)

    def new_matchers(self, grammar: str, count: int) -> list[GrammarMatcher]:
        """Matchers for `count` outputs. Takes milliseconds for most grammars, mostly without Python's lock. Raises
        InvalidRequest if the grammar can't be used."""
        import llguidance

        check_text(grammar, "grammar")
        self.prepare()
        compiled = self._compiled.get(grammar)
        if compiled is None or compiled.failed:
            limits = llguidance.LLParserLimits(**LIMITS)
            start = llguidance.LLMatcher(self._table, grammar + FOOTER, log_level=0, limits=limits)
            if start.is_error():
                raise InvalidRequest(f"grammar: {explained(start.get_error())}", param="grammar")
            compiled = self._compiled[grammar] = _Compiled(start)
            self._alive.add(compiled)
        return [GrammarMatcher(compiled, self.size) for _ in range(count)]

    @property
    def in_use(self) -> bool:
        """Whether there may be an output with a grammar."""
        return len(self._alive) > 0

    @property
    def threads(self) -> ThreadPoolExecutor:
        """Where masks are computed. Made when it is first needed."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.num_threads, "coserve-masks")
        return self._threads

    def close(self) -> None:
        """Ends the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=False)


class Masks:
    """The masks of an iteration, which are computed on other threads from now on. matchers: by number of the request, with
    whether to hold the end."""

    def __init__(self, grammars: Grammars, matchers: Mapping[int, tuple[GrammarMatcher, bool]]) -> None:
        items = list(matchers.items())
        step = -(-len(items) // grammars.num_threads)
        parts = [items[start : start + step] for start in range(0, len(items), step)]
        self._parts = [grammars.threads.submit(_compute, part) for part in parts]
        self._place = {number: place // step for place, number in enumerate(matchers)}

    def of(self, number: int) -> np.ndarray | None:
        """A request's mask, once it is known; None for a request without a grammar."""
        place = self._place.get(number)
        return None if place is None else self._parts[place].result()[number]


def _compute(matchers: Iterable[tuple[int, tuple[GrammarMatcher, bool]]]) -> dict[int, np.ndarray]:
    return {number: matcher.mask(hold=hold) for number, (matcher, hold) in matchers}


def num_words(size: int) -> int:
    """Of a mask of so many tokens."""
    return -(-size // _BITS)


def packed(tokens: Collection[int], size: int) -> np.ndarray:
    """A mask of `size` tokens that allows the given ones; ids outside the vocabulary are left out."""
    words = np.zeros(num_words(size), np.uint32)
    inside = np.array([token for token in tokens if 0 <= token < size], np.int64)
    np.bitwise_or.at(words, inside // _BITS, (np.uint32(1) << (inside % _BITS).astype(np.uint32)))
    return words.view(np.int32)
