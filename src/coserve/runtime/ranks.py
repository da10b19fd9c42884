"""The processes of the ranks that share a model, and how rank 0 makes all of them do the same.

    this process, rank 0                          ranks 1 to N - 1 (rankmain.py)
    told(function, arguments) ---- pipe ---->     the same function, with their own objects in place of rank 0's
    its own part of the work <-- collectives -->  their part

An order is a function and its arguments. What a function makes can be kept under a number: rank 0's object and those of the
other ranks are then twins, and stand for one another in later orders. When rank 0's object is gone, its twins go too. Orders
travel through the standard input of each process, so that nobody else can send any, and arrive in order.

All ranks run the same functions in the same order, and meet in collectives. They find one another through a file in a private
directory, and connect over the loopback interface. On CPUs a rank that ends makes the collectives of the others fail; the error
says which one it was, and its last words. On several GPUs none of this has been run. Ranks end with rank 0.

Owns: the processes, the orders, the twins. Does not own: what is ordered.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from coserve.config.values import require
from coserve.core import CoserveError, RankFailed, one_line
from coserve.parallel import ProcessRanks

DEVICE_KEY = "device"
"""In the store: the kind of device that ranks work on."""
START_S = 120.0
"""Seconds that a process may take to start and connect."""
UNIT_S = 600.0
"""Seconds that a collective may take. A rank that hangs is noticed after them."""
RANK_MODULE = "coserve.runtime.rankmain"
PEER_GONE = 17
"""Exit code of a rank whose collective failed, since another rank has ended."""
HEAD_BYTES = 8
"""An order comes behind its length, which has so many bytes. Length 0 is the last order."""
_PATIENCE_S = 2.0
"""Seconds that are waited for a process that is about to end, or for an order under way."""
_TAIL_BYTES = 4096
"""How much is read of the end of what a rank has written."""
T = TypeVar("T")
_log = logging.getLogger(__name__)


class Twin(NamedTuple):
    """Stands in an order for the object that is kept under a number."""

    number: int


GROUP = Twin(0)
"""Each rank's view of the group (`Ranks`), which is there from the start."""


class Order(NamedTuple):
    """A function that all ranks call. keeps: the number under which its result is kept, if it is. dropped: the numbers of what
    is not needed any more. raised: whether the order before raised a CoserveError on rank 0, as it should have on all. checked:
    whether all ranks compare what they have been told so far before they call it."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keeps: int | None
    dropped: tuple[int, ...]
    raised: bool
    checked: bool


def require_devices(size: int, device: torch.device) -> None:
    """Raises ConfigError for more ranks than GPUs, and for a second group in this process."""
    require(size == 1 or not dist.is_initialized(), "tensor_parallel_size",
            "torch.distributed is in use in this process, perhaps for another model on several ranks; close that first")
    count = torch.cuda.device_count() if device.type == "cuda" else size
    require(size <= count, "tensor_parallel_size", f"{size} ranks need {size} CUDA devices, and there are {count}")


def sharing_note(size: int, device: torch.device) -> str:
    """What is said of a group before it starts."""
    if device.type == "cuda":
        return f"{size} processes share the model, each on a GPU of its own"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slow = ", which is slower than one process" if size > cores else ""
    return f"{size} processes share the model and {cores} cores{slow}"


def connect(store: dist.Store, rank: int, size: int, device: torch.device) -> ProcessRanks:
    """Joins the group of this process's rank; all ranks call it together."""
    if device.type == "cuda":
        torch.cuda.set_device(rank)
    with _over_loopback():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size,
            timeout=timedelta(seconds=UNIT_S),
        )
    world = dist.group.WORLD
    assert world is not None
    return ProcessRanks(world, device)


