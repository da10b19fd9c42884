"""What fewer launches should bring on an H100, by arithmetic on counted launches. Nothing here is measured on a device.

    python bench/gpu_law.py [--after 10 12 22 25 44] [--before 33 47 75 46 136] [--seconds 60] [--rate 20] [--tpot-ms 45]
        [--output bench/results/gpu_law.json]

Llama-3.1-8B in bfloat16 on one H100 by `devices/table.py`, a LoRA adapter of rank 16 with the default targets, examples of
8,192 tokens, eight per optimizer step. Launches per layer are counted on a device that computes nothing
(tests/cuda/test_launches.py): "before" by that test's first version, "after" by its present budgets, which the code keeps to.
Assumptions:

    the device    takes what the roofline of devices/law.py says, with 62% of peak FLOP/s, and 3 us more for every launch: a
                  small kernel's start and end, in which nothing else runs. The memory traffic of small kernels is not counted,
                  so that both columns are too fast, the first one more.
    the host      takes 7 us for every launch. A pass or a unit takes the longer of the device's time and of launching it.
    CUDA graphs   a pass that only decodes is one launch. Its kernels keep their 3 us.
    between       scheduling, commits and texts take 4 ms of each iteration that has requests. Before, the device waited for
                  them. Now it does so only where its units take less time than launching them and these 4 ms.
    the law       that the scheduler believes is fitted to a profile of this device, before with the terms and points of a CPU,
                  now with those of a GPU. It is corrected online, as always.

Sampling and optimizer steps are as in the law. MFU counts products of frozen weights and of the output head, forward and
backward, over the peak of 989 TFLOP/s; attention and what runs again are not counted.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gpu_model import training_operations

from coserve.bench.paper.cells import MAX_NUM_SEQS, USABLE_SHARE, make_figures
from coserve.bench.paper.models import TTFT_MS, read_shape
from coserve.bench.results import result_head
from coserve.bench.simulate import ALONE, Simulation, SimulationConfig
from coserve.bench.simulated import ITEMSIZE, SimulatedMachine, SimulatedServer, make_machine
from coserve.bench.workload import endless_job
from coserve.config.settings import EngineConfig, LoraConfig, SchedulerConfig
from coserve.core import Contents, PassCost, UnitCost
from coserve.devices.law import device_law
from coserve.devices.table import DEVICES
from coserve.machine import versions
from coserve.model.architecture import Architecture
from coserve.profiling.fit import fit, profile_points
from coserve.scheduler.latency import LatencyModel, is_uncaptured
from coserve.simulation.disturbance import EXACT

MODEL, DEVICE = "Llama-3.1-8B", DEVICES["H100"]
EXAMPLE_TOKENS, BATCH = 8192, 8
LAUNCH_S, GAP_S = 7e-6, 3e-6
"""Of every kernel: what the host takes to launch it, and what the device takes beside its work."""
HOST_S = 4e-3
"""Of every iteration with requests."""
POLICIES = ("coserve", "layer-sliced")
PROFILE_ROWS, PROFILE_SEQS = 2048, 256
"""Of the profile that the believed law is fitted to: the engine's defaults on a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLaunches:
    """Launches of one layer: of a pass that only decodes, has prompts, has a fused window; of a forward and a backward unit."""

    decode: int
    prompts: int
    fused: int
    forward: int
    backward: int

    def of_pass(self, cost: PassCost) -> int:
        prompts = self.prompts if cost.rows > cost.decode_rows + cost.fused_rows else 0
        return max(self.decode, prompts, self.fused if cost.fused_rows else 0)

    def of_unit(self, cost: UnitCost) -> int:
        return self.backward if cost.backward else self.forward


