"""Random legal orders of units: any split of forward, any other of backward, over tokens and layers."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from coserve.core import Direction, Unit


def forward_units(rng: Random, num_layers: int, num_tokens: int) -> Iterator[Unit]:
    """A random staircase: a layer may run ahead of those above it, never of those below."""
    done = [0] * num_layers
    while done[-1] < num_tokens:
        ready = [
            layer for layer in range(num_layers)
            if done[layer] < (num_tokens if layer == 0 else done[layer - 1])
        ]
        first = rng.choice(ready)
        start = done[first]
        end = rng.randint(start + 1, num_tokens if first == 0 else done[first - 1])
        last = first + 1
        while last < num_layers and done[last] == start and rng.random() < 0.7:
            last += 1
        for layer in range(first, last):
            done[layer] = end
        yield Unit(Direction.FORWARD, first, last, start, end)


def backward_units(rng: Random, num_layers: int, lowest: int, num_tokens: int) -> Iterator[Unit]:
    """Layers from the top down to `lowest`, each in its own random windows from right to left; or several layers at once
    over all tokens."""
    layer = num_layers
    while layer > lowest:
        if rng.random() < 0.2:
            below = rng.randint(lowest, layer - 1)
            yield Unit(Direction.BACKWARD, below, layer, 0, num_tokens)
            layer = below
            continue
        layer -= 1
        end = num_tokens
        while end > 0:
            start = rng.randint(0, end - 1) if rng.random() < 0.8 else 0
            yield Unit(Direction.BACKWARD, layer, layer + 1, start, end)
            end = start


def mirrored_units(
    rng: Random, num_layers: int, lowest: int, num_tokens: int, grid: int = 1
) -> tuple[list[Unit], list[Unit]]:
    """Forward in a random staircase of windows that begin at multiples of `grid`, and backward in the windows that forward had
    in each layer."""
    blocks = forward_units(rng, num_layers, -(-num_tokens // grid))
    forward = [unit._replace(start=unit.start * grid, end=min(unit.end * grid, num_tokens)) for unit in blocks]
    backward = [
        Unit(Direction.BACKWARD, layer, layer + 1, unit.start, unit.end)
        for layer in reversed(range(lowest, num_layers))
        for unit in reversed(forward) if unit.layer_start <= layer < unit.layer_end
    ]
    return forward, backward
