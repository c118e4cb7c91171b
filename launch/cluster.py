"""What SLURM says: the partitions of a cluster, the state of jobs, and which job works on a run folder."""

from __future__ import annotations

import getpass
import math
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dist_train.errors import SlurmError

ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL",
}  # fmt: skip

ELEMENTS = ".elements"
"""Ending of a file with the run folders of an array, in the order of its elements."""


@dataclass(frozen=True)
class Partition:
    """A partition as ``sinfo`` shows it; cores and GPUs are those of its largest node."""

    name: str
    hours: float
    nodes: int
    cores: int
    gpus: int
    default: bool


class Unanswered(SlurmError):
    """One of SLURM's commands failed, or the controller was away."""


def require(instead: str) -> None:
    """Raise SlurmError, which says what to do instead, where SLURM is not on this machine."""
    if shutil.which("sbatch") is None:
        raise SlurmError(f"sbatch is not on this machine; {instead}")


def ask(*words: str) -> str:
    """Output of one of SLURM's commands.

    Raises:
        SlurmError: the command is not there.
        Unanswered: it does not answer within a minute, or fails; with its last line.
    """
    if shutil.which(words[0]) is None:
        raise SlurmError(f"{words[0]} is not on this machine; to train here use python -m launch.local CONFIG")
    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise Unanswered(f"{words[0]} does not answer; is SLURM's controller up? (scontrol ping)") from None
    if result.returncode:
        raise Unanswered(f"{' '.join(words)}: {last_line(result.stderr) or f'exit code {result.returncode}'}")
    return result.stdout


def partitions() -> dict[str, Partition]:
    """All partitions by name."""
    found: dict[str, Partition] = {}
    for line in ask("sinfo", "--noheader", "--format=%P|%l|%D|%c|%G").splitlines():
        name, limit, nodes, cores, gres = line.strip().split("|")
        gpus = sum(int(count) for count in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))
        before = found.get(name.rstrip("*"), Partition("", 0, 0, 0, 0, False))
        found[name.rstrip("*")] = Partition(
            name.rstrip("*"), hours_of(limit), before.nodes + int(nodes), max(before.cores, int(cores.rstrip("+"))),
            max(before.gpus, gpus), name.endswith("*"),
        )  # fmt: skip
    return found


def hours_of(limit: str) -> float:
    """Hours of a time limit such as ``2-00:00:00``, ``12:00:00``, ``30:00`` or ``infinite``."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if not match:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 24 * days + hours + minutes / 60 + seconds / 3600


def job(number: str) -> dict[str, str]:
    """The fields of ``scontrol show job``; empty when SLURM has forgotten the job.

    Raises:
        Unanswered: the controller is away.
    """
    try:
        text = ask("scontrol", "--oneliner", "show", "job", number)
    except Unanswered as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    fields: dict[str, str] = {}
    for key, value in re.findall(r"(?:^|\s)([A-Za-z][\w:/]*)=(\S*)", text.partition("\n")[0]):
        fields.setdefault(key, value)
    return fields


def jobs() -> dict[Path, str]:
    """The numbers of the user's jobs, waiting or running, by the folder that each says in its comment to work on.

    The comment of an array is a file with one folder per element, until an element says its own.
    """
    found: dict[Path, str] = {}
    for line in ask("squeue", "--noheader", f"--user={getpass.getuser()}", "--array", "--format=%i|%k").splitlines():
        number, _, comment = line.strip().partition("|")
        folder = Path(comment)
        if folder.suffix == ELEMENTS and folder.is_file():
            folder = Path(folder.read_text().splitlines()[int(number.rpartition("_")[2])])
        found[folder] = number
    return found


def job_on(folder: Path) -> str | None:
    """The number of the user's job, waiting or running, that works on this folder."""
    return jobs().get(folder)


def hosts(nodelist: str) -> list[str]:
    """The node names of a list such as ``gpu[1-3,7]``."""
    return ask("scontrol", "show", "hostnames", nodelist).split()


def last_line(text: str) -> str:
    """The last line of an output that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
