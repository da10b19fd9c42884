"""The process of one rank of a finetuning job: `python -m coserve.training.rankmain RANK SIZE MEETING`. It is started by
training/ranks.py, and ends with its standard input."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from coserve.runtime.loaded import find_model
from coserve.training.ranks import DEVICE_KEY, PEER_GONE, JobSetup, ModelSetup, RankGroup, perform, ready_key


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """Ends without the interpreter's own end, which could wait for collectives that nobody answers."""
    code = 0
    try:
        work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    except BaseException as error:
        traceback.print_exc()
        code = PEER_GONE if isinstance(error, dist.DistError) or "gloo" in str(error) else 1
    sys.stderr.flush()
    os._exit(code)


def work(rank: int, size: int, meeting: Path) -> None:
    """Joins the group, loads this rank's part of everything, and performs verbs until there is no more."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    store = dist.FileStore(str(meeting), size)
    store.set(ready_key(rank), "yes")
    group = RankGroup(store, rank, size, torch.device(store.get(DEVICE_KEY).decode()))
    model: ModelSetup = group.receive()
    torch.set_num_threads(model.threads)
    found = find_model(str(model.directory), device=model.device, dtype=model.dtype)
    loaded = found.load(model.one_copy, group.ranks)
    loaded.weights.hold_one_copy(model.one_copy)
    job: JobSetup = group.receive()
    trainer = job.make_trainer(loaded)
    torch.use_deterministic_algorithms(job.settings.deterministic)
    del job  # with the tensors of the adapter that is continued
    while (order := group.receive()) is not None:
        verb, arguments = order
        perform(trainer, verb, arguments)
    group.close()


if __name__ == "__main__":
    main()
