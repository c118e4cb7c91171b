"""The commands and the Python of the documents run, where a block is marked with `run`.

Training commands get the overrides in TINY.  The blocks of a document run in order, in one process and namespace.
"""

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train import cli
from tests.common import LIMIT, ROOT
from tests.documents import DOCUMENTS, blocks

TINY = [
    "--train.epochs",
    "1",
    "--train.max_steps",
    "2",
    "--train.global_batch",
    "4",
    "--train.micro_batch",
    "2",
    "--train.precision",
    "fp32",
    "--tracking.uri",
    "off",
]


def steps(document):
    """What the blocks marked `run` do, one after the other: command lines, and Python."""
    for block in blocks(document):
        if block.test == "run" and block.language == "python":
            yield ["python", block.text]
        elif block.test == "run":
            yield from block.commands


def run_steps(steps):
    """Run them in this process, which has been started for it; what launches processes is started as such."""
    space = {"__name__": "docs"}
    # One core: two threads that wait for each other by spinning take minutes where other tests share the cores.
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    for step in steps:
        print("$", shlex.join(step) if step[0] != "python" or step[1] == "-m" else f"python:\n{step[1]}", flush=True)
        if step[:2] == ["python", "-m"]:
            program, *words = step[2:]
        elif step[0] == "python":
            exec(compile(step[1], "block", "exec"), space)
            continue
        else:
            program, *words = step
        if words[:2] == ["launch", "local"]:
            program, words = "launch.local", words[2:]
        trains = program == "launch.local" or words[:1] in (["train"], ["plan"])
        words += TINY if trains and "--help" not in words else []
        sys.argv = [program, *words]
        if program in ("dist-train", "dist_train", "shards"):
            main = cli.run if program != "shards" else importlib.import_module("shards.__main__").main
            try:
                code = main(words)
            except SystemExit as end:  # --help
                code = end.code
        elif program == "cp":
            code = shutil.copy(*words) is None
        elif program == "launch.local":
            os.sched_setaffinity(0, cores)
            code = subprocess.run([sys.executable, "-m", program, *words]).returncode
            os.sched_setaffinity(0, {max(cores)})
        else:
            raise AssertionError(f"{program}: how to run it is not written here; mark the block with parse")
        assert not code, f"{shlex.join(step)}: exit code {code}"


@pytest.fixture
def place(digits, tmp_path):
    """A folder in which the commands of the documents run."""
    import numpy as np
    from PIL import Image

    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    generator = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        folder = tmp_path / "PHOTOS" / name
        folder.mkdir(parents=True)
        for number in range(24):
            pixels = generator.integers(0, 128, (40, 36, 3)) + 100 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if any(steps(name))])
def test_blocks_run(document, place):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, str(Path(__file__)), json.dumps(list(steps(document)))],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    assert result.returncode == 0, result.stdout


if __name__ == "__main__":
    run_steps(json.loads(sys.argv[1]))
