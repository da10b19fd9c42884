"""What one process of a group does in tests with real processes: joins the group through a file, works, leaves its result."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import multiprocessing

from coserve.parallel import ProcessRanks, Ranks

T = TypeVar("T")
PATIENCE = timedelta(seconds=60)


def on_processes(size: int, work: Callable[[Ranks], T], directory: Path) -> list[T]:
    """Runs `work`, which can be pickled, in `size` processes that gloo connects. Their results in order of ranks."""
    multiprocessing.spawn(_run, (size, work, directory), nprocs=size)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _run(rank: int, size: int, work: Callable[[Ranks], object], directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory / 'meeting'}", rank=rank, world_size=size, timeout=PATIENCE
    )
    assert dist.group.WORLD is not None
    torch.save(work(ProcessRanks(dist.group.WORLD)), directory / f"{rank}.pt")
    dist.destroy_process_group()
