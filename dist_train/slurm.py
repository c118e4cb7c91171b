"""The interface to SLURM: partitions, jobs, which job trains in a run folder, and submission through submitit."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.errors import SlurmError

ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "DEADLINE",
    "BOOT_FAIL",
}

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP)
"""What a batch step may be sent before its job ends."""

ELEMENTS = ".elements"
"""Ending of a file with the run folders of an array, in the order of its elements."""

_OTHER_NAMES = {
    "time": ["TIMELIMIT"],
    "array": ["ARRAY_INX"],
    "mem": ["MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"],
    "requeue": ["REQUEUE", "NO_REQUEUE"],
    "switches": ["REQ_SWITCH"],
}
"""Flags of sbatch and their variables SBATCH_NAME, or those that contradict the flag, where the names differ."""


@dataclass(frozen=True)
class Partition:
    """A partition as ``sinfo`` shows it; cores and GPUs are those of its largest node."""

    name: str
    hours: float
    nodes: int
    cores: int
    gpus: int
    default: bool
    cores_per_gpu: int
    """Of the node that has the fewest for each of its GPUs; 0 without GPUs."""


class Unanswered(SlurmError):
    """One of SLURM's commands failed, or the controller did not answer."""


def is_here() -> bool:
    """Whether this machine can submit jobs."""
    return shutil.which("sbatch") is not None


def flags(words: Sequence[str]) -> dict[str, str | bool]:
    """Flags of sbatch, ``KEY=VALUE`` or ``KEY``, as submitit takes them."""
    parts = (word.partition("=") for word in words)
    return {key.replace("-", "_"): value if equals else True for key, equals, value in parts}


def require(instead: str) -> None:
    """Raise SlurmError, which says what to do instead, if this machine has no SLURM."""
    if not is_here():
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
        # The user's own views of the queue and the cluster, such as SQUEUE_STATES, would hide jobs and nodes.
        environment = {name: value for name, value in os.environ.items() if not re.match("(SQUEUE|SINFO)_", name)}
        result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise Unanswered(f"{words[0]} does not answer; is SLURM's controller up? (scontrol ping)") from None
    if result.returncode:
        raise Unanswered(f"{' '.join(words)}: {last_line(result.stderr) or f'exit code {result.returncode}'}")
    return result.stdout


