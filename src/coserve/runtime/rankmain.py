"""The process of a rank but the first: `python -m coserve.runtime.rankmain RANK SIZE MEETING THREADS PARENT`. It is started by
runtime/ranks.py, and follows the orders that come through its standard input. It ends with that, whatever it is doing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import sys
import threading
import traceback
import zlib
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from coserve.core import CoserveError, RankFailed
from coserve.parallel import ProcessRanks
from coserve.runtime.loaded import prepare_cuda
from coserve.runtime.ranks import DEVICE_KEY, GROUP, HEAD_BYTES, PEER_GONE, Order, Twin, connect, ready_key

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ends without the interpreter's own end, which could wait for collectives that nobody answers."""
    code = 0
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # they are for rank 0, which ends this process when it has ended its work
        _, rank, size, meeting, threads, parent = sys.argv
        _die_with(int(parent))
        torch.set_num_threads(int(threads))
        work(int(rank), int(size), Path(meeting))
    except BaseException as error:
        traceback.print_exc()
        code = PEER_GONE if isinstance(error, dist.DistError) or "gloo" in str(error) else 1
    sys.stderr.flush()
    os._exit(code)


def _die_with(parent: int) -> None:
    """Asks the system to kill this process when its parent has died, even if this one is stopped then and doesn't see the end
    of its input. parent: its number; 0: don't ask."""
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


def work(rank: int, size: int, meeting: Path) -> None:
    """Joins the group and follows orders until the last."""
    pending: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_read, args=(pending,), daemon=True).start()
    store = dist.FileStore(str(meeting), size)
    store.set(ready_key(rank), "yes")
    device = torch.device(store.get(DEVICE_KEY).decode())
    if device.type == "cuda":
        prepare_cuda()
    ranks = connect(store, rank, size, device)
    with torch.no_grad():
        follow(ranks, pending)
    dist.destroy_process_group()


def _read(pending: SimpleQueue[bytes]) -> None:
    """Takes orders from the standard input. Its end ends the process."""
    stream = sys.stdin.buffer
    while len(head := stream.read(HEAD_BYTES)) == HEAD_BYTES:
        pending.put(stream.read(int.from_bytes(head, "little")))
    os._exit(0)


def follow(ranks: ProcessRanks, pending: SimpleQueue[bytes]) -> None:
    """Calls what is ordered, until the last order. A CoserveError is raised by all ranks alike, and is for rank 0's caller.
    Any other error ends this rank, and so does a CoserveError that rank 0 doesn't have."""
    kept: dict[int, Any] = {GROUP.number: ranks}
    checksum, failure = 0, None
    while data := pending.get():
        order: Order = pickle.loads(data)
        if failure is not None and not order.raised:
            raise failure  # rank 0 had no error: this rank has not done what the others did
        if order.checked:
            checksum = zlib.crc32(data, checksum)
            with contextlib.suppress(RankFailed):  # rank 0 says it, and ends all
                ranks.require_alike(checksum, "their orders")
        for number in order.dropped:
            kept.pop(number, None)
        result = failure = None
        try:
            result = order.function(*(kept[each.number] if isinstance(each, Twin) else each for each in order.arguments))
        except RankFailed:
            raise
        except CoserveError as error:
            failure = error
        if order.keeps is not None:
            kept[order.keeps] = result
        del data, order, result  # what they hold would live until the next order comes


if __name__ == "__main__":
    main()
