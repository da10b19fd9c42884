"""A finetuning job on several ranks, each a process with its part of the model: how they are started and told what to do.

    this process, rank 0                        ranks 1 to N - 1 (rankmain.py)
    data, plan, schedule, files                 nothing of these
    RankedTrainer: every verb is sent, then     perform(): the same verb on an AdapterTrainer of its own
    run on its own AdapterTrainer

All ranks run the same units in the same order, and meet in the collectives of the programs. They find one another through a
file in a private directory, and connect over the loopback interface. On CPUs a rank that ends makes the collectives of the
others fail; the error says which one it was, and its last words. On several GPUs none of this has been run. Ranks end when rank
0 closes their standard input, which the system does if it dies.

Owns: the processes, the orders. Does not own: what a verb does (trainer.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from coserve.compiler.parallelize import TensorParallel
from coserve.config.settings import FinetuneConfig
from coserve.core import CoserveError, Group, JobFailed, one_line
from coserve.finetune.job import StepLoss
from coserve.parallel import ProcessRanks
from coserve.peft.adapter import Adapter
from coserve.peft.gate import PassedAdapter
from coserve.planning.budget import FittedPlan
from coserve.runtime.loaded import FoundModel, LoadedModel, dtype_name
from coserve.training.trainer import AdapterTrainer

DEVICE_KEY = "device"
"""In the store: the kind of device that ranks work on."""
START_S = 120.0
"""Seconds that a process may take to start and connect."""
UNIT_S = 600.0
"""Seconds that a collective may take. A rank that hangs is noticed after them."""
IDLE = timedelta(days=365)
"""How long the others wait for orders of rank 0, which may wait for a disk."""
RANK_MODULE = "coserve.training.rankmain"
PEER_GONE = 17
"""Exit code of a rank whose collective failed, since another rank has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSetup:
    """What a rank needs to know to load its part of the model. directory: of the model. one_copy: as for `load_model`. threads:
    of each rank."""

    directory: Path
    device: str
    dtype: str
    one_copy: bool
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSetup:
    """What a rank needs to know before the first verb. group: with the adapter's shardings. fitted: the plan. passed: the
    adapter that is continued. end_token_ids: as for AdapterTrainer."""

    settings: FinetuneConfig
    group: TensorParallel
    fitted: FittedPlan
    passed: PassedAdapter | None
    end_token_ids: Sequence[int]

    def make_trainer(self, loaded: LoadedModel, warn: Callable[[str], None] = lambda _: None) -> AdapterTrainer:
        """This rank's trainer; all ranks call it together."""
        return AdapterTrainer(
            loaded, self.settings, plan=self.fitted.plan, in_flight=self.fitted.in_flight, group=self.group, passed=self.passed,
            end_token_ids=self.end_token_ids, warn=warn,
        )