class LaunchLaw(LatencyModel):
    """What iterations take: the longer of the device's time and of launching, by part. hides_host: whether units hide the
    host's own time."""

    def __init__(self, arch: Architecture, launches: LayerLaunches, *, hides_host: bool, host_s: float = HOST_S) -> None:
        bare = replace(DEVICE, launch_s=0.0, captured_launch_s=0.0, unit_s=0.0, unit_layer_s=0.0)
        super().__init__(device_law(arch, bare, itemsize=ITEMSIZE).coefficients)
        self.layers, self.launches, self.hides_host, self.host_s = arch.num_layers, launches, hides_host, host_s

    def pass_seconds(self, cost: PassCost) -> float:
        count = self.layers * self.launches.of_pass(cost)
        device = super().pass_seconds(cost) + count * GAP_S
        return max(device, count * LAUNCH_S) if is_uncaptured(cost) else device

    def unit_seconds(self, cost: UnitCost) -> float:
        return max(super().unit_seconds(cost) + self._count(cost) * GAP_S, self._count(cost) * LAUNCH_S)

    def _count(self, cost: UnitCost) -> float:
        again = cost.recompute_fraction * self.launches.forward
        return cost.layers * (self.launches.of_unit(cost) + again)

    def seconds(self, contents: Contents) -> float:
        units = sum(map(self.unit_seconds, contents.units)) + self.optimizer_seconds(contents.optimizer_elements)
        if contents.inference is None:
            return units
        if not self.hides_host:
            units += self.host_s
        else:
            units = max(units, sum(map(self._count, contents.units)) * LAUNCH_S + self.host_s)
        return self.pass_seconds(contents.inference) + units


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchMachine(SimulatedMachine):
    """A machine whose iterations take what a LaunchLaw says."""

    truth: LaunchLaw

    def make(self, policy: str, listen: Any = lambda now: None) -> SimulatedServer:
        server = SimulatedMachine.make(self, policy, listen)
        server.engine.runner.truth.law = self.truth
        return server


def make_launch_machine(arch: Architecture, launches: LayerLaunches, *, after: bool, tpot_ms: float) -> LaunchMachine:
    """after: whether units hide the host's time, and the profile is a GPU's."""
    profiled = LaunchLaw(arch, launches, hides_host=after, host_s=0.0)
    points = profile_points(arch.num_layers, PROFILE_ROWS, gpu_seqs=PROFILE_SEQS if after else 0)
    believed = fit([(point, profiled.seconds(point)) for point in points], gpu=after)
    job = endless_job(BATCH, EXAMPLE_TOKENS).with_adapter(LoraConfig(r=16, alpha=32))
    scheduler = SchedulerConfig(tpot_ms=tpot_ms, ttft_ms=TTFT_MS, max_num_seqs=MAX_NUM_SEQS)
    plain = make_machine(
        arch, DEVICE, 1, job, EngineConfig(scheduler=scheduler), EXACT, [EXAMPLE_TOKENS] * BATCH, USABLE_SHARE,
    )
    # fields that begin with an underscore are caches
    given = {each.name: getattr(plain, each.name) for each in fields(plain) if not each.name.startswith("_")}
    return LaunchMachine(**{**given, "believed": believed}, truth=LaunchLaw(arch, launches, hides_host=after))


def bound_rows(law: LaunchLaw, backward: bool) -> int:
    """The fewest rows of a unit for which the device takes longer than launching."""
    unit = UnitCost(backward, 1, law.layers, 0, 0)
    launching = law._count(unit) * LAUNCH_S
    rows = range(1, EXAMPLE_TOKENS)
    return next((count for count in rows if law.unit_seconds(unit._replace(rows=count)) > launching), EXAMPLE_TOKENS)


def pass_figures(law: LaunchLaw) -> dict[str, float]:
    """Seconds of passes beside 64 and 256 requests."""
    found = {}
    for rows in (64, 256):
        cost = PassCost(rows, rows, rows, 350 * rows, 0, 0, 0, 0, 0)
        ridden = cost._replace(rows=rows + 256, fused_rows=256, fused_pairs=256 * 4096)
        found |= {f"decode {rows}": law.pass_seconds(cost), f"decode {rows}, 256 ride": law.pass_seconds(ridden)}
    return found


