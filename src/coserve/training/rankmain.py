"""The process of one rank of a finetuning job: `python -m coserve.training.rankmain RANK SIZE PORT`. It is started by
training/ranks.py, and ends with its standard input."""

from __future__ import annotations

import os
import sys
import threading

import torch
import torch.distributed as dist

from coserve.runtime.loaded import find_model
from coserve.training.ranks import DEVICE_KEY, HOST, JobSetup, ModelSetup, RankGroup, perform, ready_key


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    rank, size, port = map(int, sys.argv[1:])
    threading.Thread(target=_end_with_input, daemon=True).start()
    store = dist.TCPStore(HOST, port, size, is_master=False)
    store.set(ready_key(rank), "yes")
    device = torch.device(store.get(DEVICE_KEY).decode())
    if device.type == "cuda":
        torch.cuda.set_device(rank)
    group = RankGroup(store, rank, size, device)
    model: ModelSetup = group.receive()
    torch.set_num_threads(model.threads)
    found = find_model(str(model.directory), device=model.device, dtype=model.dtype)
    loaded = found.load(model.one_copy, group.ranks)
    loaded.weights.hold_one_copy(model.one_copy)
    job: JobSetup = group.receive()
    trainer = job.make_trainer(loaded)
    torch.use_deterministic_algorithms(job.settings.deterministic)
    while (order := group.receive()) is not None:
        verb, arguments = order
        perform(trainer, verb, arguments)
    group.close()


if __name__ == "__main__":
    main()
