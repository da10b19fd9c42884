"""When requests arrive and how long they are.

Owns: Poisson and gamma arrivals, traces from files, rescaling to a mean rate, the burst. Does not own: prompts' content,
submitting. As in the paper, a trace is a contiguous slice of its file, stretched in time to the wanted mean rate.

Trace files: the Azure LLM inference trace (TIMESTAMP, ContextTokens, GeneratedTokens) and BurstGPT (Timestamp, Model,
Request tokens, Response tokens, Total tokens, Log Type), of which the ChatGPT rows are used, as in the paper. Rows without
a response are failures of the traced service and are left out.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from coserve.config.values import is_number, require, require_least, require_positive
from coserve.core import ConfigError, InvalidRequest, NotFound

MOST_SPREAD = 3.0
"""Of lengths. Beyond it the mean is made by requests that the limit cuts."""


class Arrival(NamedTuple):
    """One request to come. due_s: seconds from the start of the run."""

    due_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests of a trace file in the order of time. times_s: float64 [n]; the token counts: int64 [n]."""

    times_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalConfig:
    """A kind of load, without its rate."""

    kind: str = "poisson"
    """poisson, gamma:CV (CV: standard deviation of a gap over its mean) or trace:FILE."""
    prompt_tokens: int = 128
    output_tokens: int = 64
    length_scale: float | None = None
    """A trace's own lengths times this factor; None: the lengths are those above."""
    length_spread: float = 0.0
    """Standard deviation of the logarithm of lengths: they are log-normal, with those above as means. 0: all are equal."""
    max_tokens: int = 2048
    """Lengths that differ are cut so that a prompt and its output together stay within this."""

    def __post_init__(self) -> None:
        parse_kind(self.kind)
        require_least(self, 1, "prompt_tokens", "output_tokens")
        require_least(self, 2, "max_tokens")
        require_positive(self, "length_scale")
        require(is_number(self.length_spread) and 0 <= self.length_spread <= MOST_SPREAD, "length_spread",
                f"must be from 0 to {MOST_SPREAD:g}, got {self.length_spread}")
        require(not self.length_spread or self.length_scale is None, "length_spread", "a trace's own lengths have their spread")
        require(self.length_scale is None or self.kind.startswith("trace:"), "length_scale",
                "only a trace has lengths to scale")


def parse_kind(text: str) -> tuple[str, float, Path | None]:
    """(kind, coefficient of variation, trace file). Raises ConfigError."""
    kind, _, value = text.partition(":")
    if text == "poisson":
        return kind, 1.0, None
    if kind == "trace" and value:
        return kind, 0.0, Path(value)
    if kind == "gamma":
        try:
            variation = float(value)
        except ValueError:
            variation = 0.0
        if 0 < variation < np.inf:
            return kind, variation, None
    raise ConfigError(f"arrivals: must be poisson, gamma:CV (a positive number) or trace:FILE, got {text!r}", param="arrivals")


def make_arrivals(config: ArrivalConfig, rate: float, count: int, seed: int) -> list[Arrival]:
    """`count` requests whose mean rate is `rate` per second: they fill count / rate seconds exactly.

    A run of few requests would else miss its rate by 1 / sqrt(count), and policies at one load would not be comparable with
    the capacity that the load is a share of. Equal seeds give equal gaps up to the rate.
    """
    _, variation, path = parse_kind(config.kind)
    rng = np.random.default_rng(seed)
    if path is None:
        shape = 1.0 / variation**2
        times = np.cumsum(rng.gamma(shape, 1.0 / shape, count + 1))[:-1]
        end = float(times[-1] + rng.gamma(shape, 1.0 / shape))
        return _arrivals(times * (count / rate / end), *_drawn_lengths(config, count, seed))
    trace = read_trace(path)
    if len(trace.times_s) < count:
        raise InvalidRequest(f"arrivals: {path} has {len(trace.times_s)} usable requests, fewer than {count}", param="arrivals")
    start = int(rng.integers(0, len(trace.times_s) - count + 1))
    part = slice(start, start + count)
    due = rescale(trace.times_s[part], rate)
    if config.length_scale is None:
        return _arrivals(due, *_drawn_lengths(config, count, seed))
    scaled = (tokens[part] * config.length_scale for tokens in (trace.prompt_tokens, trace.output_tokens))
    return _arrivals(due, *_cut(config, *scaled))


def _arrivals(due: np.ndarray, prompts: np.ndarray, outputs: np.ndarray) -> list[Arrival]:
    return [Arrival(float(t), int(p), int(o)) for t, p, o in zip(due, prompts, outputs, strict=True)]


def poisson_arrivals(config: ArrivalConfig, rate: float, count: int, seed: int) -> list[Arrival]:
    """Arrivals at random times, whatever the kind: capacity is a Poisson rate. A trace's own lengths stay."""
    lengths = make_arrivals(config, rate, count, seed)
    times = make_arrivals(replace(config, kind="poisson", length_scale=None, length_spread=0.0), rate, count, seed)
    return [own._replace(due_s=other.due_s) for own, other in zip(lengths, times, strict=True)]


