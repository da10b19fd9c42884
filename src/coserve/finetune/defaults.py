"""What 'auto' means: a job's numbers that are chosen from its data, adapter and model. Command, API and Python share the rules.

    resolve_settings(config, number of examples, the continued adapter's settings, the model's width) -> config without 'auto'

Owns: the rules, and the messages about them. Does not own: fixed defaults (config/settings.py). A resumed job keeps the numbers
with which it began, even if the rules have changed since (`keep_numbers`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from coserve.config.data import KNOBS, to_dict
from coserve.config.settings import LINEAR_SITES, PAIRED, AdapterConfig, BottleneckConfig, FinetuneConfig, LoraConfig, Objective
from coserve.config.values import AUTO, is_number, settled
from coserve.finetune.batches import BatchOrder

EPOCHS, MAX_EPOCHS = 3, 25
SEEN = 100
"""The fewest examples that a job trains on, counting repeats. Small files get more epochs for it, up to MAX_EPOCHS."""
MOST_SEEN = 25_000
"""The most examples that a job trains on, counting repeats. Large files get fewer epochs for it, down to 1."""
MAX_BATCH_SIZE = 16
BATCHES = 16
"""Batches per epoch, unless a batch would be larger than MAX_BATCH_SIZE."""
CHECKPOINT_STEPS = 25
"""The most steps between two checkpoints."""
SUPERVISED_RATE, RATE_WIDTH, MAX_SUPERVISED_RATE = 2e-4, 4096, 2e-3
"""2e-4 is common for adapters on models of 7 to 8 billion parameters, whose hidden size is 4096. Narrower models get more, in
inverse proportion, up to 2e-3: SmolLM2 (hidden size 576) learns 20 facts of 20 from twenty chats at 1.4e-3, and 6 at 2e-4
(tests/numerics/test_newcomer.py)."""


def auto_epochs(num_examples: int) -> int:
    """The number of epochs over `num_examples` examples."""
    if EPOCHS * num_examples < SEEN:
        return min(MAX_EPOCHS, math.ceil(SEEN / num_examples))
    return EPOCHS if EPOCHS * num_examples <= MOST_SEEN else max(1, MOST_SEEN // num_examples)


def auto_batch_size(num_examples: int) -> int:
    """Examples per optimizer step for so many examples."""
    return min(MAX_BATCH_SIZE, max(1, num_examples // BATCHES))


def adapter_size(adapter: AdapterConfig) -> int:
    """An adapter's rank, a bottleneck's size, or 1 for IA3."""
    if isinstance(adapter, BottleneckConfig):
        return adapter.size
    return adapter.r if isinstance(adapter, LoraConfig) else 1


def auto_learning_rate(objective: Objective, adapter: AdapterConfig, hidden_size: int | None) -> float:
    """The peak learning rate. hidden_size: the model's; None counts as RATE_WIDTH."""
    if objective in PAIRED:
        return min(5e-5, max(5e-6, 4e-4 / adapter_size(adapter)))
    rate = SUPERVISED_RATE * max(1.0, RATE_WIDTH / (hidden_size or RATE_WIDTH))
    return min(MAX_SUPERVISED_RATE, float(f"{rate:.2g}"))


def resolve_settings(
    config: FinetuneConfig, num_examples: int, *, continued: AdapterConfig | None = None, hidden_size: int | None = None
) -> FinetuneConfig:
    """The settings with a number for every 'auto'; given numbers stay. continued: settings of the adapter that the job
    continues, or None. hidden_size: the model's."""
    epochs = auto_epochs(num_examples) if config.epochs == AUTO else config.epochs
    batch_size = auto_batch_size(num_examples) if config.batch_size == AUTO else config.batch_size
    order = BatchOrder(num_groups=num_examples, batch_size=settled(batch_size), seed=config.seed, shuffle=config.shuffle)
    every = min(order.steps_per_epoch, CHECKPOINT_STEPS) if config.checkpoint_steps == AUTO else config.checkpoint_steps
    rate = config.optimizer.learning_rate
    if rate == AUTO:
        rate = auto_learning_rate(config.objective, continued or config.adapter, hidden_size)
    return replace(
        config, epochs=epochs, batch_size=batch_size, checkpoint_steps=every,
        optimizer=replace(config.optimizer, learning_rate=rate),
    )


