"""The openai client, which only the demo needs, and the server's metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coserve.bench import counters
from coserve.core import ConfigError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """url: the server's, without /v1; refusals: what the client raises for an error of the server or of the line."""

    url: str
    client: AsyncOpenAI
    refusals: type[Exception]


def require_client() -> None:
    """Raises ConfigError, saying what to install, where there is no openai client."""
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise ConfigError("the demo needs the openai client: pip install 'coserve[demo]'", param="openai") from error


def connect(url: str) -> Connection:
    """A client of the server at `url`, unmodified; nothing is tried twice, so that what fails is counted."""
    from openai import AsyncOpenAI, OpenAIError

    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0, timeout=TIMEOUT_S)
    return Connection(url=url, client=client, refusals=OpenAIError)


async def read_counters(url: str, names: Iterable[str]) -> Mapping[str, float]:
    """As bench/counters.py's, in a thread."""
    return await asyncio.to_thread(counters.read_counters, url, names)
