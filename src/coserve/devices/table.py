"""Devices by name: what a roofline needs to know of an accelerator, each number with its source.

Owns: the fields of a device, the known devices and links, how a device is written as text. Does not own: the law that follows
from these numbers (law.py), their fit to a profile (refit.py).

Sources, as they are named below:

    data sheet    the vendor's public data sheet of the product
    achieved      what large copies and NCCL's all-reduce reach of the data sheet's figure: 0.78 to 0.88 of it
    assumed       chosen for this law and not measured. A profile replaces it (refit.py)
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coserve.core import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What connects the devices of one model."""

    name: str
    bandwidth: float
    """Bus bandwidth in bytes per second, as NCCL's tests count it. An all-reduce of n ranks moves 2 (n - 1) / n of its bytes at
    this speed. Source: achieved."""
    latency_s: float = 8e-6
    """Seconds that an all-reduce takes beside its bytes. Source: assumed."""


LINKS: Mapping[str, Link] = {
    link.name: link for link in (
        Link(name="nvlink3", bandwidth=235e9),  # 300 GB/s per direction by the data sheet
        Link(name="nvlink4", bandwidth=360e9),  # 450 GB/s
        Link(name="nvlink5", bandwidth=710e9),  # 900 GB/s. Assumed: the share of it that NVLink 3 and 4 reach, 0.79
        Link(name="pcie4", bandwidth=22e9),  # 16 lanes; 32 GB/s
    )
}
"""By name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """An accelerator as a roofline sees it. Raises ConfigError (param `device`) for numbers that no device can have."""

    name: str
    memory_bytes: float
    """Source: data sheet."""
    bandwidth: float
    """Bytes of memory that are read per second. Source: achieved."""
    peak_flops: float
    """Dense FLOP/s of matrix products in bfloat16, or in the dtype that the model runs in. Source: data sheet."""
    efficiency: float = 0.62
    """The share of the peak that products with weights reach. Source: assumed."""
    attention_efficiency: float = 0.7
    """The share of what products with weights reach that attention's products reach. Source: assumed."""
    overlap: float = 1.0
    """The share of the shorter of two that is hidden behind the longer: reading weights, and multiplying by them. 1 is the
    roofline's maximum of both, 0 their sum. Source: assumed."""
    iteration_s: float = 0.0
    """What every iteration costs on the host. Source: assumed; 0 is an engine whose host work is hidden by the device's."""
    launch_s: float = 1.5e-3
    """What a pass costs beside its rows: the launches of its kernels. Source: assumed."""
    captured_launch_s: float = 0.3e-3
    """The same of a pass that is replayed as a CUDA graph, as those that only decode may be. Source: assumed."""
    unit_s: float = 30e-6
    """What a unit of finetuning costs beside its layers. Source: assumed."""
    unit_layer_s: float = 40e-6
    """What each layer of a unit costs beside its rows. Source: assumed."""
    backward_rows: float = 1.05
    """Products of a backward row for one product of a forward row. Input gradients alone are as many as forward's; the rest is
    the adapter's. Source: assumed."""
    backward_pairs: float = 2.5
    """Attention's products in backward for one in forward: 5 for 2, since scores are computed again. Source: arithmetic."""
    kept_widths: float = 10.0
    """Hidden widths of values that a fused row copies in each layer, so that backward finds them. Source: assumed."""
    update_bytes: float = 30.0
    """Bytes that AdamW reads and writes per element: parameter, master, gradient and two moments. Source: assumed."""
    link: Link = LINKS["pcie4"]
    """What connects several of these devices by default."""

    def __post_init__(self) -> None:
        for name, value in _numbers(self).items():
            may_be_0 = name.endswith("_s") or name == "overlap"
            wrong = not math.isfinite(value) or value < 0 or (value == 0 and not may_be_0)
            _check(not wrong, f"{name} must be a finite number {'0 or more' if may_be_0 else 'above 0'}, got {value:g}")
        for name in SHARES:
            _check(getattr(self, name) <= 1, f"{name} is a share, at most 1, got {getattr(self, name):g}")

    @property
    def flops(self) -> float:
        """FLOP/s that products with weights reach."""
        return self.efficiency * self.peak_flops


def _numbers(device: Device) -> dict[str, float]:
    """The fields that are numbers."""
    return {name: getattr(device, name) for name in NUMBERS}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"device: {message}", param="device")


SHARES = ("efficiency", "attention_efficiency", "overlap")
"""The numbers of a device that are at most 1."""
NUMBERS = tuple(field.name for field in dataclasses.fields(Device) if field.name not in ("name", "link"))
"""The fields of a device that are numbers. `find_device` takes each of them."""