def rescale(times_s: np.ndarray, rate: float) -> np.ndarray:
    """Stretches arrival times [n], so that the mean gap becomes 1 / rate; the first arrives at half a mean gap."""
    count = len(times_s)
    if count == 1:
        return np.array([0.5 / rate])
    span = float(times_s[-1] - times_s[0])
    if span <= 0:
        raise InvalidRequest("arrivals: all requests of the slice arrive at the same time", param="arrivals")
    return (times_s - times_s[0]) * ((count - 1) / rate / span) + 0.5 / rate


def make_burst(
    base_rate: float, factor: float, before_s: float, burst_s: float, after_s: float, config: ArrivalConfig, seed: int
) -> list[Arrival]:
    """Poisson arrivals at a base rate, with `burst_s` seconds at `factor` times it, after `before_s` and before `after_s`.

    Each part holds exactly its expected number of requests (rounded) at independent times: Poisson, given that number.
    """
    rng = np.random.default_rng(seed)
    times: list[float] = []
    start = 0.0
    for rate, seconds in ((base_rate, before_s), (base_rate * factor, burst_s), (base_rate, after_s)):
        times += sorted(float(t) for t in start + seconds * rng.random(max(1, round(rate * seconds))))
        start += seconds
    return [Arrival(t, config.prompt_tokens, config.output_tokens) for t in times]


def read_trace(path: Path) -> Trace:
    """Reads an Azure or a BurstGPT file, told apart by their column names. Raises NotFound, InvalidRequest."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(_read_rows(path, reader, reader.fieldnames or ()))
    except FileNotFoundError as error:
        raise NotFound(f"arrivals: there is no trace file {path}", param="arrivals") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidRequest(f"arrivals: {path} can't be read as CSV ({error})", param="arrivals") from error
    if not rows:
        raise InvalidRequest(f"arrivals: {path} has no request with a response", param="arrivals")
    rows.sort(key=lambda row: row.due_s)
    times = np.array([row.due_s for row in rows])
    return Trace(times - times[0], np.array([r.prompt_tokens for r in rows]), np.array([r.output_tokens for r in rows]))


def _read_rows(path: Path, reader: Iterator[Mapping[str, str]], columns: object) -> Iterator[Arrival]:
    names = set(columns) if isinstance(columns, list | tuple) else set()
    azure = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= names
    if not azure and not {"Timestamp", "Request tokens", "Response tokens"} <= names:
        raise InvalidRequest(
            f"arrivals: {path} has columns {', '.join(sorted(names)) or 'none'}; wanted TIMESTAMP, ContextTokens, "
            "GeneratedTokens (Azure) or Timestamp, Model, Request tokens, Response tokens (BurstGPT)", param="arrivals",
        )
    for number, row in enumerate(reader, 2):
        try:
            if azure:
                when = _azure_seconds(row["TIMESTAMP"])
                prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            else:
                when = float(row["Timestamp"])
                prompt, output = int(row["Request tokens"]), int(row["Response tokens"])
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidRequest(f"arrivals: {path} line {number} can't be read ({error})", param="arrivals") from error
        if not azure and row.get("Model") not in (None, "ChatGPT"):
            continue
        if prompt > 0 and output > 0:
            yield Arrival(when, prompt, output)


def _azure_seconds(text: str) -> float:
    """Seconds of a time such as 2023-11-16 18:15:46.6805900; Python reads six places, the file has seven."""
    whole, _, fraction = text.strip().partition(".")
    fraction = fraction.split("+")[0].rstrip("Z")
    seconds = (datetime.fromisoformat(whole).replace(tzinfo=None) - datetime(2000, 1, 1)).total_seconds()
    return seconds + float(f"0.{fraction or 0}")


def _drawn_lengths(config: ArrivalConfig, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of prompts and outputs, int64 [count] each. Equal seeds give equal lengths, however many there are."""
    means = config.prompt_tokens, config.output_tokens
    if not config.length_spread:
        prompts, outputs = (np.full(count, mean) for mean in means)
        return prompts, outputs
    spread = config.length_spread
    prompts, outputs = (
        np.random.default_rng((seed, stream)).lognormal(np.log(mean) - spread**2 / 2, spread, count)
        for stream, mean in enumerate(means, start=1)
    )
    return _cut(config, prompts, outputs)


def _cut(config: ArrivalConfig, prompts: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths as whole numbers within the limit: outputs are cut to half of it, prompts to what is left."""
    whole = np.clip(np.rint(outputs), 1, config.max_tokens // 2).astype(np.int64)
    return np.clip(np.rint(prompts), 1, config.max_tokens - whole).astype(np.int64), whole