def simulate(machine: LaunchMachine, args: argparse.Namespace) -> dict[str, Any]:
    """Finetuning alone, and the policies beside requests."""
    config = SimulationConfig(
        policies=POLICIES, rates=(args.rate,), duration=args.seconds, ttft_ms=TTFT_MS, tpot_ms=args.tpot_ms,
        capacity=args.rate, alone_s=args.seconds,
    )
    simulation = Simulation(config, machine)
    alone = simulation.alone().finetune_tokens_per_s
    pairs = EXAMPLE_TOKENS * (EXAMPLE_TOKENS + 1) // 2
    operations = training_operations(machine.arch, EXAMPLE_TOKENS, pairs, EXAMPLE_TOKENS, 0)
    planned = machine.planned()
    return {
        ALONE: {"finetune_tokens_per_s": alone, "mfu": alone * operations.model / EXAMPLE_TOKENS / DEVICE.peak_flops,
                "recompute_fraction": planned.batch.recompute_fraction},
        **{policy: make_figures(simulation.beside(policy, args.rate), simulation) for policy in POLICIES},
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All figures, by 'before' and 'after'."""
    arch = read_shape(args.model)
    found: dict[str, Any] = {}
    for name, counts in (("before", args.before), ("after", args.after)):
        launches = LayerLaunches(**dict(zip((each.name for each in fields(LayerLaunches)), counts, strict=True)))
        machine = make_launch_machine(arch, launches, after=name == "after", tpot_ms=args.tpot_ms)
        found[name] = {
            "launches": counts, "launch_bound_rows": [bound_rows(machine.truth, back) for back in (False, True)],
            "seconds": pass_figures(machine.truth), **simulate(machine, args),
        }
    return found


def table(found: dict[str, Any], rate: float) -> str:
    """In Markdown."""

    def line(name: str, show: Any) -> str:
        return f"| {name} | {show(found['before'])} | {show(found['after'])} |"

    def listed(name: str) -> Any:
        return lambda side: ", ".join(map(str, side[name]))

    def trained(policy: str) -> Any:
        return lambda side: (
            f"{side[policy]['finetune_tokens_per_s']:,.0f} tokens/s, {side[policy]['slo_attainment']:.1%} in time, "
            f"{side[policy].get('fused_share') or 0:.0%} of forward rode"
        )

    return "\n".join([
        "| predicted, not measured | before | after |", "| --- | --- | --- |",
        line("launches per layer: decode, prompts, fused, forward, backward", listed("launches")),
        line("fewest rows of a unit that launching does not hold up: forward, backward", listed("launch_bound_rows")),
        *(line(f"a pass: {name}", lambda side, name=name: f"{1e3 * side['seconds'][name]:.1f} ms")
          for name in found["before"]["seconds"]),
        line("finetuning alone",
             lambda side: f"{side[ALONE]['finetune_tokens_per_s']:,.0f} tokens/s, {side[ALONE]['mfu']:.0%} MFU"),
        *(line(f"{policy} beside {rate:g} requests/s", trained(policy)) for policy in POLICIES),
    ])


def parser() -> argparse.ArgumentParser:
    counts: dict[str, Any] = {"nargs": 5, "type": int, "metavar": ("DECODE", "PROMPTS", "FUSED", "FORWARD", "BACKWARD")}
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--model", default=MODEL)
    made.add_argument("--before", default=[33, 47, 75, 46, 136], help="launches per layer", **counts)
    made.add_argument("--after", default=[10, 12, 22, 25, 44], help="launches per layer", **counts)
    made.add_argument("--seconds", type=float, default=60.0, help="simulated, of each run")
    made.add_argument("--rate", type=float, default=20.0)
    made.add_argument("--tpot-ms", type=float, default=45.0)
    made.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu_law.json")
    return made


def main() -> None:
    args = parser().parse_args()
    found = run(args)
    print(__doc__)
    print(table(found, args.rate))
    args.output.write_text(json.dumps({
        **result_head(f"{DEVICE.name} (predicted)", versions(), "python bench/gpu_law.py"),
        "experiment": "launches by arithmetic", "model": args.model,
        "launch_s": LAUNCH_S, "gap_s": GAP_S, "host_s": HOST_S, "rate": args.rate, "tpot_ms": args.tpot_ms,
        "seconds": args.seconds, "results": found,
    }, indent=1) + "\n")


if __name__ == "__main__":
    main()
