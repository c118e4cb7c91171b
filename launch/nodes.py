"""Start a run's processes on several nodes over ssh, with DeepSpeed's launcher on each of them.

python -m launch.nodes --hostfile hosts CONFIG [--section.key value ...]
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from dist_train.arguments import OVERRIDES, Parser
from dist_train.distributed.launcher import free_port
from dist_train.errors import INTERRUPTED, ConfigError, UserError
from launch.node import GRACE_SECONDS, Place, stop_on_signals

REACH_SECONDS = 25
"""How long a node may take to answer the check before the start."""

# Nobody is there to type a password.  Without keep-alives, ssh would not notice a host that is gone.
SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15")

OWN = re.compile(
    r"(HOME|USER|LOGNAME|SHELL|MAIL|HOSTNAME|HOST|PWD|OLDPWD|SHLVL|_|TERM|DISPLAY|TMPDIR|TMP|TEMP|KRB5CCNAME|"
    r"(SSH|XDG|DBUS|LC|SLURM|SLURMD|PMI|PMIX)_.*|"
    r"RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|BASH_FUNC.*)"
)
"""Variables that belong to one node or login; all others are forwarded."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check configuration and nodes here, once; then start the processes and wait for them.  Returns their exit code."""
    parser = Parser(
        "python -m launch.nodes",
        description="Train on several nodes over ssh; all of them see the same folders under the same names.",
        epilog=OVERRIDES,
        allow_abbrev=False,
    )
    parser.add_argument("--hostfile", type=Path, required=True, help="a line 'HOST slots=PROCESSES' per node")
    parser.add_argument("--master-addr", metavar="ADDRESS", help="address of the first node (default: as ssh knows it)")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="port there (default: one that is free here)")
    parser.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    try:
        known, overrides = parser.parse_known_args(arguments)
        hosts = read_hostfile(known.hostfile)
        if sys.stdout.isatty():
            print(f"launch.nodes: checking {known.config} and {len(hosts)} nodes", flush=True)
        from dist_train.training.preflight import check_start  # takes seconds, in which Ctrl-C is no traceback either

        check_start(known.config, overrides, sum(hosts.values()))
        _check_nodes(hosts, known.config)
        master = known.master_addr or _address(next(iter(hosts)))
    except UserError as error:
        print(f"launch.nodes: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    port = known.master_port or free_port()
    places = [Place(hosts, number, master, port) for number in range(len(hosts))]
    return Nodes(places, ["train", known.config, *overrides]).wait()


def read_hostfile(path: Path) -> dict[str, int]:
    """Processes by host of a hostfile as DeepSpeed reads it: ``HOST slots=N`` per line, # starts a comment.

    Raises:
        ConfigError: the file cannot be read, has a bad line (the message has its number), a host twice, or none.
    """
    try:
        # As UTF-8 whatever the locale; a byte order mark, which some editors write, is no part of the first name.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); give a file with a line 'HOST slots=N' per node"
        ) from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        match = re.fullmatch(r"([^\s=-][^\s=]*)\s+slots=([1-9]\d*)", text)
        if text and not match:
            raise ConfigError(f"{path} line {number}: is {text!r}; write HOST slots=N, for instance node1 slots=8")
        if match and match[1] in hosts:
            raise ConfigError(
                f"{path} line {number}: {match[1]} is listed twice; list each host once, with all its slots"
            )
        if match:
            hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"{path}: names no host; write a line HOST slots=N per node, for instance node1 slots=8")
    return hosts


