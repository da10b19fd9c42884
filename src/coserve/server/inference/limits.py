"""How much a request of the inference routes may ask for. These counts bound its cost and are checked before any work.

Owns: the numbers that aren't a field's own range (protocol.py), what is said about them. Does not own: the size of a body
(middleware.py), how many values it has (bodies/parse.py), whether there is room for it now (places.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coserve.config.settings import SamplingConfig
from coserve.core import InvalidRequest

MAX_MESSAGES = 4096
"""Of a conversation; the parts of a message count as messages do."""
MAX_STOP_CHARACTERS = 1024
"""Of one stop text."""
MAX_ENTRIES = 1024
"""Of stop_token_ids and of logit_bias."""
MAX_LOGPROBS = 1 << 18
"""Log-probabilities of one response, alternatives included: about 25 MB of JSON."""
COUNTED_TOKENS = 1 << 16
"""Texts and ids that are longer than the context are (de)tokenized too, up to so many tokens."""


def check_amounts(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Checks a body that hasn't been validated, and gives it back. Values of a wrong type pass here, and pydantic refuses them.
    Raises InvalidRequest."""
    messages = body.get("messages")
    if isinstance(messages, list):
        parts = [item["content"] for item in messages if isinstance(item, dict) and isinstance(item.get("content"), list)]
        _check("messages", len(messages) + sum(map(len, parts)), MAX_MESSAGES, "messages and parts of messages")
    stop = body.get("stop")
    for text in stop if isinstance(stop, list) else [stop]:
        if isinstance(text, str):
            _check("stop", len(text), MAX_STOP_CHARACTERS, "characters of a text")
    for name in ("stop_token_ids", "logit_bias"):
        value = body.get(name)
        if isinstance(value, list | dict):
            _check(name, len(value), MAX_ENTRIES, "entries")
    return body


def check_logprobs(prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingConfig], field: str) -> None:
    """The log-probabilities that the response to these prompts may have. field: the request's for those of the output. Raises
    InvalidRequest."""
    of_prompts = of_outputs = 0
    for ids, asked in zip(prompts, sampling, strict=True):
        if asked.prompt_logprobs is not None:
            of_prompts += asked.n * len(ids) * (asked.prompt_logprobs + 1)
        if asked.logprobs is not None:
            of_outputs += asked.n * asked.max_tokens * (asked.logprobs + 1)
    if of_prompts + of_outputs > MAX_LOGPROBS:
        param = "prompt_logprobs" if of_prompts > of_outputs else field
        raise InvalidRequest(
            f"{param}: the response would have up to {of_prompts + of_outputs} log-probabilities with alternatives; at most "
            f"{MAX_LOGPROBS} are given. Ask for fewer alternatives, prompts, outputs (n) or tokens (max_tokens)", param=param,
        )


def _check(field: str, count: int, most: int, what: str) -> None:
    if count > most:
        raise InvalidRequest(f"{field}: {count} {what}, at most {most} are taken", param=field)
