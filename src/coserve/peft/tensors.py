"""Parameters as files hold them: PEFT's names and shapes for LoRA, DoRA and IA3, the like for bottlenecks."""

from __future__ import annotations

from torch import Tensor

from coserve.hostcopy import to_host
from coserve.peft.adapter import Adapter, Parameter

CONFIG_FILE, WEIGHTS_FILE, ORIGIN_FILE = "adapter_config.json", "adapter_model.safetensors", "coserve.json"
"""The files of an adapter's directory; ORIGIN_FILE is ours, and says which base the adapter was trained on."""
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, ORIGIN_FILE)
BOTTLENECK = "COSERVE_BOTTLENECK"
"""peft_type of bottleneck adapters, which PEFT doesn't have."""
PREFIX = "base_model.model."
SUFFIXES = {
    "lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "dora": "lora_magnitude_vector",
    "ia3_in": "ia3_l", "ia3_out": "ia3_l",
    "relu_down": "adapter_down.weight", "relu_up": "adapter_up.weight",
    "gelu_down": "adapter_down.weight", "gelu_up": "adapter_up.weight",
}
"""{part of a parameter's name: what follows the module's name in a file}."""


def tensor_name(p: Parameter) -> str:
    """The parameter's name in a file."""
    return f"{PREFIX}{p.module}.{SUFFIXES[p.part]}"


def tensor_shape(p: Parameter) -> tuple[int, ...]:
    """Its shape there: lengths [out]; IA3's factors [out, 1], or [1, in] of an input."""
    return {"dora": p.shape[:1], "ia3_in": p.shape[::-1]}.get(p.part, p.shape)


def to_file(adapter: Adapter, flat: Tensor) -> dict[str, Tensor]:
    """All parameters' values in `flat` by their names in a file, on the host, as a file holds them."""
    origins = {tensor_name(p): adapter.origin(p) for p in adapter.parameters}
    found = to_host({"": flat, **{name: origin for name, origin in origins.items() if origin is not None}})
    tensors = {}
    for p in adapter.parameters:
        name, value = tensor_name(p), p.of(found[""])
        if name in found:
            value = (value + found[name]).to(value.dtype)
        tensors[name] = value.reshape(tensor_shape(p)).contiguous()
    return tensors


def from_file(adapter: Adapter, p: Parameter, value: Tensor) -> None:
    """Writes a file's value into the adapter."""
    value, origin = value.reshape(p.shape), adapter.origin(p)
    if origin is not None:
        value = value.to(origin.device, origin.dtype) - origin
    p.of(adapter.flat).copy_(value)
