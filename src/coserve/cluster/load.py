"""What a router learns and decides: a replica's load, what a request asks for, and where it goes.

Owns: these records and the router's error. Does not own: how an engine measures its load (engine/report.py), how reports
travel, the decision (router.py). Times are in seconds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from coserve.core import CoserveError


class NoReplica(CoserveError, RuntimeError):
    """No replica is known that takes requests: they are starting, have died, or are draining."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's report, made about ten times a second.

    replica: its id; empty until the replica's process has filled it in. number: rises with each report. queued_prompt_tokens:
    tokens of prompts that are still to be computed. running, waiting: outputs. max_running, max_waiting: the most of both that
    the engine takes. end_s: seconds between two ends of outputs while some wait; 0: not known. prefill_s_per_token: what a
    prompt's token takes beside the running requests. iteration_s: an iteration that gives each running output a token.
    output_s: what one more running output adds to it. free_blocks: blocks of key-value memory that can be had, cached ones
    included, of num_blocks with block_tokens tokens each. resident: the engine's names of the adapters in memory.
    adapter_load_s: what it takes to bring another one there. prefixes: hashes of blocks in the prefix cache (see
    scheduler/prefixhash.py); None: as in the report before. headroom: the share of time that training could have had lately,
    from 0 to 1. draining: it takes no new requests.
    """

    replica: str = ""
    number: int = 0
    queued_prompt_tokens: int = 0
    running: int = 0
    waiting: int = 0
    max_running: int = 64
    max_waiting: int = 4096
    end_s: float = 0.0
    prefill_s_per_token: float
    iteration_s: float
    output_s: float = 0.0
    free_blocks: int
    num_blocks: int
    block_tokens: int
    resident: list[str] = []
    adapter_load_s: float = 0.0
    prefixes: list[int] | None = None
    headroom: float = 0.0
    draining: bool = False


class Ask(NamedTuple):
    """What the router has to know of a request.

    blocks: hashes of the prompt's full blocks, in order. adapter: the engine's name of it; None: the base model. outputs: how
    many the request wants. max_tokens: of each. ttft_s, tpot_s: objectives; math.inf is best effort.
    """

    prompt_tokens: int
    blocks: tuple[int, ...] = ()
    adapter: str | None = None
    tenant: str = ""
    outputs: int = 1
    max_tokens: int = 16
    ttft_s: float = math.inf
    tpot_s: float = math.inf


class Choice(NamedTuple):
    """Where a request goes. predicted_ttft_s: from now to its first token. feasible: whether both objectives should hold.
    resident: whether the replica has reported the adapter in memory; True without an adapter. uncached_tokens: tokens of the
    prompt that the replica has to compute."""

    replica: str
    predicted_ttft_s: float
    feasible: bool
    resident: bool
    uncached_tokens: int
