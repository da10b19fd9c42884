"""The bound of a machine: the most finetuning that any scheduler could do beside a load, on the machine as it was in a run.

Owns: what a run keeps of its machine, the bound from it, the gain. Does not own: the bound under a law (devices/bound.py). The
formula, which the page of results states too:

    law      the latency law that was fitted to the machine's profile, and with which the scheduler began. Its passes are
             multiplied by how much longer passes with requests only took in the runs at this load (the median)
    bound    finetuning alone, as measured in the same repeat x F(load) / F(no load)
    F        the most trained tokens per second under the law, with an iteration as long as the TPOT objective, and training
             rows in the pass with requests where that saves time (`fused_bound`)

A profile is measured in seconds, and a machine is faster or slower minutes later. The ratio of the two F says what share of
finetuning alone a load leaves; what finetuning alone is, is measured. So no error of the law in how long training takes enters
the bound, if it is the same with and without requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from coserve.devices.bound import JobShape, OfferedLoad, fused_bound
from coserve.scheduler.latency import Coefficient, LatencyModel

NO_LOAD = OfferedLoad(rate=0.0, prompt_tokens=0.0, output_tokens=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRecord:
    """What a run keeps of its machine.

    law: coefficients of the law with which its scheduler began. quantum_s: its preemption quantum. job: the micro-batches of
    the job, None if none ran. pass_ratio: how many times as long as the law says iterations took that held requests only (the
    median); None if there were none.
    """

    law: Mapping[Coefficient, float]
    num_layers: int
    quantum_s: float
    job: JobShape | None
    pass_ratio: float | None

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        job = None if self.job is None else asdict(self.job)
        return {
            "law": law_to_dict(self.law), "num_layers": self.num_layers, "quantum_s": self.quantum_s, "job": job,
            "pass_ratio": self.pass_ratio,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` wrote."""
        job = None if data["job"] is None else JobShape(**data["job"])
        return cls(**{**data, "law": law_from_dict(data["law"]), "job": job})

    def bound(self, load: OfferedLoad, tpot_s: float, alone: float, pass_ratio: float = 1.0) -> float:
        """The most trained tokens per second beside a load. alone: those of finetuning alone, as measured. pass_ratio: as in
        the record, but of the runs at this load. There must have been a job."""
        assert self.job is not None
        law = LatencyModel({
            name: seconds * (pass_ratio if name[0] == "inference" else 1.0) for name, seconds in self.law.items()
        })
        beside, all_of_it = (
            fused_bound(law, self.num_layers, asked, tpot_s, self.job, self.quantum_s) for asked in (load, NO_LOAD)
        )
        return alone * beside / all_of_it


def law_to_dict(coefficients: Mapping[Coefficient, float]) -> dict[str, float]:
    """A law's coefficients with names that JSON can hold, such as 'inference rows 4'."""
    return {" ".join(map(str, name)): seconds for name, seconds in sorted(coefficients.items())}


def law_from_dict(data: Mapping[str, float]) -> dict[Coefficient, float]:
    """Reads what `law_to_dict` wrote."""
    parts = ((name.split(), seconds) for name, seconds in data.items())
    return {(group, field, int(knot)): seconds for (group, field, knot), seconds in parts}


def gain(goodput: float, capacity: float, finetune_share: float) -> float:
    """Machines' worth of work done by one: requests within their objectives over the capacity, plus finetuning throughput
    over finetune-only's. Two dedicated machines, or one that takes turns at no cost, reach 1 per machine."""
    return goodput / capacity + finetune_share


def bound_keys(rate: float, capacity: float, bound: float, alone: float, reached: float | None) -> dict[str, float]:
    """The keys of a row of results about its bound. bound, alone, reached: trained tokens per second; reached: None where the
    policy trains nothing."""
    keys = {"bound_tokens_per_s": bound, "bound": rate / capacity + (bound / alone if alone > 0 else 0.0)}
    return keys if reached is None or bound <= 0 else {**keys, "bound_reached": reached / bound}
