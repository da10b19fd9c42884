"""Which tokens a job's data teaches as the end of an answer, so that serving can stop there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from coserve.core import Example, Group
from coserve.text.tokenizer import ChatTokenizer


def taught_end_tokens(groups: Sequence[Group], tokenizer: ChatTokenizer, *, max_length: int) -> tuple[int, ...]:
    """Token ids, ascending, that trained passages end with: special tokens, and other added tokens where most passages do.

    White space behind such a token may be trained too, as chat templates write it. Of a pair the chosen answer counts.
    max_length: an example of so many tokens may have been cut, so that its last token need not be an end.
    """
    markers = tokenizer.marker_ids
    found: Counter[int] = Counter()
    num_passages = 0
    for group in groups:
        for token in _ends(group.examples[0], max_length, tokenizer.is_white_space):
            found[token] += token in markers
            num_passages += 1
    return tuple(sorted(
        token for token, count in found.items() if count and (token in tokenizer.special_ids or 2 * count > num_passages)
    ))


def _ends(example: Example, max_length: int, is_white_space: Callable[[int], bool]) -> Iterator[int]:
    """Of every trained passage, the last token that is no white space."""
    edges = np.flatnonzero(np.diff(example.weights > 0, prepend=False, append=False))
    for start, end in edges.reshape(-1, 2).tolist():
        if end == example.num_tokens >= max_length:
            continue
        last = end - 1
        while last > start and is_white_space(int(example.token_ids[last])):
            last -= 1
        yield int(example.token_ids[last])
