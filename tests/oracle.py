"""transformers + peft as the oracle: full-sequence autograd, one example at a time, in float64.

Hugging Face computes RMSNorm in float32 whatever the model's dtype; for a float64 oracle that line is replaced by the same
formula without the cast. Everything else is theirs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from coserve.config.settings import BottleneckConfig
from coserve.core import Example
from coserve.peft.adapter import Adapter
from coserve.peft.format import WEIGHTS_FILE, save_adapter
from coserve.peft.tensors import tensor_name, tensor_shape


def load_oracle(
    directory: Path, dtype: torch.dtype = torch.float64, *, rounded_to: torch.dtype | None = None
) -> PreTrainedModel:
    """Hugging Face's model of a directory; exact norms when float64. rounded_to: what its weights are rounded to before."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=rounded_to or dtype, attn_implementation="sdpa").to(dtype)
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = _exact_norm(module)
    return model


def _exact_norm(module: torch.nn.Module):  # noqa: ANN202 a closure
    def forward(x: Tensor) -> Tensor:
        return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))

    return forward


class BottleneckModel(torch.nn.Module):
    """Bottleneck adapters, which PEFT doesn't have, as hooks of the modules that a file names."""

    def __init__(self, model: PreTrainedModel, file: Path, activation: str) -> None:
        super().__init__()
        self.model, self.activation = model, getattr(torch.nn.functional, activation)
        self.tensors = {name: value.requires_grad_() for name, value in load_file(file).items()}
        modules = {name.removeprefix("base_model.model.").rsplit(".adapter_", 1)[0] for name in self.tensors}
        self.hooks = [model.get_submodule(name).register_forward_hook(self._hook(name)) for name in modules]
        self.enabled = True

    def _hook(self, module: str) -> Callable[..., Tensor | None]:
        down, up = (self.tensors[f"base_model.model.{module}.adapter_{part}.weight"] for part in ("down", "up"))

        def add(_: object, __: object, out: Tensor) -> Tensor | None:
            return out + self.activation(out @ down.T) @ up.T if self.enabled else None

        return add

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.model(*inputs, **named)

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        return ((name.replace(".weight", ".default.weight"), value) for name, value in self.tensors.items())

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.enabled = False
        yield
        self.enabled = True

    def unload(self) -> None:
        for hook in self.hooks:
            hook.remove()


def with_adapter(model: PreTrainedModel, adapter: Adapter) -> PeftModel | BottleneckModel:
    """The model with coserve's adapter, through PEFT's own file format; `unload()` takes it off again."""
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(Path(directory), adapter, adapter.flat, base_name="oracle", fingerprint="oracle")
        if isinstance(adapter.config, BottleneckConfig):
            return BottleneckModel(model, Path(directory) / WEIGHTS_FILE, adapter.config.activation)
        wrapped = PeftModel.from_pretrained(model, directory, is_trainable=True, autocast_adapter_dtype=False)
    return wrapped.to(model.dtype)


def label_logprobs(model: torch.nn.Module, example: Example) -> Tensor:
    """log p of every label token of one example, from logits in float32 or wider as in transformers' own loss."""
    ids = torch.from_numpy(example.token_ids)[None]
    logits = model(input_ids=ids).logits[0, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = torch.from_numpy(example.weights[1:] != 0)
    return torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0][rows]


def label_weights(example: Example) -> Tensor:
    """The weights of those tokens."""
    weights = torch.from_numpy(example.weights[1:])
    return weights[weights != 0]


def sft_loss(model: torch.nn.Module, examples: Sequence[Example]) -> Tensor:
    """Weighted mean cross-entropy over all label tokens."""
    total = sum(float(label_weights(e).sum()) for e in examples)
    return -sum((label_weights(e) * label_logprobs(model, e)).sum() for e in examples) / total


def dpo_loss(model: PeftModel | BottleneckModel, pairs: Sequence[tuple[Example, Example]], beta: float) -> Tensor:
    """DPO with the bare backbone as reference."""
    losses = []
    for pair in pairs:
        with torch.no_grad(), model.disable_adapter():
            reference = [(label_weights(e) * label_logprobs(model, e)).sum() for e in pair]
        policy = [(label_weights(e) * label_logprobs(model, e)).sum() for e in pair]
        margin = (policy[0] - reference[0]) - (policy[1] - reference[1])
        losses.append(-torch.nn.functional.logsigmoid(beta * margin))
    return sum(losses) / len(losses)


def gradients(model: PeftModel | BottleneckModel, adapter: Adapter) -> dict[str, Tensor]:
    """{tensor's name in a file: gradient} after backward."""
    parameters = dict(model.named_parameters())
    result = {}
    for name in map(tensor_name, adapter.parameters):
        stem = name.removesuffix(".weight")
        places = (f"{stem}.default.weight", f"{stem}.default")
        gradient = next(parameters[place] for place in places if place in parameters).grad
        assert gradient is not None
        result[name] = gradient
    return result


def own_gradients(adapter: Adapter) -> dict[str, Tensor]:
    """The same names for coserve's gradient buffer."""
    assert adapter.grad is not None
    return {tensor_name(p): p.of(adapter.grad).reshape(tensor_shape(p)) for p in adapter.parameters}


def relative_error(own: Tensor, reference: Tensor) -> float:
    """||own - reference|| / ||reference||; the plain norm where the reference is 0."""
    scale = float(reference.norm())
    return float((own - reference).norm()) / (scale if scale > 1e-12 else 1.0)


def worst_error(own: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest relative error of any tensor.

    A gradient can be 0 by mathematics (q and k of a token that sees only itself): both sides then hold rounding noise. So no
    tensor's scale counts as less than 1e-4 of the largest one's, or than 1e-3: at a tolerance of 1e-9, 1e-13 of the largest
    gradient and 1e-12 in all are noise. NaN is infinitely wrong.
    """
    assert own.keys() == reference.keys()
    if any(gradient.isnan().any() for gradient in own.values()):
        return math.inf
    floor = max(1e-3, *(1e-4 * float(gradient.norm()) for gradient in reference.values()))
    return max(float((own[name] - g).norm()) / max(float(g.norm()), floor) for name, g in reference.items())
