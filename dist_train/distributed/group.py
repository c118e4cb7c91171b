"""The processes of a run: who this one is, the process group, and the small reductions between them."""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # public, but torch does not list it

from dist_train.distributed.rendezvous import gloo_interface, open_store, refuse_shared_gpus
from dist_train.errors import ConfigError, UserError

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
        # RANK wins over SLURM's variables: a launcher may have been started inside an allocation.
        if env.get("RANK") and env.get("WORLD_SIZE"):
            rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
            # The deepspeed launcher calls it LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
            local, size = (
                _number(env, "LOCAL_RANK", 0),
                _number(env, "LOCAL_WORLD_SIZE", _number(env, "LOCAL_SIZE", world)),
            )
        elif env.get("SLURM_PROCID") and env.get("SLURM_STEP_NUM_TASKS"):
            rank, world = _number(env, "SLURM_PROCID"), _number(env, "SLURM_STEP_NUM_TASKS")
            local, size = _number(env, "SLURM_LOCALID", 0), max(1, world // _number(env, "SLURM_STEP_NUM_NODES", 1))
        else:
            _refuse_mpi(env)
            rank, world, local, size = 0, 1, 0, 1
        if not 0 <= rank < world:
            raise ConfigError(f"RANK is {rank} and WORLD_SIZE is {world}; the rank must be below the size")
        return cls(rank, world, local, size)

    @property
    def device(self) -> torch.device:
        """The GPU of this process, or the CPU.

        Raises:
            ConfigError: there are fewer GPUs than processes.
        """
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # A launcher that shows every process a GPU of its own (srun --gpus-per-task=1) leaves no other number to it.
        visible = torch.cuda.device_count()
        if 1 < visible <= self.local_rank:
            raise ConfigError(
                f"this host has {visible} GPUs for {self.local_world_size} processes; start {visible} at most, or show more GPUs"
            )
        return torch.device("cuda", self.local_rank if visible > 1 else 0)

    @property
    def threads(self) -> int:
        """Cores for this process: its fair share of those that it may use, at most what SLURM gave each task."""
        return max(1, min(len(self._share()), _number(os.environ, "SLURM_CPUS_PER_TASK", 1 << 20)))

    def compute_on_cores(self) -> None:
        """Have PyTorch compute on the cores of this process; ``OMP_NUM_THREADS``, where it is set, has decided already."""
        # On a machine that others use as well, threads of one operation that wait for each other take many times as long.
        wanted = os.environ.get("OMP_NUM_THREADS")
        # torchrun sets it to 1 by itself, whatever the number of cores.
        if not wanted or (wanted == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
            torch.set_num_threads(self.threads)

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
        # Neighbouring cores go to one process: threads of a core share its caches.
        size = len(mine) // self.local_world_size
        return sorted(mine, key=_place_of_core)[self.local_rank * size : (self.local_rank + 1) * size]


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A whole number of the environment; an empty variable counts as one that is not set."""
    text = env.get(name) or default
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigError(
            f"the variable {name} is {text!r}; it must be a whole number, unset it, or use one of the launchers"
        ) from None


def _refuse_mpi(env: Mapping[str, str]) -> None:
    """Refuse mpirun, under which every process would believe it is the only one."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if _number(env, name, 1) > 1:
            raise ConfigError(
                f"{name} is {env[name]} but RANK and WORLD_SIZE are not set: mpirun does not set what the processes need; "
                "start them with python -m launch.local, launch.nodes or launch.slurm"
            )


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

    They are removed again: processes that this one starts later would mistake themselves for its ranks.
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

    Tensors on the device are reduced by :meth:`sum`; decisions of the host (stop, save) go by :meth:`any_rank` over a
    second group on the CPU, so that they never wait for work queued on a GPU.
    """

    store: Store
    """What all ranks see; one for all groups of a process, as the process group is."""

    def __init__(self, ranks: Ranks, timeout_minutes: float, phase: Callable[[str], None] = lambda name: None) -> None:
        self.ranks = ranks
        self.phase = phase
        """Called with what this rank begins to do, so that a hang can be located."""
        self.device = ranks.device
        timeout = timedelta(minutes=timeout_minutes)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if ranks.world_size > 1 and "MASTER_PORT" not in os.environ:
            how = (
                "sbatch launch/slurm.py or python -m launch.slurm"
                if "SLURM_PROCID" in os.environ
                else "python -m launch.local"
            )
            raise ConfigError(
                f"{ranks.world_size} processes are started, but MASTER_ADDR and MASTER_PORT are not set; start with {how}"
            )
        # NCCL moves tensors between GPUs, and cannot move those of the host.
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if not dist.is_initialized():
            # Kept until the process ends: DeepSpeed holds on to the group, and a second one would hang in it.
            self._initialize(backend, timeout)
            atexit.register(_leave)
        self._control = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else dist.group.WORLD

    def _initialize(self, backend: str, timeout: timedelta) -> None:
        ranks = self.ranks
        if "GLOO_SOCKET_IFNAME" not in os.environ:
            interface = gloo_interface(several_hosts=ranks.world_size > ranks.local_world_size)
            if interface is not None:
                os.environ["GLOO_SOCKET_IFNAME"] = interface
        # NCCL's own watchdog aborts the process without a report: it must not be the first.
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(round(2 * timeout.total_seconds())))
        with launcher_variables(ranks):
            store = open_store(ranks.rank, ranks.world_size, timeout)
        device = None
        if self.device.type == "cuda":
            refuse_shared_gpus(store, ranks.rank, ranks.world_size, self.device)
            # Known from the start, so that NCCL's connections are made here, and no collective has to guess the GPU.
            device = self.device
        dist.init_process_group(
            backend, timeout=timeout, store=store, rank=ranks.rank, world_size=ranks.world_size, device_id=device
        )
        Group.store = store

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        self.phase("sum over the ranks")
        if self.ranks.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_flat(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Fill a flat tensor with the equally large parts of all ranks, in their order."""
        self.phase("gathering of all ranks")
        dist.all_gather_into_tensor(whole, part)

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true if it is true on any rank."""
        return self.vote(*flags)()

    def vote(self, *flags: bool) -> Callable[[], tuple[bool, ...]]:
        """As :meth:`any_rank`, but the ranks go on; what is returned waits for all of them and gives the outcome."""
        # No collective, and no phase, where there is nobody to wait for.
        if self.ranks.world_size == 1:
            return lambda: flags
        # A maximum of bytes: one collective for all flags.
        votes = torch.tensor(flags, dtype=torch.uint8)
        work = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._control, async_op=True)

        def outcome() -> tuple[bool, ...]:
            self.phase("agreement of the ranks")
            work.wait()
            return tuple(bool(vote) for vote in votes.tolist())

        return outcome

    def broadcast(self, value: T) -> T:
        """Rank 0's value, a small picklable object, on all ranks."""
        self.phase("broadcast from rank 0")
        box = [value]
        if self.ranks.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def gather(self, value: T) -> list[T] | None:
        """The values of all ranks in a list on rank 0, None elsewhere."""
        if self.ranks.world_size == 1:
            return [value]
        self.phase("gathering on rank 0")
        box: list[T] | None = [value] * self.ranks.world_size if self.ranks.rank == 0 else None
        dist.gather_object(value, box, dst=0, group=self._control)
        return box

    def on_rank0(self, function: Callable[[], T]) -> T:
        """The small value of a function that rank 0 alone calls, on all ranks; a UserError of it is raised on all."""
        outcome: T | UserError | None = None
        if self.ranks.rank == 0:
            try:
                outcome = function()
            except UserError as error:
                # So that the command line prints it once, from rank 0.
                error.on_all_ranks = True
                outcome = error
        outcome = self.broadcast(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        return cast(T, outcome)


def _leave() -> None:
    """Leave the group at the end of the process.

    A gloo thread may still hold the tensors of the last collective and need the interpreter to let go of them; if the
    interpreter ends first, the process aborts.  The pause lets that thread finish.
    """
    dist.destroy_process_group()
    time.sleep(0.1)
