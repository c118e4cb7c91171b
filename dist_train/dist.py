"""The processes of a run: who this one is, the process group, and the small reductions between them."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but torch does not list it

from dist_train.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Place of this process among all; made from the environment that a launcher or SLURM sets."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Ranks:
        """Read RANK, WORLD_SIZE, LOCAL_RANK (deepspeed, torchrun), or SLURM's variables, or one process alone.

        Raises:
            ConfigError: the variables contradict each other.
        """
        if "RANK" in env and "WORLD_SIZE" in env:
            rank, world, local = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
            # The deepspeed launcher calls it LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
            size = int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", world)))
        elif "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
            rank, world, local = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"])
            size = max(1, world // int(env.get("SLURM_STEP_NUM_NODES", 1)))
        else:
            rank, world, local, size = 0, 1, 0, 1
        if not 0 <= rank < world:
            raise ConfigError(f"RANK is {rank} and WORLD_SIZE is {world}; the rank must be below the size")
        return cls(rank, world, local, size)

    @property
    def device(self) -> torch.device:
        """The GPU of this process, or the CPU."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def threads(self) -> int:
        """Cores for this process: its fair share of those that it may use, at most what SLURM gave each task."""
        return max(1, min(len(self._share()), int(os.environ.get("SLURM_CPUS_PER_TASK", 1 << 20))))

    def pin(self) -> None:
        """Keep this process to its share of the cores, so that the processes of a machine do not take turns on them."""
        share = self._share()
        if share and self.local_world_size > 1:
            os.sched_setaffinity(0, share)

    def _share(self) -> list[int]:
        """The cores of this process, as many for each process of this machine; none where there are fewer than processes.

        A launcher that has given each process cores of its own has divided them already.
        """
        mine = os.sched_getaffinity(0)
        inherited = mine == os.sched_getaffinity(os.getppid()) or str(len(mine)) == os.environ.get("SLURM_CPUS_ON_NODE")
        if not inherited or self.local_world_size == 1:
            return sorted(mine)
        size = len(mine) // self.local_world_size
        return sorted(mine, key=_place_of_core)[self.local_rank * size : (self.local_rank + 1) * size]


def _place_of_core(cpu: int) -> tuple[int, int, int]:
    """Socket, core and number of a logical CPU: sorted by it, threads of one core are neighbours."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        package, core = (int((topology / name).read_text()) for name in ("physical_package_id", "core_id"))
    except (OSError, ValueError):
        package = core = 0
    return package, core, cpu


@contextlib.contextmanager
def launcher_variables(ranks: Ranks) -> Iterator[None]:
    """The variables that a launcher sets, for what reads them: DeepSpeed does, even where the group exists already.

    They are taken back, because processes that this one starts later would take themselves for its ranks.
    """
    wanted = {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world_size),
        "LOCAL_RANK": str(ranks.local_rank),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT", "0"),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


class Group:
    """The process group of a run; the runs of a process share one.

    Tensors on the device are reduced by :meth:`sum`; decisions of the host (stop, save) go by :meth:`agree` over a
    second group on the CPU, so that they never wait for work queued on a GPU.
    """

    def __init__(self, ranks: Ranks, timeout_minutes: float, enter: Callable[[str], None] = lambda doing: None) -> None:
        self.ranks = ranks
        self.enter = enter
        """Called with what this rank begins to do, so that a hang can be told."""
        self.device = ranks.device
        timeout = timedelta(minutes=timeout_minutes)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if ranks.world_size > 1 and "MASTER_PORT" not in os.environ:
            raise ConfigError(
                f"WORLD_SIZE is {ranks.world_size} but MASTER_PORT is not set; start with python -m launch.local"
            )
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if not dist.is_initialized():
            # Kept until the process ends: DeepSpeed holds on to the group, and a second one would hang in it.
            if ranks.world_size == 1:
                dist.init_process_group(backend, timeout=timeout, store=HashStore(), rank=0, world_size=1)
            else:
                with launcher_variables(ranks):
                    dist.init_process_group(backend, timeout=timeout)
            atexit.register(_leave)
        self._control = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else dist.group.WORLD

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        self.enter("sum over the ranks")
        if self.ranks.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true if it is true on any rank."""
        if self.ranks.world_size == 1:
            return flags
        self.enter("agreement of the ranks")
        votes = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._control)
        return tuple(bool(vote) for vote in votes.tolist())

    def broadcast(self, value: T) -> T:
        """Rank 0's value, a small picklable object, on all ranks."""
        self.enter("broadcast from rank 0")
        box = [value]
        if self.ranks.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def gather(self, value: T) -> list[T] | None:
        """The values of all ranks in a list on rank 0, None elsewhere."""
        if self.ranks.world_size == 1:
            return [value]
        self.enter("gathering on rank 0")
        box: list[T] | None = [value] * self.ranks.world_size if self.ranks.rank == 0 else None
        dist.gather_object(value, box, dst=0, group=self._control)
        return box

    def raise_together(self, error: Exception | None) -> None:
        """Raise the first rank's error on all ranks, so that none is left waiting for the others."""
        errors = self.gather(error)
        first = self.broadcast(next((e for e in errors if e is not None), None) if errors else None)
        if first is not None:
            raise error or first


def _leave() -> None:
    """Leave the group at the end of the process.

    A gloo thread may still hold the tensors of the last collective and need the interpreter to let go of them; if the
    interpreter ends first, the process aborts.  The pause lets that thread finish.
    """
    dist.destroy_process_group()
    time.sleep(0.1)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
