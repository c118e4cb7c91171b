"""What tests share that is no fixture."""

import ast
import contextlib
import fcntl
import importlib
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from dist_train.config import Config, DataConfig, ModelConfig, NetworkConfig
from dist_train.data.pipeline import Loader
from dist_train.distributed.launcher import free_port
from shards.index import Index

ROOT = Path(__file__).parent.parent
LIMIT = 900
"""Seconds after which a process hangs, on however busy a machine."""

SMALL_MODEL = {
    "exits": 2,
    "base": 1,
    "step": 1,
    "scales": 2,
    "growth": 2,
    "initial_channels": 4,
    "head_width": 8,
    "growth_factors": [1, 2],
    "bottleneck_factors": [1, 2],
}
"""The section ``model`` of a network that trains thousands of images a second on one core."""


def network_config(**fields: Any) -> NetworkConfig:
    """The section ``model`` with these fields."""
    config: NetworkConfig = TypeAdapter(ModelConfig).validate_python(fields)
    return config


def train_all(configs: list[Config]) -> list[int]:
    """Trains these one after the other, for the fixture ``ranks``; the steps that they ended at."""
    from dist_train import train

    # One core each, as a launcher would pin them: one rank with two threads would sum in another order than two with one.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    return [train(config).progress.step for config in configs]


def cpu_loader(
    index: Index,
    folder: Path | str | Sequence[Path | str],
    data: DataConfig,
    *,
    train: bool,
    seed: int,
    global_batch: int,
    micro_batch: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """A loader on the CPU with one decoding thread; without more words the only rank, whose micro batch is the global one."""
    return Loader(
        index,
        folder,
        data,
        train=train,
        seed=seed,
        global_batch=global_batch,
        micro_batch=micro_batch or global_batch,
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        threads=1,
    )


def processes_of(config: Path) -> list[psutil.Process]:
    """The processes that have this file on their command line."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(config) in (p.info["cmdline"] or [])]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_digits(split: Path, count: int, folder: Path) -> None:
    """The first images of a split of digits as files, called by their number in it."""
    index = Index.load(split)
    tar = (split / index.shards[0].name).read_bytes()
    for number in range(count):
        start = int(index.offset[number])
        (folder / f"{number:02}.png").write_bytes(tar[start : start + int(index.size[number])])


def imported_by(source: str) -> set[str]:
    """The packages that a program imports, without those of Python itself."""
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    return imported - set(sys.stdlib_module_names)


def importable(library: str) -> bool:
    """Beside another build of torch, torchvision (and timm with it) is installed, but raises RuntimeError."""
    try:
        importlib.import_module(library)
    except (ImportError, RuntimeError):
        return False
    return True


def on_a_terminal(width: int, *arguments: object) -> list[str]:
    """What a program shows on a terminal of so many columns: its lines, each as it was at some time."""
    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", "PYTHONUTF8": "1"}
    environment.pop("COLUMNS", None)  # it would count more than the terminal
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdin=end, stdout=end, stderr=end, env=environment
    )
    os.close(end)
    data = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:
            break
        if not chunk:
            break
        data += chunk
    os.close(main)
    assert process.wait(timeout=LIMIT) == 0, data.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\r", data.decode())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


class MLflowServer:
    """`mlflow server` on loopback over one SQLite file; may be started again after it was killed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        words += ["--default-artifact-root", f"{self.folder}/artifacts"]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(words, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)
        while True:
            assert self.process.poll() is None
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.2)

    def signal(self, number: int) -> None:
        """Send a signal to the server and its workers."""
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which ``shards`` refuses these arguments."""
    from shards.__main__ import main

    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == len(printed.err.splitlines()) == 1
    return printed.err


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image as a file of this kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
