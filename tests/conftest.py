"""Tiny models run on one thread: faster, and indifferent to what else the machine does. Real ones take all (default_model)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