def partitions() -> dict[str, Partition]:
    """All partitions by name."""
    found: dict[str, Partition] = {}
    # Exact: nodes of 64 and of 128 cores are two lines, and not one of "64+".
    for line in ask("sinfo", "--all", "--exact", "--noheader", "--format=%P|%l|%D|%c|%G").splitlines():
        name, limit, nodes, cores, gres = line.strip().split("|")
        gpus = sum(int(count) for count in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))
        cpus = int(cores)
        before = found.get(name.rstrip("*"), Partition("", 0, 0, 0, 0, False, 0))
        # A partition has a line for each kind of node; of those without GPUs a run on GPUs gets none.
        shares = [share for share in (before.cores_per_gpu, cpus // gpus if gpus else 0) if share]
        found[name.rstrip("*")] = Partition(
            name.rstrip("*"),
            hours_of(limit),
            before.nodes + int(nodes),
            max(before.cores, cpus),
            max(before.gpus, gpus),
            name.endswith("*"),
            min(shares, default=0),
        )
    return found


def max_array_size() -> int:
    """How many elements an array can have on this cluster."""
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"))
    return int(match[1]) if match else 1001  # SLURM's default


@contextlib.contextmanager
def outside_of_jobs(script: str) -> Iterator[None]:
    """Without the variables that sbatch would take for wishes of the new job, or prefer to what its script says.

    They are those of the job that this process may be in, and each ``SBATCH_NAME`` of a flag that the script sets.
    """
    # The configuration, the token and the cluster belong to the user, and to no job.
    inside = re.compile(r"SLURM(?!_(CONF|JWT|CLUSTERS)$)\w*|PMI\w*|SRUN_\w*")
    # An array and a log of errors only where the script wants them, which otherwise says nothing about them; and no wait for the end.
    flags = {"array", "error", "wait", *re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE)}
    said = {f"SBATCH_{name}" for flag in flags for name in _OTHER_NAMES.get(flag, [flag.upper().replace("-", "_")])}
    kept = {name: os.environ.pop(name) for name in list(os.environ) if inside.fullmatch(name) or name in said}
    try:
        yield
    finally:
        os.environ.update(kept)


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
        # The first one counts: later lines of the output repeat keys for each node.
        fields.setdefault(key, value)
    return fields


def jobs() -> dict[Path, str]:
    """The user's jobs, queued or running, by the run folder that each records in its comment.

    The comment of an array is a file with one folder per element, until an element says its own.
    """
    found: dict[Path, str] = {}
    # By number: the name may be missing in a container, and LOGNAME may be another's.
    words = ("squeue", "--all", "--noheader", f"--user={os.getuid()}", "--array", "--format=%i|%k")
    for line in ask(*words).splitlines():
        number, _, comment = line.strip().partition("|")
        folder = Path(comment)
        if folder.suffix == ELEMENTS and folder.is_file():
            # Until an element has started, it has the comment of the whole array.
            folder = Path(folder.read_text().splitlines()[int(number.rpartition("_")[2])])
        found[folder] = number
    return found


def job_on(folder: Path) -> str | None:
    """The user's job, queued or running, that trains in this folder."""
    return jobs().get(folder)


def hosts(nodelist: str) -> list[str]:
    """The node names of a list such as ``gpu[1-3,7]``."""
    return ask("scontrol", "show", "hostnames", nodelist).split()


def last_line(text: str) -> str:
    """The last line of an output that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def hold_signals() -> None:
    """Let signals wait until :func:`take_signals`, in this process and in what it executes.

    The imports of a batch step take seconds, in which a signal would end it, and nobody would requeue the job.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def take_signals(handler: Callable[[int, Any], None]) -> None:
    """Let a function take the signals, and SIGINT, from here on; those that wait come at once."""
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


_HOLD = (
    f"import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {tuple(map(int, STOP_SIGNALS))}); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
# By a Python that has nothing to import; with exec, signals to the batch script reach it and do not end a shell above it.
_HOLDING = shlex.join(["exec", sys.executable, "-S", "-c", _HOLD])


def executor(folder: Path, *, holds_signals: bool = False, **parameters: Any) -> Any:
    """A submitit executor that keeps its files in ``folder``; ``parameters`` are submitit's.

    With ``holds_signals`` a job's batch step is as after :func:`hold_signals` from its start on.
    """
    import submitit

    # submitit's constructor refuses a machine without srun, on which a script can be written all the same.
    kind = type("SlurmExecutor", (submitit.SlurmExecutor,), {"affinity": lambda _: 1})
    made = kind(folder, python=_HOLDING if holds_signals else None)
    made.update_parameters(**parameters)
    return made


def script(executor: Any, tasks: int) -> str:
    """The batch script that submitit would give to sbatch, an array where there are several tasks."""
    if tasks > 1:
        # What submitit sets itself when it submits several calls.
        executor.parameters["map_count"] = tasks
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def submit(executor: Any, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Submit calls of a function through a submitit executor, several as an array; gives submitit's jobs.

    Raises:
        SlurmError: sbatch refuses the job; its words are in the message.
    """
    from submitit.core.utils import FailedJobError

    try:
        # submitit prints what sbatch says, and raises it as well.
        with contextlib.redirect_stderr(io.StringIO()), outside_of_jobs(script(executor, 1)), executor.batch():
            return [executor.submit(function, *call) for call in calls]
    except FailedJobError as error:
        raise SlurmError(last_line(str(error)).replace("error: ", "")) from None