def keep_numbers(config: FinetuneConfig, recorded: Mapping[str, Any]) -> FinetuneConfig:
    """The settings with the recorded number for every 'auto'. recorded: a job's settings, as `to_dict` writes them."""
    changes = {name: recorded[name] for name in ("epochs", "batch_size", "checkpoint_steps")
               if getattr(config, name) == AUTO and is_number(recorded.get(name))}
    optimizer = recorded.get("optimizer")
    if config.optimizer.learning_rate == AUTO and isinstance(optimizer, Mapping):
        rate = optimizer.get("learning_rate", AUTO)
        if is_number(rate):
            changes["optimizer"] = replace(config.optimizer, learning_rate=rate)
    return replace(config, **changes)


def describe_settings(asked: FinetuneConfig, settings: FinetuneConfig, num_steps: int) -> str:
    """One line about a job's numbers. asked: the settings as given, which show what was 'auto'. settings: the resolved ones."""
    optimizer = settings.optimizer
    passes = f"{settings.epochs:g} epochs" if settings.max_steps is None else "max_steps"
    every = settings.checkpoint_steps or "none but the last"
    automatic = [name for name in ("epochs", "batch_size", "checkpoint_steps") if getattr(asked, name) == AUTO]
    if settings.max_steps is not None and "epochs" in automatic:
        automatic.remove("epochs")
    automatic += ["learning_rate"] if asked.optimizer.learning_rate == AUTO else []
    return (
        f"{num_steps} steps ({passes}, batch_size {settings.batch_size}), learning_rate {optimizer.learning_rate:g} "
        f"({optimizer.schedule}), checkpoint_steps {every}; {describe_adapter(settings.adapter)}"
        + (f"; chosen for this data and model: {', '.join(automatic)}" if automatic else "")
    )


def describe_adapter(adapter: AdapterConfig) -> str:
    """An adapter's kind and size in a few words."""
    if isinstance(adapter, LoraConfig):
        return f"{_kind(adapter)} of rank {adapter.r}, alpha {adapter.alpha:g}"
    if isinstance(adapter, BottleneckConfig):
        return f"bottleneck of size {adapter.size}, {adapter.placement}"
    return _kind(adapter)


def unused_settings(given: Mapping[str, Any], used: AdapterConfig) -> list[str]:
    """The given settings that differ from the continued adapter's, each as 'rank 16 (it has 4)'. given: {name: value} by the
    names of adapters' settings, and `kind` if that was given. used: the continued adapter's settings."""
    kind, values = _kind(used), to_dict(used)
    found = []
    if given.get("kind", kind) != kind:
        found.append(f"kind {given['kind']} (it is {kind})")
    for name, value in given.items():
        if name == "kind":
            continue
        if name not in values:
            found.append(f"{KNOBS[name].word} {_shown(value)} (it has none)")
        elif _comparable(name, value) != _comparable(name, values[name]):
            found.append(f"{KNOBS[name].word} {_shown(value)} (it has {_shown(values[name])})")
    return found


def not_used(name: str, unused: Sequence[str]) -> str:
    """A warning about what `unused_settings` found. name: the continued adapter's, as the user wrote it."""
    return f"the adapter's settings are those of {name}, which is continued; not used: {'; '.join(unused)}"


def given_settings(adapter: AdapterConfig) -> dict[str, Any]:
    """An adapter's settings in the form of `unused_settings`' argument `given`."""
    given = {name: value for name, value in to_dict(adapter).items() if name != "use_dora" and value is not None}
    return {"kind": _kind(adapter), **given}


def _kind(adapter: AdapterConfig) -> str:
    if isinstance(adapter, LoraConfig):
        return "dora" if adapter.use_dora else "lora"
    return "bottleneck" if isinstance(adapter, BottleneckConfig) else "ia3"


def _comparable(name: str, value: Any) -> Any:
    if name in ("target_modules", "feedforward_modules") and value is not None:
        return set(LINEAR_SITES) if value == "all-linear" else set(value)
    return value


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
