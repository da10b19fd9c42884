"""What a server counts, read from its /metrics."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable, Mapping

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 10.0


def read_counters(url: str, names: Iterable[str]) -> Mapping[str, float]:
    """Values by name; those that are absent (the engine is down) are left out. url: http://HOST:PORT. Raises OSError."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as response:
        text: str = response.read().decode()
    wanted = frozenset(names)
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {sample.name: sample.value for sample in samples if sample.name in wanted}
