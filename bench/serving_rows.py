"""From measured cells of serving_cpu.py to the rows of its results.

A row pools the requests of all pairs (latencies, counts) and has medians over pairs (rates, shares). Ratios are formed inside
each pair, whose systems were measured one right after another, and their median is the row's.

First come, first served: `fcfs_ttft_s` replays when a cell's requests were sent through an engine that serves nothing but
inference and computes one prompt after another, in order of arrival, each in the time `prefill_s`; decoding costs it nothing.
`prefill_s` is the same for all systems of a pair: the least of their median times to the first token of a single prompt.
A request is above the bound if it waited longer than twice the median of its cell's replayed times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from coserve.bench.metrics import RequestRecord, summary

FCFS_FACTOR = 2.0
"""A request may wait so many times longer than it would under first come, first served."""
VLLM, COSERVE, IN_PROCESS = "vllm", "coserve", "coserve in process"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One system under one load in one pair.

    clients: of the closed loop; None: Poisson arrivals at `rate` requests per second. records: their times are seconds from
    the cell's start. prefill_s: see the module. floor_s: time in which the machine reads the weights once.
    client_cores, server_cores, other_cores: processor seconds per second of this process, of the system, and of all others on
    the machine, which an undisturbed run has none of.
    """

    system: str
    dtype: str
    pair: int
    clients: int | None
    rate: float | None
    records: tuple[RequestRecord, ...]
    prefill_s: float
    floor_s: float
    client_cores: float
    server_cores: float
    other_cores: float

    @property
    def done(self) -> list[RequestRecord]:
        """The requests that ended as asked."""
        return [record for record in self.records if record.finished]

    @property
    def seconds(self) -> float:
        """From the cell's start to its last token."""
        return max((record.token_times[-1] for record in self.done), default=0.0)

    @property
    def output_tokens_per_s(self) -> float:
        """Of the requests that ended as asked."""
        return sum(len(record.token_times) for record in self.done) / self.seconds if self.done else 0.0

    @property
    def requests_per_s(self) -> float:
        """Requests that ended as asked, per second."""
        return len(self.done) / self.seconds if self.done else 0.0

    @property
    def ttft_ms(self) -> list[float]:
        """Of the requests that ended as asked."""
        return [value for record in self.done if (value := record.ttft_ms) is not None]

    @property
    def tpot_ms(self) -> list[float]:
        """Of the requests that ended as asked."""
        return [value for record in self.done if (value := record.tpot_ms) is not None]


def fcfs_ttft_s(sent_s: Sequence[float], prefill_s: float) -> list[float]:
    """Seconds to the first token under first come, first served, in the order of `sent_s` (seconds); see the module."""
    found = [0.0] * len(sent_s)
    free_s = float("-inf")
    for index in sorted(range(len(sent_s)), key=lambda index: sent_s[index]):
        free_s = max(free_s, sent_s[index]) + prefill_s
        found[index] = free_s - sent_s[index]
    return found


def make_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row per dtype, load and system, in the order of the cells; without a system's cells, keys that compare to it are
    absent."""
    groups: dict[tuple[str, int | None, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.dtype, cell.clients, cell.system), []).append(cell)
    rows = []
    for (dtype, clients, system), mine in groups.items():
        row = _row(mine)
        others = {name: groups[key] for name in (VLLM, IN_PROCESS) if (key := (dtype, clients, name)) in groups}
        if VLLM in others and system != VLLM:
            row |= _compare("ratio_vllm", mine, others[VLLM], _output_tokens_per_s)
            row |= _compare("ttft_p99_ratio_vllm", mine, others[VLLM], _ttft_p99)
        if IN_PROCESS in others and system == COSERVE:
            row |= _compare("ratio_in_process", mine, others[IN_PROCESS], _output_tokens_per_s)
        rows.append(row)
    return rows


def cell_summary(cell: Cell) -> dict[str, Any]:
    """One cell, for who wants to see the spread."""
    return {"pair": cell.pair, **_row([cell])}


def capacity(cells: Sequence[Cell]) -> float:
    """Requests per second of the cell with the most clients: vLLM's, or without it coserve's, or the first system's."""
    most = max(cell.clients or 0 for cell in cells)
    found = {cell.system: cell.requests_per_s for cell in reversed(cells) if cell.clients == most}
    return found.get(VLLM) or found.get(COSERVE) or next(reversed(found.values()))


