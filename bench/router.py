"""Many replicas behind one address, by arithmetic: how even the load is, how often adapters are where requests go.

    python bench/router.py [--replicas 100] [--adapters 10000] [--duration 30] [--ingresses 4] [--loads 0.5 0.8]
        [--output bench/results/router.json]

Requests for adapters by Zipf's law, with bursts for cold adapters, and replicas that die and come back; the real router in each
ingress, with reports that come late (src/coserve/simulation/fleet.py). Policies: the router; the same without any knowledge of
adapters and prompts; random choice. loads: shares of what the fleet can take. Then what a choice and a report cost, in the
process's own time. Prints two Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from coserve.bench.results import result_head
from coserve.machine import device_name, versions
from coserve.simulation.fleet import POLICIES, Burst, Death, FleetLayout, FleetTraffic, SimulatedFleet

REQUESTS_PER_S = 14.0
"""What one replica can take of this traffic with 64 outputs in each iteration and a third of the prompts cached."""


def traffic(args: argparse.Namespace, load: float) -> FleetTraffic:
    """Requests at a share of what the fleet can take, five bursts and five deaths."""
    duration, count = args.duration, args.replicas
    return FleetTraffic(
        rate=load * REQUESTS_PER_S * count, duration_s=duration, num_adapters=args.adapters,
        bursts=tuple(Burst(duration * (0.2 + 0.12 * number), count, f"cold-{number}") for number in range(5)),
        deaths=tuple(Death(duration * (0.25 + 0.12 * number), (number * 7) % count, duration / 5) for number in range(5)),
    )


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each load and policy."""
    rows = []
    for load in args.loads:
        for policy in POLICIES:
            layout = FleetLayout(num_replicas=args.replicas, num_ingresses=args.ingresses, policy=policy)
            result = SimulatedFleet(layout, traffic(args, load)).run(10 * args.duration)
            copies = sum(result.copies.values()) / max(1, len(result.copies))
            rows.append({"load": load, "policy": policy, **result.figures(), "copies_of_cold": copies})
            print(table_row(rows[-1]), flush=True)
    return rows


def costs(args: argparse.Namespace) -> list[dict[str, float]]:
    """Microseconds of a choice and of a report in a fleet that runs, at several sizes."""
    rows = []
    for size in sorted({10, args.replicas, 4 * args.replicas}):
        asked = FleetTraffic(rate=7.0 * size, duration_s=3.0, num_adapters=args.adapters)
        fleet = SimulatedFleet(FleetLayout(num_replicas=size, num_ingresses=1), asked)
        fleet.run(2.5)
        router, now = fleet.routers[0], fleet.now_s
        asks = [request.ask for request in fleet.requests][:1000]
        loads = [replica.report(now) for replica in fleet.replicas.values()]
        row: dict[str, float] = {"replicas": size}
        began = time.process_time()
        for ask in asks:
            router.choose(ask, now)
        row["choose_us"] = (time.process_time() - began) / len(asks) * 1e6
        began = time.process_time()
        for load in loads:
            router.report(load, now + 0.1)
        row["report_us"] = (time.process_time() - began) / len(loads) * 1e6
        rows.append(row)
        print(f"| {size} | {row['choose_us']:.0f} | {row['report_us']:.0f} |", flush=True)
    return rows


def table_row(row: dict[str, Any]) -> str:
    """One line of the first table."""
    return (
        f"| {row['load']:.0%} | {row['policy']} | {row['requests']} | {row['lost']} | {row['resent']} "
        f"| {row['hits']:.1%} of {row['most_hits']:.1%} | {row['cached']:.1%} "
        f"| +{row['most_work']:.1%} -{row['least_work']:.1%} | {row['ttft_p50_s'] * 1e3:.0f} "
        f"| {row['ttft_p99_s'] * 1e3:.0f} | {row['late']:.2%} | {row['refused']} | {row['copies_of_cold']:.1f} |"
    )


def main() -> None:
    """Measures, prints, and writes the file that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--ingresses", type=int, default=4)
    parser.add_argument("--duration", type=float, default=30.0)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    print("| load | policy | requests | lost | sent again | adapter in memory | prompt cached | work against the mean "
          "| TTFT p50, ms | p99 | over 1 s | refused | replicas with a cold burst's adapter |")
    print("| --- " * 13 + "|")
    rows = measure(args)
    print("\n| replicas | choose, us | report, us |\n| --- | --- | --- |")
    spent = costs(args)
    if args.output:
        head = result_head(device_name(torch.device("cpu")), versions(), "python bench/router.py")
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        args.output.write_text(json.dumps({**head, "settings": settings, "results": rows, "costs": spent}, indent=1) + "\n")


if __name__ == "__main__":
    main()
