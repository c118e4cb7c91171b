"""Real sshds that the tests' launchers find as nodes."""

import contextlib
import getpass
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from dist_train.distributed.launcher import free_port
from tests.common import ROOT


@contextlib.contextmanager
def ssh_nodes(folder: Path, nodes: Mapping[str, Sequence[str]]) -> Iterator[tuple[Path, dict[str, str]]]:
    """An sshd at each of these addresses, started behind the words that stand with it.

    Yields:
        a hostfile with node1, node2, ... of one process each, and the environment in which the launchers find them; in
        its configuration of ssh there is also a host that does not answer, ``silent``.
    """
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("no sshd or no ssh here: install openssh-server and openssh-client")
    home = folder / "ssh"
    home.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / name], check=True)
    shutil.copy(home / "user.pub", home / "authorized")
    port = free_port()
    (home / "sshd_config").write_text(
        f"Port {port}\nHostKey {home}/host\nPidFile none\n"
        f"AuthorizedKeysFile {home}/authorized\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        "PermitRootLogin yes\n"
    )
    (home / "config").write_text(
        "".join(f"Host node{n}\n  HostName {address}\n  Port {port}\n" for n, address in enumerate(nodes, start=1))
        + f"Host silent\n  HostName 127.0.0.3\n  Port {free_port()}\n"
        + f"Host *\n  User {getpass.getuser()}\n  IdentityFile {home}/user\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    # The launchers call `ssh`: this one reads the test's configuration.
    wrapper = home / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {home}/config "$@"\n')
    wrapper.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    words = ["-D", "-e", "-f", str(home / "sshd_config"), "-o"]
    servers = [
        subprocess.Popen([*before, sshd, *words, f"ListenAddress={address}"], stderr=subprocess.DEVNULL)
        for address, before in nodes.items()
    ]
    try:
        for number, server in enumerate(servers, start=1):
            while subprocess.run([wrapper, f"node{number}", "true"], stderr=subprocess.DEVNULL).returncode:
                assert server.poll() is None
                time.sleep(0.1)
        hostfile = folder / "hosts"
        lines = [f"node{number} slots=1" for number in range(1, len(nodes) + 1)]
        hostfile.write_text("# nodes\n" + "\n".join(lines) + "  # the last one\n")
        # PYTHONPATH must arrive on the nodes: the tests' networks are found by it.
        yield (
            hostfile,
            os.environ
            | {
                "PATH": f"{wrapper.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
                "DS_ACCELERATOR": "cpu",
            },
        )
    finally:
        for server in servers:
            server.kill()
            server.wait()