def describe(cell: Cell) -> str:
    """A cell for the terminal."""
    load = f"{cell.clients} clients" if cell.clients is not None else f"{cell.rate:.2f} requests/s"
    ttft, tpot = summary(cell.ttft_ms), summary(cell.tpot_ms)
    return (
        f"{cell.dtype}, {load}, {cell.system}: {cell.output_tokens_per_s:.1f} output tokens/s, TTFT p50 / p99 "
        f"{ttft['p50']:.0f} / {ttft['p99']:.0f} ms, TPOT {tpot['p50']:.1f} / {tpot['p99']:.1f} ms, "
        f"{len(cell.records) - len(cell.done)} failures, {cell.seconds:.0f} s; cores used: client {cell.client_cores:.2f}, "
        f"server {cell.server_cores:.2f}, others {cell.other_cores:.2f}"
    )


def describe_ratios(row: Mapping[str, Any]) -> str:
    """A row's ratios for the terminal; empty where it has none."""
    names = {"ratio_vllm": "output tokens/s over vLLM's", "ttft_p99_ratio_vllm": "TTFT p99 over vLLM's",
             "ratio_in_process": "output tokens/s over in process"}
    found = [f"{text} {row[name]:.2f} ({row[f'{name}_least']:.2f} to {row[f'{name}_greatest']:.2f})"
             for name, text in names.items() if name in row]
    load = f"{row['clients']} clients" if "clients" in row else f"{row['rate']:.2f} requests/s"
    return f"{row['dtype']}, {load}, {row['system']}: {', '.join(found)}" if found else ""


def _row(cells: Sequence[Cell]) -> dict[str, Any]:
    first = cells[0]
    load = {"clients": first.clients} if first.clients is not None else {"rate": first.rate}
    row: dict[str, Any] = {
        "experiment": "serving", "system": first.system, "dtype": first.dtype, **load, "pairs": len(cells),
        "output_tokens_per_s": median(cell.output_tokens_per_s for cell in cells),
        "requests_per_s": median(cell.requests_per_s for cell in cells),
        "num_requests": sum(len(cell.records) for cell in cells),
        "failures": sum(len(cell.records) - len(cell.done) for cell in cells),
    }
    for key in ("ttft_ms", "tpot_ms"):
        values = [value for cell in cells for value in getattr(cell, key)]
        if values:
            row[key] = {**summary(values), "max": max(values)}
    row["fcfs"] = _fcfs(cells)
    if first.clients == 1 and "tpot_ms" in row:
        row["floor_ms"] = median(cell.floor_s for cell in cells) * 1e3
        row["share_of_floor"] = median(cell.floor_s * 1e3 / median(cell.tpot_ms) for cell in cells if cell.tpot_ms)
    row["cores_used"] = {
        "client": median(cell.client_cores for cell in cells), "server": median(cell.server_cores for cell in cells),
        "others": median(cell.other_cores for cell in cells),
    }
    return row


def _fcfs(cells: Sequence[Cell]) -> dict[str, float]:
    """What first come, first served gives, and how many requests waited longer than it allows.

    num_above: above twice the median of the cell's replayed times; num_above_own: above twice the greater of that median and
    the request's own replayed time, which in a closed loop spares those that all clients send at once at the start.
    """
    medians, above, above_own = [], 0, 0
    for cell in cells:
        replayed = [seconds * 1e3 for seconds in fcfs_ttft_s([record.due_s for record in cell.records], cell.prefill_s)]
        middle = median(replayed)
        medians.append(middle)
        for record, own in zip(cell.records, replayed, strict=True):
            ttft = record.ttft_ms
            above += ttft is None or ttft > FCFS_FACTOR * middle
            above_own += ttft is None or ttft > FCFS_FACTOR * max(own, middle)
    return {
        "prefill_ms": median(cell.prefill_s for cell in cells) * 1e3, "ttft_p50_ms": median(medians),
        "bound_ms": FCFS_FACTOR * median(medians), "num_above": above, "num_above_own": above_own,
    }


def _output_tokens_per_s(cell: Cell) -> float:
    return cell.output_tokens_per_s


def _ttft_p99(cell: Cell) -> float:
    return summary(cell.ttft_ms)["p99"]


def _compare(name: str, mine: Sequence[Cell], others: Sequence[Cell], value: Callable[[Cell], float]) -> dict[str, float]:
    """The median of the ratios inside each pair, and the least and the greatest of them. A pair in which no request of either
    system ended as asked has no ratio, and where no pair has one there is nothing."""
    by_pair = {cell.pair: value(cell) for cell in others if cell.done}
    ratios = [value(cell) / by_pair[cell.pair] for cell in mine if cell.done and cell.pair in by_pair]
    if not ratios:
        return {}
    return {name: median(ratios), f"{name}_least": min(ratios), f"{name}_greatest": max(ratios)}
