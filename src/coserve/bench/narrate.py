"""What `coserve bench sharing` says it does: what is to come, and at each step what it measures and how long it may take."""

from __future__ import annotations

from coserve.bench.sharing import SPATIAL, SharingConfig

PEER_S = 60
"""Seconds to load transformers' model and generate seven times with it: SmolLM2 on two cores. Larger models take longer."""
PROBES = (4, 8)
"""Runs that the search for capacity usually takes."""


def introduction(config: SharingConfig, num_cells: int) -> list[str]:
    """The steps, each with its usual time where it can be told beforehand."""
    steps = []
    if config.tpot_ms is None:
        steps.append(
            f"transformers.generate at batch 8, which sets the objective per token (about {PEER_S} s for a small model)")
    if config.capacity is None:
        steps.append(f"the requests per second that this machine holds without training ({PROBES[0]} to {PROBES[1]} runs of "
                     f"{config.capacity_requests} requests, a minute or so each)")
    names = ", ".join(policy for policy in config.policies if policy != "finetune-only")
    loads = ", ".join(f"{load:.0%}" for load in config.loads)
    burst = ", and a burst under each" if config.burst is not None else ""
    steps.append(f"{num_cells} runs beside a job that trains: finetuning alone ({config.alone_s:.0f} s), then {names} with "
                 f"{config.requests} requests at {loads} of that rate{burst}")
    lines = [f"{number}. {step}" for number, step in enumerate(steps, start=1)]
    return ["measures, one after the other:", *lines, "each finished run is kept: after Ctrl-C the same command goes on"]


def describe(label: str, stored: bool, expected_s: float | None) -> str:
    """A run in words. label: as in the CellStore. stored: whether its result is there already. expected_s: seconds during which
    its requests come."""
    kind, _, rest = label.partition("-")
    if kind == "peer":
        what = "transformers.generate at batch 8, for the objective per token"
    elif kind == "capacity":
        what = f"whether this machine holds {rest} requests/s without training"
    elif label.startswith("finetune-only"):
        what = "finetuning alone"
    elif kind == "burst":
        what = f"a burst of requests under {rest}"
    else:
        policy, load, repeat = label.rsplit("-", 2)
        processes = " (serving and training in processes of their own)" if policy == SPATIAL else ""
        what = f"{policy}{processes} at {float(load):.0%} of capacity, repeat {int(repeat) + 1}"
    if stored:
        return f"{label}: {what} (kept from before)"
    seconds = PEER_S if kind == "peer" else expected_s
    return f"{label}: {what}" + (f", about {seconds:.0f} s" if seconds else "")