class RankGroup:
    """The connected group, seen from one rank. ranks: for collectives of the model."""

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device) -> None:
        units, backend = timedelta(seconds=UNIT_S), "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(rank)
        with _over_loopback():
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=units)
            # rank 0 must not wait long for one that hangs; the others wait for orders as long as it takes
            self._orders = dist.new_group(backend="gloo", timeout=units if rank == 0 else IDLE)
        world = dist.group.WORLD
        assert world is not None
        self.ranks = ProcessRanks(world)

    def send(self, order: object) -> None:
        """Tells all other ranks something, which can be pickled. Rank 0 alone does."""
        dist.broadcast_object_list([order], src=0, group=self._orders)

    def receive(self) -> Any:
        """What rank 0 sent."""
        found: list[Any] = [None]
        dist.broadcast_object_list(found, src=0, group=self._orders)
        return found[0]

    def close(self) -> None:
        """Leaves the group."""
        dist.destroy_process_group()


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
    """One rank's process. meeting: the file through which ranks find one another. log: what it writes to standard error."""

    def __init__(self, rank: int, size: int, meeting: Path, log: Path, threads: int) -> None:
        self.rank, self._log = rank, log
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", RANK_MODULE, str(rank), str(size), str(meeting)], stdin=subprocess.PIPE, stderr=file,
                env=environment, start_new_session=True,  # Ctrl-C is for rank 0, which then ends the others
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

    def last_words(self) -> str:
        """How it ended, and the last line that it wrote."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        code = self._process.poll()
        ended = "hangs" if code is None else f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"rank {self.rank} {ended}{f': {lines[-1]}' if lines else ''}"

    def end(self) -> None:
        """Closes its standard input, which ends it, and waits a moment before it is killed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class RankProcesses:
    """The processes of ranks 1 to size - 1, and the group that they and this process make. Use it in a with statement."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.threads, self._device = size, max(1, torch.get_num_threads() // size), device
        self._processes: list[RankProcess] = []
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> RankProcesses:
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coserve-ranks-")))
            store = dist.FileStore(str(directory / "meeting"), self.size)
            store.set(DEVICE_KEY, self._device.type)
            for rank in range(1, self.size):
                process = RankProcess(rank, self.size, directory / "meeting", directory / f"{rank}.log", self.threads)
                self._processes.append(process)
                stack.callback(process.end)
            self._await(store)
            with self.together():
                self.group = RankGroup(store, 0, self.size, self._device)
            stack.callback(self.group.close)
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self.threads)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with contextlib.suppress(RuntimeError):  # the job is done, whatever has become of a rank since
                self.group.send(None)
        else:
            for process in self._processes:  # before the group is left, for which a collective under way would have to end
                process.end()
        self._exit.close()

    def _await(self, store: dist.Store) -> None:
        """Waits until all processes are there. Raises JobFailed for one that ended."""
        deadline = time.monotonic() + START_S
        while not store.check([ready_key(rank) for rank in range(1, self.size)]):
            self._require_alive()
            if time.monotonic() > deadline:
                late = next(process for process in self._processes if not store.check([ready_key(process.rank)]))
                raise JobFailed(f"the ranks did not start within {START_S:.0f} s; {late.last_words()}")
            time.sleep(0.05)

    def _require_alive(self) -> None:
        """Raises JobFailed if a rank has ended, with the last words of one that others may have ended for."""
        dead = sorted((each for each in self._processes if not each.alive), key=lambda each: not each.failed_by_itself)
        if dead:
            raise JobFailed(dead[0].last_words())

    def load(self, found: FoundModel, one_copy: bool) -> LoadedModel:
        """Loads a model on all ranks; this one's part of it."""
        setup = ModelSetup(
            directory=found.directory, device=found.device.type, dtype=dtype_name(found.dtype), one_copy=one_copy,
            threads=self.threads,
        )
        with self.together():
            self.group.send(setup)
            loaded = found.load(one_copy, self.group.ranks)
        loaded.weights.hold_one_copy(one_copy)
        return loaded

    def make_trainer(self, setup: JobSetup, loaded: LoadedModel, warn: Callable[[str], None]) -> RankedTrainer:
        """Makes a job's trainers on all ranks."""
        with self.together():
            self.group.send(setup)
            return RankedTrainer(self, setup.make_trainer(loaded, warn))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around what all ranks do. An error of a collective becomes JobFailed: with the last words of the rank that ended, or
        saying that one hangs."""
        try:
            yield
        except CoserveError:
            raise
        except RuntimeError as error:  # torch.distributed's are
            deadline = time.monotonic() + 2
            while all(process.alive for process in self._processes) and time.monotonic() < deadline:
                time.sleep(0.05)
            self._require_alive()
            if re.search("timed? ?out", str(error), re.IGNORECASE):
                raise JobFailed(f"a rank has not answered for {UNIT_S:.0f} s ({one_line(error)})") from error
            raise


class RankedTrainer:
    """The verbs of a job (`finetune.job.Verbs`) on all ranks."""

    def __init__(self, processes: RankProcesses, own: AdapterTrainer) -> None:
        self._processes, self._own = processes, own
        self.published: Adapter | None = None
        self._master: Tensor | None = None
        """The whole adapter's present values, once they have been put together."""

    def _all(self, verb: str, *arguments: Any) -> Any:
        with self._processes.together():
            self._processes.group.send((verb, arguments))
            return perform(self._own, verb, arguments)

    def forward_backward(self, groups: Sequence[Group], step: int) -> StepLoss:
        return self._all("forward_backward", groups, step)

    def score(self, groups: Sequence[Group]) -> StepLoss:
        return self._all("score", groups)

    def optim_step(self, rate: float) -> float:
        self._master = None
        return self._all("optim_step", rate)

    def optimizer_state(self) -> tuple[dict[str, Tensor], int]:
        state, num_updates = self._all("optimizer_state")
        self._master = state["master"]
        return state, num_updates

    def restore(self, state: dict[str, Tensor], num_updates: int) -> None:
        self._master = None
        self._all("restore", state, num_updates)

    def publish(self) -> None:
        """Nobody is served here."""

    def save(self, directory: Path) -> None:
        if self._master is None:
            self.optimizer_state()
        self._own.save(directory, master=self._master)


def perform(trainer: AdapterTrainer, verb: str, arguments: Sequence[Any]) -> Any:
    """One verb, on any rank."""
    return getattr(trainer, verb)(*arguments)


def ready_key(rank: int) -> str:
    """What a rank sets in the store once it runs."""
    return f"ready {rank}"
