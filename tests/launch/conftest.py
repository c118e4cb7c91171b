"""A real SLURM for the tests: munge, one controller and two nodes on this machine, all of it under one temporary folder."""

import os
import shutil
import signal
import socket
import subprocess
import time

import pytest

from tests.common import LIMIT

CONFIGURATION = """\
ClusterName=test{port}
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={port}
FirstJobId={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
SlurmdTimeout=10
KillWait=30
MinJobAge=600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=x1 NodeHostname=localhost Port={port1} CPUs=8 RealMemory=8000 State=UNKNOWN
NodeName=x2 NodeHostname=localhost Port={port2} CPUs=8 RealMemory=8000 State=UNKNOWN
NodeName=y[1-2] NodeAddr=192.0.2.1 NodeHostname=elsewhere CPUs=8 RealMemory=8000 Gres=gpu:4 State=DOWN
PartitionName=keep Nodes=x[1-2] Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=x[1-2] MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=far Nodes=y[1-2] MaxTime=1:00:00 PriorityTier=1
PartitionName=reserved Nodes=y[1-2] MaxTime=1:00:00 PriorityTier=1 Hidden=YES
"""


class Slurm:
    """The daemons, and what the tests ask of them."""

    def __init__(self, folder):
        self.folder = folder
        self.daemons = {}
        ports = []
        for _ in range(3):
            with socket.socket() as probe:
                probe.bind(("", 0))
                ports.append(probe.getsockname()[1])
        for name in ("state", "spool.x1", "spool.x2"):
            (folder / name).mkdir()
        self.conf = folder / "slurm.conf"
        self.conf.write_text(CONFIGURATION.format(folder=folder, port=ports[0], port1=ports[1], port2=ports[2]))
        self.environment = os.environ | {"SLURM_CONF": str(self.conf)}

    def start(self):
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = [
            f"--{name}={self.folder}/munge.{name.removesuffix('-file')}"
            for name in ("key-file", "pid-file", "log-file", "seed-file")
        ]
        self._daemon("munged", "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        self._wait(lambda: (self.folder / "munge.socket").exists())
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        self.start_node("x1")
        self.start_node("x2")
        self._wait(lambda: self("sinfo", "-h", "-p", "keep", "-t", "idle", "-o", "%D").strip() == "2")

    def start_node(self, name):
        self._daemon(name, "slurmd", "-D", "-N", name)

    def _daemon(self, name, program, *words):
        path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                [path, *words],
                env=self.environment,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _wait(self, done):
        deadline = time.monotonic() + LIMIT
        while not done():
            logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.out"))
            assert time.monotonic() < deadline, f"SLURM did not start:\n{logs}"
            time.sleep(0.1)

    def __call__(self, *words):
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=LIMIT).stdout

    def job(self, number):
        text = self("scontrol", "-o", "show", "job", number)
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def kill_node(self, name):
        """End the node as a power cut would: its daemon, the daemons of its steps, and their processes."""
        import psutil

        self.daemons[name].kill()
        self.daemons[name].wait()
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get("SLURMD_NODENAME") == name and self._is_ours(process):
                process.kill()

    def _is_ours(self, process):
        return process.info["environ"].get("SLURM_CONF") == str(self.conf)

    def stop(self):
        import psutil

        self("scancel", "--signal=KILL", "--full", "--user=root")
        for daemon in reversed(self.daemons.values()):
            daemon.send_signal(signal.SIGKILL)
            daemon.wait()
        for process in psutil.process_iter(["environ"]):
            if self._is_ours(process) if process.info["environ"] else False:
                process.kill()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A running SLURM of two nodes, x1 and x2, in the partitions keep (default) and low, which keep's jobs preempt."""
    missing = [
        name
        for name in ("sbatch", "munged", "slurmctld", "slurmd")
        if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    ]
    if missing or os.geteuid() != 0:
        reason = (
            f"no {', '.join(missing)} here (apt install slurm-wlm munge)" if missing else "SLURM's daemons want root"
        )
        if os.environ.get("DIST_TRAIN_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
