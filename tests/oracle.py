"""transformers + peft as the oracle: full-sequence autograd, one example at a time, in float64.

Hugging Face computes RMSNorm in float32 whatever the model's dtype; for a float64 oracle that line is replaced by the same
formula without the cast. Everything else is theirs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from coserve.core import Example
from coserve.peft.format import save_adapter
from coserve.peft.lora import LoraAdapter


def load_oracle(directory: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Hugging Face's model of a directory; exact norms when float64."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = _exact_norm(module)
    return model


def _exact_norm(module: torch.nn.Module):  # noqa: ANN202 a closure
    def forward(x: Tensor) -> Tensor:
        return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))

    return forward


def with_adapter(model: PreTrainedModel, adapter: LoraAdapter) -> PeftModel:
    """The model with coserve's adapter, through PEFT's own file format; `unload()` takes it off again."""
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(Path(directory), adapter, adapter.flat, base_name="oracle", fingerprint="oracle")
        wrapped = PeftModel.from_pretrained(model, directory, is_trainable=True, autocast_adapter_dtype=False)
    return wrapped.to(model.dtype)


def label_logprobs(model: torch.nn.Module, example: Example) -> Tensor:
    """log p of every label token of one example."""
    ids = torch.from_numpy(example.token_ids)[None]
    logits = model(input_ids=ids).logits[0, :-1]
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


def dpo_loss(model: PeftModel, pairs: Sequence[tuple[Example, Example]], beta: float) -> Tensor:
    """DPO with the bare backbone as reference."""
    losses = []
    for pair in pairs:
        with torch.no_grad(), model.disable_adapter():
            reference = [(label_weights(e) * label_logprobs(model, e)).sum() for e in pair]
        policy = [(label_weights(e) * label_logprobs(model, e)).sum() for e in pair]
        margin = (policy[0] - reference[0]) - (policy[1] - reference[1])
        losses.append(-torch.nn.functional.logsigmoid(beta * margin))
    return sum(losses) / len(losses)


def gradients(model: PeftModel, adapter: LoraAdapter) -> dict[str, Tensor]:
    """{module.A or module.B: gradient} after backward."""
    parameters = dict(model.named_parameters())
    result = {}
    for site in adapter.sites:
        for part in "AB":
            gradient = parameters[f"base_model.model.{site.module}.lora_{part}.default.weight"].grad
            assert gradient is not None
            result[f"{site.module}.{part}"] = gradient
    return result


def own_gradients(adapter: LoraAdapter) -> dict[str, Tensor]:
    """The same names for coserve's gradient buffer."""
    assert adapter.grad is not None
    result = {}
    for site in adapter.sites:
        for part, gradient in zip("AB", site.factors(adapter.grad), strict=True):
            result[f"{site.module}.{part}"] = gradient
    return result


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
