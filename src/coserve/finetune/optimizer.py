"""AdamW on one flat tensor with a float32 master copy, in slices; learning-rate schedules; clipping."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from coserve.config.settings import OptimizerConfig
from coserve.config.values import settled


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The learning rate of step `step`, counted from 0, as in Hugging Face's schedulers: warm-up starts at 0."""
    peak, warmup = settled(config.learning_rate), config.warmup_steps or math.ceil(num_steps * config.warmup_ratio)
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    if config.schedule == "linear":
        return peak * max(0.0, 1 - progress)
    if config.schedule == "cosine":
        return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return peak


class FlatAdamW:
    """Decoupled AdamW (Loshchilov and Hutter 2019) over a flat parameter.

    working: the adapter's flat tensor in the model's dtype. grad: float32, of the same length. The master is `working` itself
    if that has grad's dtype (both are float64 in tests). changed(start, end): called after elements [start, end) were updated,
    in ascending order. PyTorch's fused kernel does the arithmetic.
    """

    def __init__(
        self, config: OptimizerConfig, working: Tensor, grad: Tensor, *,
        changed: Callable[[int, int], None] = lambda start, end: None,
    ) -> None:
        self._changed = changed
        self.config, self.working, self.grad = config, working, grad
        self.master = working if working.dtype == grad.dtype else working.to(grad.dtype)
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        self.num_updates = 0

    def clip(self, norm: float | None = None) -> float:
        """Scales the gradient down to a norm of at most `max_grad_norm` (0: not at all). Returns its norm before. norm: of the
        whole gradient, if this is one rank's part of it."""
        norm = float(torch.linalg.vector_norm(self.grad)) if norm is None else norm
        if self.config.max_grad_norm > 0:
            self.grad.mul_(min(1.0, self.config.max_grad_norm / (norm + 1e-6)))
        return norm

    def update(self, start: int, end: int, rate: float) -> None:
        """Updates elements [start, end) and sets their gradient to zero."""
        part, config = slice(start, end), self.config
        # Made on the device, where the kernel reads it: a copy would block.
        updates = torch.full((), float(self.num_updates), dtype=torch.float32, device=self.master.device)
        adamw(
            [self.master[part]], [self.grad[part]], [self.exp_avg[part]], [self.exp_avg_sq[part]], [], [updates], fused=True,
            amsgrad=False, beta1=config.beta1, beta2=config.beta2, lr=rate, weight_decay=config.weight_decay, eps=config.eps,
            maximize=False,
        )
        if self.master is not self.working:
            self.working[part] = self.master[part]
        self.grad[part].zero_()
        self._changed(start, end)

    def close_step(self) -> None:
        """Ends an update. Must be called after the last `update` and before the next forward unit."""
        self.num_updates += 1

    def step(self, rate: float) -> None:
        """One whole update, slice by slice. The gradient is zero afterwards."""
        total, size = self.master.numel(), self.config.slice_elements
        for start in range(0, total, size):
            self.update(start, min(start + size, total), rate)
        self.close_step()

    def state(self) -> dict[str, Tensor]:
        """The tensors for a checkpoint, by name. `num_updates` is saved beside them."""
        return {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def load(self, state: dict[str, Tensor], num_updates: int) -> None:
        """Restores what `state` returned."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.working.copy_(self.master)
        self.num_updates = num_updates
        self._changed(0, self.working.numel())
