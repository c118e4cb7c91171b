"""Which GPU a process takes, over which interface the processes meet, and what the process group is told."""

import atexit
import os
import socket
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist

from dist_train.distributed import group as group_module
from dist_train.distributed.group import Group, Ranks
from dist_train.distributed.rendezvous import gloo_interface, open_store, refuse_shared_gpus
from dist_train.errors import ConfigError, DeviceError


def fake_gpus(patch, identities):
    """This process sees GPUs with these identities."""
    patch(torch.cuda, "is_available", lambda: True)
    patch(torch.cuda, "device_count", lambda: len(identities))
    patch(torch.cuda, "set_device", lambda device: None)
    patch(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=identities[torch.device(device).index])
    )


def test_a_process_takes_the_gpu_of_its_local_rank_or_the_only_one_that_it_sees(monkeypatch):
    fake_gpus(monkeypatch.setattr, "abcd")
    assert [Ranks(n, 4, n, 4).device for n in range(4)] == [torch.device("cuda", n) for n in range(4)]
    fake_gpus(monkeypatch.setattr, "a")
    assert [Ranks(n, 4, n, 4).device.index for n in range(4)] == [0, 0, 0, 0]
    fake_gpus(monkeypatch.setattr, "ab")
    with pytest.raises(ConfigError, match="this host has 2 GPUs for 4 processes; start 2 at most"):
        _ = Ranks(3, 4, 3, 4).device


def compared(identities, parts):
    """What a rank that sees one GPU says to those of the others."""
    from datetime import timedelta

    ranks = Ranks.from_env()
    fake_gpus(setattr, [identities[ranks.rank]])
    os.environ["CUDA_VISIBLE_DEVICES"] = parts[ranks.rank]
    store = open_store(ranks.rank, ranks.world_size, timedelta(seconds=60))
    try:
        refuse_shared_gpus(store, ranks.rank, ranks.world_size, ranks.device)
    except DeviceError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("identities", "parts", "refused"),
    [
        (("GPU-a", "GPU-b", "GPU-a"), ("0", "0", "0"), True),
        (("GPU-a", "GPU-b", "GPU-c"), ("0", "0", "0"), False),
        (("GPU-a", "GPU-a", "GPU-b"), ("MIG-1", "MIG-2", "MIG-1"), False),
    ],
)
def test_two_ranks_on_one_gpu_are_refused_on_all_ranks_in_one_line(ranks, identities, parts, refused):
    said = ranks(compared, 3, identities, parts)
    if refused:
        assert len(set(said)) == 1
        assert said[0].startswith(f"ranks 0 and 2 have the same GPU ({socket.gethostname()} GPU-a)")
    else:
        assert said == [None] * 3


def peers(address):
    """The addresses between which the control group of this rank is connected."""
    os.environ["MASTER_ADDR"] = address
    group = Group(Ranks.from_env(), 1)
    group.any_rank(True)
    connections = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
    found = {c.laddr.ip.removeprefix("::ffff:") for c in connections}
    group.any_rank(True)  # none leaves before the other has looked
    return found


def test_pytorch_computes_on_the_cores_of_a_process_unless_omp_num_threads_says_otherwise(monkeypatch):
    ranks, before = Ranks(0, 1, 0, 1), torch.get_num_threads()
    try:
        for variable, expected in (("7", 5), ("1", 5), ("", ranks.threads)):
            torch.set_num_threads(5)
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
            ranks.compute_on_cores()
            assert torch.get_num_threads() == expected
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun does where nobody has set it
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        torch.set_num_threads(5)
        ranks.compute_on_cores()
        assert torch.get_num_threads() == ranks.threads
    finally:
        torch.set_num_threads(before)


def test_the_control_group_takes_the_interface_that_leads_to_the_master(ranks, monkeypatch):
    # A group of this process, of an earlier test, has chosen one.
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    own = [a.address for some in psutil.net_if_addrs().values() for a in some if a.family == socket.AF_INET]
    assert own
    for address in own:
        assert ranks(peers, 2, address) == [{address}] * 2


def test_a_master_whose_name_is_a_loopback_address_is_reached_from_other_hosts(monkeypatch):
    """Debian writes "127.0.1.1 HOST" into /etc/hosts: on that host, and on it alone, the master's name leads to itself."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.1.1")
    loopback = next(name for name, some in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in some))
    assert gloo_interface(several_hosts=False) == loopback
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.254", 9))
        except OSError:  # this machine has no way out
            assert gloo_interface(several_hosts=True) == loopback
        else:
            assert gloo_interface(several_hosts=True) != loopback


def test_nccl_is_told_its_gpu_and_waits_longer_than_the_watchdog(monkeypatch):
    fake_gpus(monkeypatch.setattr, "ab")
    told = {}
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: told.update(options, backend=backend))
    monkeypatch.setattr(dist, "new_group", lambda **options: None)
    monkeypatch.setattr(group_module, "open_store", lambda *_: dist.HashStore())
    monkeypatch.setattr(group_module, "refuse_shared_gpus", lambda *_: None)
    monkeypatch.setattr(atexit, "register", lambda *_: None)
    monkeypatch.setattr(Group, "store", None, raising=False)
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.delenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    Group(Ranks(1, 2, 1, 2), 31)
    assert (told["backend"], told["device_id"], told["rank"]) == ("nccl", torch.device("cuda", 1), 1)
    assert int(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > 31 * 60


def voted():
    """The outcome of a vote that rank 1 takes part in only after rank 0 has gone on from it."""
    group = Group(Ranks.from_env(), 1)
    if group.ranks.rank == 0:
        outcome = group.vote(False, False)
        group.store.set("rank 0 has gone on", "")
    else:
        group.store.wait(["rank 0 has gone on"])
        outcome = group.vote(True, False)
    return outcome()


def test_ranks_go_on_while_they_vote(ranks):
    assert ranks(voted, 2) == [(True, False)] * 2
