"""The tokens with which a job's data ends its answers, so that serving can stop at them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from coserve.core import Example, Group
from coserve.text.tokenizer import ChatTokenizer


def taught_end_tokens(groups: Sequence[Group], tokenizer: ChatTokenizer, *, max_length: int) -> tuple[int, ...]:
    """Ascending ids of tokens that end trained passages: special tokens, and added tokens that end more than half of them.

    White space after such a token is ignored, since chat templates write some. Of a pair, only the chosen answer counts.
    max_length: a passage that ends an example of this length is ignored, since the example may have been cut.
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
    """The last token of every trained passage that is not white space."""
    edges = np.flatnonzero(np.diff(example.weights > 0, prepend=False, append=False))
    for start, end in edges.reshape(-1, 2).tolist():
        if end == example.num_tokens >= max_length:
            continue
        last = end - 1
        while last > start and is_white_space(int(example.token_ids[last])):
            last -= 1
        yield int(example.token_ids[last])