DEVICES: Mapping[str, Device] = {
    device.name: device for device in (
        # Bandwidth by the data sheets: 2.04, 3.35, 4.8, 8.0, 0.864 and 1.008 TB/s.
        Device(name="A100-80GB", memory_bytes=80e9, bandwidth=1.6e12, peak_flops=312e12, link=LINKS["nvlink3"]),
        Device(name="H100", memory_bytes=80e9, bandwidth=2.9e12, peak_flops=989e12, link=LINKS["nvlink4"]),
        Device(name="H200", memory_bytes=141e9, bandwidth=4.0e12, peak_flops=989e12, link=LINKS["nvlink4"]),
        Device(name="B200", memory_bytes=180e9, bandwidth=7.0e12, peak_flops=2250e12, link=LINKS["nvlink5"]),
        Device(name="L40S", memory_bytes=48e9, bandwidth=0.75e12, peak_flops=362e12),
        # Assumed: the share of the data sheet's bandwidth that an L40S reaches, which has the same kind of memory.
        Device(name="RTX 4090", memory_bytes=24e9, bandwidth=0.875e12, peak_flops=165e12),
    )
}
"""By name. H100, H200 and B200 are the SXM modules."""

_SPELLINGS = {"a100": "A100-80GB", "4090": "RTX 4090"}
"""Other names, without what `_plain` leaves out."""
_SHORT = {"flops": "peak_flops", "memory": "memory_bytes"}
"""Short names of fields in a device's text."""
_NEEDED = ("bandwidth", "peak_flops", "memory_bytes")
_GIVEN = "CUSTOM"


def _plain(name: str) -> str:
    """A name without case, spaces, signs, and the words that not everyone writes."""
    return re.sub(r"[\s_-]|nvidia|geforce|tesla|sxm\d?", "", name.casefold())


def find_device(text: str) -> Device:
    """The device that a text names: 'h100', 'A100-80GB', 'rtx4090'; one with other numbers: 'h100,efficiency=0.4'; or numbers
    alone: 'bandwidth=2.9e12,flops=989e12,memory=80e9,link=nvlink4'.

    Numbers are the fields of Device; `flops` and `memory` are short for peak_flops and memory_bytes. `link` is a name of LINKS,
    or a bus bandwidth in bytes per second. Raises ConfigError (param `device`) for what is unknown or wrong.
    """
    first, *rest = (part.strip() for part in text.split(","))
    changes = _read_numbers([first, *rest] if "=" in first else rest)
    if "=" not in first:
        return dataclasses.replace(_named(first), **changes)
    missing = [name for name in _NEEDED if name not in changes]
    _check(not missing, f"a device without a name needs {', '.join(missing)} too; or begin with one of {', '.join(DEVICES)}")
    return Device(**{"name": _GIVEN, **changes})


def device_text(device: Device) -> str:
    """The device as a text for `find_device`: every number that is not a Device's default, to four digits."""
    defaults = {field.name: field.default for field in dataclasses.fields(Device)}
    numbers = [f"{name}={getattr(device, name):.4g}" for name in NUMBERS if getattr(device, name) != defaults[name]]
    link = [] if device.link == defaults["link"] else [f"link={device.link.name}"]
    return ",".join([*numbers, *link])


def _named(name: str) -> Device:
    known = {_plain(key): key for key in DEVICES} | {_plain(key): key for key in _SPELLINGS.values()} | _SPELLINGS
    found = known.get(_plain(name))
    if found is None:
        near = difflib.get_close_matches(_plain(name), known, 1)
        hint = f" (did you mean {known[near[0]]}?)" if near else ""
        raise ConfigError(
            f"device: {name!r} is not known{hint}; known are {', '.join(DEVICES)}; or give numbers: "
            "bandwidth=2.9e12,flops=989e12,memory=80e9", param="device",
        )
    return DEVICES[found]


def _read_numbers(parts: list[str]) -> dict[str, Any]:
    """Fields of a device from texts 'name=value'."""
    read: dict[str, Any] = {}
    for part in parts:
        key, sign, value = (piece.strip() for piece in part.partition("="))
        name = _SHORT.get(key, key)
        _check(bool(sign) and (name == "link" or name in NUMBERS),
               f"{part!r} is not FIELD=NUMBER; the fields are {', '.join((*NUMBERS, 'link'))}")
        _check(name not in read, f"{name} is given twice")
        if name == "link" and value.casefold() in LINKS:
            read[name] = LINKS[value.casefold()]
            continue
        try:
            number = float(value)
        except ValueError:
            kinds = f"one of {', '.join(LINKS)}, or a number" if name == "link" else "a number"
            raise ConfigError(f"device: {name} must be {kinds}, got {value!r}", param="device") from None
        if name == "link":
            _check(0 < number < math.inf, f"link must be a positive number of bytes per second, got {value}")
        read[name] = Link(name=value, bandwidth=number) if name == "link" else number
    return read
