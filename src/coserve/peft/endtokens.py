"""The tokens that end an adapter's answers beside the base's own, in generation_config.json beside its weights.

A base may name one token as its end while the chats that an adapter is trained on close a turn with another (ChatML on a base
that ends at </s>): the adapter learns to write that one, so whoever serves it has to stop there. The file has the form that
transformers gives it, and PEFT ignores it.

Does not own: which tokens training teaches (finetune/taught.py), when a request ends (engine/).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from coserve.core import InvalidRequest

ENDS_FILE = "generation_config.json"


def write_end_tokens(directory: Path, token_ids: Iterable[int]) -> None:
    """Writes the file into an adapter's directory; none where there is nothing to say."""
    ids = sorted(set(token_ids))
    if ids:
        (directory / ENDS_FILE).write_text(json.dumps({"eos_token_id": ids}, indent=2) + "\n")


def read_end_tokens(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """The token ids of an adapter's directory, ascending; () where it has no such file. Ids beyond the base's vocabulary can't
    be sampled and are left out. Raises InvalidRequest for what is neither an id nor a list of them."""
    path = directory / ENDS_FILE
    if not path.is_file():
        return ()
    try:
        value = json.loads(path.read_text())["eos_token_id"]
    except KeyError:
        return ()
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"adapter: {ENDS_FILE} can't be read as a JSON object ({error})", param="adapter") from error
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise InvalidRequest(
            f"adapter: eos_token_id in {ENDS_FILE} must be a token id or a list of them, got {str(value)[:80]}", param="adapter"
        )
    return tuple(sorted({token for token in ids if 0 <= token < vocab_size}))