class Nodes:
    """The ssh connections of a run, one per node; the end of a connection's stdin stops the processes at its other end."""

    def __init__(self, places: Sequence[Place], arguments: list[str]) -> None:
        self._asked = False
        self._links = [self._start(place, arguments) for place in places]
        self._hosts = list(places[0].slots)

    def _start(self, place: Place, arguments: list[str]) -> subprocess.Popen[str]:
        host = list(place.slots)[place.number]
        order = {
            "environment": {name: value for name, value in os.environ.items() if not OWN.fullmatch(name)},
            "place": asdict(place),
            "module": "dist_train",
            "arguments": arguments,
        }
        # The order goes through stdin, not the command line, which every user of the node could read in ps.
        words = [*SSH, host, _remote([sys.executable, "-m", "launch.node"])]
        # In a session of its own, so that Ctrl-C does not end the connection, through which the order to stop goes.
        link = subprocess.Popen(words, stdin=subprocess.PIPE, text=True, start_new_session=True)
        assert link.stdin
        try:
            link.stdin.write(json.dumps(order) + "\n")
            link.stdin.flush()
        except BrokenPipeError:
            pass  # ssh is gone already; its exit code is handled in wait()
        return link

    def stop(self) -> None:
        """Ask all ranks to save and exit; on the second request, kill them."""
        self._asked = True
        for link in self._links:
            try:
                assert link.stdin
                link.stdin.write("stop\n")
                link.stdin.flush()
            except (BrokenPipeError, ValueError):
                pass

    def wait(self) -> int:
        """Wait for all nodes; one that fails ends the others.  The exit code of the first that failed, or 0."""
        stop_on_signals(self.stop)
        first = 0
        running = dict(zip(self._hosts, self._links))
        deadline = float("inf")
        while running:
            for host, link in list(running.items()):
                if (code := link.poll()) is None:
                    continue
                del running[host]
                if code and not first:
                    first = code if code > 0 else 128 - code
                    deadline = time.monotonic() + GRACE_SECONDS
                    if code == 255:  # ssh's own code
                        print(f"launch.nodes: the connection to {host} is lost", file=sys.stderr)
                    # The other ranks would wait in a collective for those that are gone.
                    if not self._asked:
                        self.stop()
            if time.monotonic() > deadline:
                for link in running.values():
                    # At the other end, stdin ends with it, which stops the ranks there.
                    link.kill()
            time.sleep(0.1)
        return first


def _remote(command: list[str]) -> str:
    """A command for a node's shell: in this working directory, with this process's way to find modules."""
    path = shlex.quote(os.environ.get("PYTHONPATH", ""))
    return f"cd {shlex.quote(os.getcwd())} && PYTHONPATH={path} exec {shlex.join(command)}"


def _check_nodes(hosts: dict[str, int], config: str) -> None:
    """Check folder, Python, configuration and GPUs on all nodes at once; raise ConfigError for the first that lacks one."""
    folder, file, python = map(shlex.quote, (os.getcwd(), config, sys.executable))
    probe = (
        f"test -r {file} || {{ echo has no {file} in {folder}; exit 3; }} >&2; "
        f"test -x {python} || {{ echo has no {python}; exit 3; }} >&2; nvidia-smi -L 2>/dev/null | wc -l"
    )
    command = f"cd {folder} && {{ {probe}; }}"

    def ask(host: str) -> str:
        try:
            result = subprocess.run(
                [*SSH, host, command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=REACH_SECONDS
            )
        except FileNotFoundError:
            return "cannot be reached, because this machine has no ssh; install an ssh client"
        except subprocess.TimeoutExpired:
            return f"cannot be reached: no answer in {REACH_SECONDS} s"
        said = (result.stderr.strip().splitlines() or [""])[-1]
        if result.returncode == 255:
            return f"cannot be reached by ssh without a password ({said})"
        if result.returncode:
            return f"{said}; all nodes must see the same folders"
        gpus = int(result.stdout.split()[-1])
        return f"has {gpus} GPUs, but slots={hosts[host]}; correct the hostfile" if 0 < gpus < hosts[host] else ""

    with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
        # In the order of the hostfile, so that the same mistake gives the same message.
        for host, problem in zip(hosts, pool.map(ask, hosts)):
            if problem:
                raise ConfigError(f"node {host} {problem}")


def _address(host: str) -> str:
    """The address by which the other nodes reach a host: as ssh's configuration has it."""
    result = subprocess.run(["ssh", "-G", host], capture_output=True, text=True)
    # The hostfile may have an alias of ssh's configuration that only this machine knows.
    names = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("hostname ")]
    return names[0] if names else host


if __name__ == "__main__":
    sys.exit(main())
