"""Where the processes of a run meet: their common store, the interface of the control group, and whose GPU is whose."""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta

import psutil
import torch
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]  # public, but torch does not list them
from torch.distributed.rendezvous import rendezvous

from dist_train.errors import DeviceError


def open_store(rank: int, world_size: int, timeout: timedelta) -> Store:
    """The key-value store that all ranks see: rank 0's at MASTER_ADDR, or torchrun's."""
    if world_size == 1:
        return HashStore()
    store: Store = next(rendezvous("env://", rank, world_size, timeout=timeout))[0]
    return store


def gloo_interface(several_hosts: bool) -> str | None:
    """The network interface that leads to MASTER_ADDR, None where the system does not tell.

    Without one gloo takes the address that this host's own name resolves to, which on many clusters is 127.0.1.1: no
    other host can connect to it.
    """
    loopback = None
    # On rank 0's host the name of the master may be such an address as well; the way out of the host is then the best guess.
    for destination in (os.environ.get("MASTER_ADDR", "127.0.0.1"), "192.0.2.254"):
        try:
            family, _, _, _, address = socket.getaddrinfo(destination, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # sends nothing, but decides on the route
                mine = probe.getsockname()[0]
        except OSError:
            continue
        for name, addresses in psutil.net_if_addrs().items():
            if any(entry.address.partition("%")[0] == mine for entry in addresses):
                if not (several_hosts and ipaddress.ip_address(mine).is_loopback):
                    return name
                loopback = name
    return loopback


def refuse_shared_gpus(store: Store, rank: int, world_size: int, device: torch.device) -> None:
    """Compare the GPUs of all ranks; NCCL would fail with two ranks on one, in words that name neither.

    Raises:
        DeviceError: on all ranks, if two of them have the same GPU.
    """
    entry = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    # The parts of a GPU in MIG mode are as good as GPUs, and may report the identity of the whole.
    part = entry if entry.startswith("MIG-") else ""
    identity = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}{part}"
    store.set(f"gpu/{rank}", identity)
    found: dict[str, int] = {}
    identities = store.multi_get([f"gpu/{other}" for other in range(world_size)])
    # The store may end with rank 0, which must not raise before all have read.
    if store.add("gpu/readers", 1) == world_size:
        store.set("gpu/read", "")
    if rank == 0:
        store.wait(["gpu/read"])
    for other, raw in enumerate(identities):
        text = raw.decode()
        if text in found:
            raise DeviceError(
                f"ranks {found[text]} and {other} have the same GPU ({text}); give every process a GPU of its own: start fewer, "
                "or let each see all GPUs of its host (srun --gpu-bind=none), or one that is its own"
            )
        found[text] = other