@contextlib.contextmanager
def _over_loopback() -> Iterator[None]:
    """Groups that are made within it listen on the loopback interface only, unless the user has named another."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    missing = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name not in os.environ]
    try:
        if loopback is not None:
            os.environ.update(dict.fromkeys(missing, loopback))
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


class RankProcess:
    """One rank's process. meeting: the file through which ranks find one another. threads: that its products use."""

    def __init__(self, rank: int, size: int, meeting: Path, threads: int) -> None:
        self.rank = rank
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # without a name, so that nothing is left behind
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        # another thread than the main one may end while this process goes on, which the system would take for the end of both
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", RANK_MODULE, str(rank), str(size), str(meeting), str(threads), str(parent)],
            stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, env=environment,
            start_new_session=True,  # Ctrl-C is for rank 0, which then ends the others
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def failed_by_itself(self) -> bool:
        """Whether it ended for a reason of its own, and not because another rank did."""
        return self._process.poll() not in (None, PEER_GONE)

    def failure(self, before: str = "") -> RankFailed:
        """How it ended, and the last line that it wrote. before: what is said first."""
        code = self._process.poll()
        if code is not None and code < 0:
            return RankFailed(f"{before}rank {self.rank} ended by signal {-code}", signal=-code)
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        lines = tail.decode(errors="replace").strip().splitlines()
        ended = "hangs" if code is None else f"ended with code {code}"
        return RankFailed(f"{before}rank {self.rank} {ended}{f': {lines[-1]}' if lines else ''}")

    def send(self, data: bytes) -> None:
        """Writes an order. Raises OSError if the process has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(len(data).to_bytes(HEAD_BYTES, "little"))
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def wait(self) -> None:
        """Waits for its end."""
        self._process.wait()

    def end(self) -> None:
        """Closes its standard input, which ends it, and waits a moment before it is killed."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended already
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class RankProcesses:
    """The processes of ranks 1 to size - 1, and the group that they and this process make. Use it in a with statement, or
    `close` it. Any thread may give orders. ranks: this process's view of the group. threads: of each rank. Raises RankFailed if
    they can't start."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.threads, self._device = size, max(1, torch.get_num_threads() // size), device
        self._processes: list[RankProcess] = []
        self._lock = threading.RLock()
        self._depth = 0
        """Above 0 while all ranks run an order: what that calls in turn is not ordered again."""
        self._numbers = itertools.count(1)
        self._twins: dict[int, int] = {}
        """{id of an object: the number under which it and its twins are kept}."""
        self._dropped: deque[int] = deque()
        self._raised = False
        self._sum = 0
        """A checksum of all orders since the log's level has been debug."""
        self._failure: RankFailed | None = None
        """Why no order is given any more."""
        self._ending = False
        self._exit = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._exit = stack.pop_all()
        atexit.register(self._close_at_exit)
        for process in self._processes:
            threading.Thread(target=self._watch, args=(process,), name=f"coserve-rank-{process.rank}", daemon=True).start()

    def _start(self, stack: contextlib.ExitStack) -> None:
        with tempfile.TemporaryDirectory(prefix="coserve-ranks-") as directory:
            meeting = Path(directory, "meeting")
            store = dist.FileStore(str(meeting), self.size)
            store.set(DEVICE_KEY, self._device.type)
            for rank in range(1, self.size):
                process = RankProcess(rank, self.size, meeting, self.threads)
                self._processes.append(process)
                stack.callback(process.end)
            self._await(store)
            self.ranks = self._connect(store)
            self._twins[id(self.ranks)] = GROUP.number
            self.call(dist.barrier)  # nobody needs the file any more
        stack.callback(dist.destroy_process_group)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(self.threads)

    @property
    def pids(self) -> list[int]:
        """The numbers of the processes of ranks 1 to size - 1."""
        return [process.pid for process in self._processes]

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, *, failed: bool = False) -> None:
        """Ends the ranks. failed: whether they may be in a collective, which would have to end first."""
        if self._ending:
            return
        self._ending = True
        failed = failed or self._failure is not None
        self._failure = self._failure or RankFailed("the model is closed")
        atexit.unregister(self._close_at_exit)
        free = self._lock.acquire(timeout=_PATIENCE_S)  # else another thread is in an order that doesn't end
        try:
            for process in self._processes:
                if failed or not free:
                    process.end()
                else:
                    with contextlib.suppress(OSError):  # it has ended by itself, when all work was done
                        process.send(b"")
            self._exit.close()
        finally:
            if free:
                self._lock.release()

    def _close_at_exit(self) -> None:
        """Other threads may be in the middle of anything."""
        self.close(failed=True)

    def _watch(self, process: RankProcess) -> None:
        """Runs in a thread of its own, so that a death is noticed while nothing runs."""
        process.wait()
        if not self._ending:
            self._failure = self._failure or self._blame() or process.failure()

    def check(self) -> None:
        """Raises RankFailed if the group can't go on."""
        if self._failure is not None:
            raise self._failure

    # --- orders ---

    def call(self, function: Callable[..., T], *arguments: Any, keeps: bool = False) -> T:
        """Calls a function on all ranks, with their twins of the arguments, and returns what it returns here. It must be one
        that pickle finds by its name. keeps: whether the result will be an argument later. A CoserveError must be raised by all
        ranks alike, or by none. Raises RankFailed, and what the function raises here."""
        with self.told(function, *arguments, keeps=keeps) as keep:
            return keep(function(*arguments))

    @contextlib.contextmanager
    def told(self, function: Callable[..., object], *arguments: Any, keeps: bool = False) -> Iterator[Callable[[T], T]]:
        """Tells the other ranks to call a function, while this one does the same in the with statement. That gets a function
        which takes this rank's result and returns it. Within it, further orders are not sent: the others give them to
        themselves. Arguments, results and errors: as for `call`."""
        with self._lock:
            if self._depth:
                yield lambda made: made
                return
            self.check()
            number = next(self._numbers) if keeps else None
            self._depth += 1
            try:
                with self._together():
                    self._send(function, arguments, number)
                    yield lambda made: self._keep(number, made)
                self._raised = False
            except BaseException as error:
                self._raised = True
                if number is not None:
                    self._dropped.append(number)
                if isinstance(error, RankFailed) or not isinstance(error, CoserveError):  # such as KeyboardInterrupt
                    interrupted = RankFailed("rank 0 was interrupted in an order")
                    self._failure = self._failure or (error if isinstance(error, RankFailed) else interrupted)
                raise
            finally:
                self._depth -= 1

    def _send(self, function: Callable[..., object], arguments: Sequence[Any], number: int | None) -> None:
        checked = _log.isEnabledFor(logging.DEBUG)
        dropped = tuple(self._dropped.popleft() for _ in range(len(self._dropped)))
        order = Order(function, tuple(map(self._reference, arguments)), number, dropped, self._raised, checked)
        data = pickle.dumps(order, protocol=pickle.HIGHEST_PROTOCOL)
        for process in self._processes:
            process.send(data)
        if checked:
            self._sum = zlib.crc32(data, self._sum)
            self.ranks.require_alike(self._sum, f"their orders up to {getattr(function, '__qualname__', function)}")

    def _reference(self, argument: Any) -> Any:
        number = self._twins.get(id(argument))
        return argument if number is None else Twin(number)

    def _keep(self, number: int | None, made: T) -> T:
        if number is not None:
            self._twins[id(made)] = number
            weakref.finalize(made, self._drop, id(made)).atexit = False
        return made

    def _drop(self, identity: int) -> None:
        self._dropped.append(self._twins.pop(identity))

    # --- what may go wrong ---

    def _await(self, store: dist.Store) -> None:
        """Waits until all processes are there. Raises RankFailed for one that ended."""
        deadline = time.monotonic() + START_S
        while not store.check([ready_key(rank) for rank in range(1, self.size)]):
            self._require_alive()
            if time.monotonic() > deadline:
                late = next(process for process in self._processes if not store.check([ready_key(process.rank)]))
                raise late.failure(f"the ranks did not start within {START_S:.0f} s; ")
            time.sleep(0.05)

    def _connect(self, store: dist.Store) -> ProcessRanks:
        """Joins the group, unless a rank ends meanwhile, for which joining would wait."""
        joined: Future[ProcessRanks] = Future()

        def join() -> None:
            try:
                joined.set_result(connect(store, 0, self.size, self._device))
            except BaseException as error:
                joined.set_exception(error)

        threading.Thread(target=join, name="coserve-join", daemon=True).start()
        with self._together():
            while not joined.done():
                self._require_alive()
                wait([joined], timeout=0.05)
            return joined.result()

    def _blame(self) -> RankFailed | None:
        """The failure of a rank that has ended, preferably of one that has ended by itself, for which a moment is waited; None
        if all live."""
        deadline = time.monotonic() + _PATIENCE_S
        while not any(process.failed_by_itself for process in self._processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        dead = sorted((each for each in self._processes if not each.alive), key=lambda each: not each.failed_by_itself)
        return dead[0].failure() if dead else None

    def _require_alive(self) -> None:
        """Raises RankFailed if a rank has ended."""
        if not all(process.alive for process in self._processes):
            failure = self._blame()
            assert failure is not None
            raise failure

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Around what all ranks do. An error becomes RankFailed, unless it is a CoserveError, which all ranks have: the failure
        of the rank that ended, or a line that says that one hangs."""
        try:
            yield
        except CoserveError:
            raise
        except Exception as error:  # of a collective or a pipe, or only this rank's own
            failure = self._blame()
            if failure is None and re.search("timed? ?out", str(error), re.IGNORECASE):
                failure = RankFailed(f"a rank has not answered for {UNIT_S:.0f} s ({one_line(error)})")
            raise failure or RankFailed(f"rank 0 failed: {error!r}") from error


def ready_key(rank: int) -> str:
    """What a rank sets in the store once it runs."""
    return f"ready {rank}"
