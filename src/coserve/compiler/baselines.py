"""What PyTorch saves for the same training by transformers and peft: the baselines that `coserve plan` shows beside its own.

Method: transformers' model with peft's adapter runs forward on fake tensors (shapes and kernels of the CPU, no memory, no
arithmetic); every distinct storage that autograd saves is counted once, parameters and buffers left out. Two and three
layers are run; the third's part is every further layer's. Attention is PyTorch's scaled_dot_product_attention without a
mask, whose flash kernel saves q, k, v, the output and the log-sum-exp, as on CUDA.

All in peft's favour: only saved tensors count (no gradients, no workspace, no logits that the caller holds), and adapters
have the model's dtype (peft's own default for a 2-byte model is float32, which saves a float32 copy of every adapter's input).
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from coserve.config.settings import LINEAR_SITES

ATTENTION_PATH = "sdpa without a mask: PyTorch's flash kernel, which saves q, k, v, output and log-sum-exp"
METHOD = (
    "distinct storages that autograd saves in transformers + peft, parameters left out; run on fake tensors with two and three "
    "layers, the third's times the rest; adapters in the model's dtype"
)
_UNMASKED = "coserve_sdpa_unmasked"
"""Causal attention needs no mask tensor; transformers would make one for fake tensors, and not for real ones."""

CONFIGS: Mapping[str, Callable[[Any, int, Sequence[str], float], Any]] = {
    "lora": lambda peft, rank, targets, dropout: peft.LoraConfig(r=rank, target_modules=list(targets), lora_dropout=dropout),
    "dora": lambda peft, rank, targets, dropout: peft.LoraConfig(
        r=rank, target_modules=list(targets), lora_dropout=dropout, use_dora=True
    ),
    "ia3": lambda peft, rank, targets, dropout: peft.IA3Config(
        target_modules=list(targets), feedforward_modules=[name for name in targets if name == "down_proj"]
    ),
}
"""The adapter kinds that peft has: (the module peft, rank, target modules, dropout) -> its configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """total_bytes at the peak, all layers and the loss; layer_bytes: one layer's saved tensors; loss_bytes: the loss head's.
    boundary_bytes: what each layer keeps under gradient checkpointing."""

    total_bytes: int
    layer_bytes: int
    loss_bytes: int
    boundary_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Baselines:
    """peft with and without gradient checkpointing; both None where they can't be had, with the reason."""

    peft: Baseline | None
    checkpointing: Baseline | None
    reason: str | None = None
    seconds: float = 0.0


def measure(
    directory: Path, *, adapter: str, rank: int, targets: tuple[str, ...] | str, dtype: torch.dtype, sequence_length: int,
    num_tokens: int, dropout: float = 0.0,
) -> Baselines:
    """Bytes that one forward pass over `num_tokens` tokens in sequences of `sequence_length` saves for backward. dropout: of
    the adapter's input, whose masks are saved too."""
    start = time.perf_counter()
    if adapter not in CONFIGS:
        return Baselines(peft=None, checkpointing=None, reason=f"peft has no {adapter} adapter")
    sites = LINEAR_SITES if targets == "all-linear" else targets  # peft would look for names of its own
    try:
        import peft
    except ImportError:
        return Baselines(peft=None, checkpointing=None, reason="peft is not installed (pip install peft)")

    def saved(num_layers: int, *, checkpointing: bool) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations between peft and transformers
            config = CONFIGS[adapter](peft, rank, sites, dropout)
            model = _model(directory, num_layers, dtype, lambda base: peft.get_peft_model(base, config))
            found = saved_bytes(model, sequence_length, checkpointing=checkpointing)
        return found * num_tokens // sequence_length

    num_layers = int(AutoConfig.from_pretrained(directory, local_files_only=True).num_hidden_layers)
    two, three = saved(2, checkpointing=False), saved(3, checkpointing=False)
    layer = three - two
    whole = two + (num_layers - 2) * layer
    low, high = saved(2, checkpointing=True), saved(3, checkpointing=True)
    boundary = high - low
    loss = low - 2 * boundary
    return Baselines(
        peft=Baseline(total_bytes=whole, layer_bytes=layer, loss_bytes=loss),
        checkpointing=Baseline(
            total_bytes=num_layers * boundary + layer + loss, layer_bytes=layer, loss_bytes=loss, boundary_bytes=boundary
        ),
        seconds=time.perf_counter() - start,
    )


def saved_bytes(model: nn.Module, sequence_length: int, *, checkpointing: bool) -> int:
    """Bytes of distinct storages, parameters and buffers left out, that one sequence's forward pass and loss save."""
    model.train()
    if checkpointing:
        # reentrant: the kept inputs go through the hooks below, which the other kind hides from them
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
    with FakeTensorMode():
        _materialize(model)
        ids = torch.zeros((1, sequence_length), dtype=torch.int64)
        with counted_saves(model) as sizes:
            model(input_ids=ids, labels=ids)
    return sum(sizes.values())


@contextlib.contextmanager
def counted_saves(model: nn.Module) -> Iterator[dict[int, int]]:
    """{storage: bytes} of what autograd saves inside the context, `model`'s parameters and buffers left out."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in sizes:
            sizes[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def _model(directory: Path, num_layers: int, dtype: torch.dtype, adapt: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The first layers of transformers' model with an adapter, without memory, all in one dtype."""
    AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    config.num_hidden_layers, config.use_cache = num_layers, False
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_UNMASKED)
        return adapt(model).to(dtype)


def _materialize(model: nn.Module) -> None:
    """Fake tensors of the CPU in place of meta ones, so that operators choose the CPU's kernels."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                like = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(like, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
