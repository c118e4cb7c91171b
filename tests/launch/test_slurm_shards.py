"""On a real SLURM the tasks of an array write the bytes that one process writes, whatever is killed or requeued meanwhile."""

import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.common import LIMIT, ROOT


@pytest.fixture
def source(tmp_path):
    """Two classes of 20 images, and a file that is none."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "source" / name).mkdir(parents=True)
        for number in range(20):
            Image.fromarray(random.integers(0, 255, (300, 400, 3)).astype(np.uint8)).save(
                tmp_path / "source" / name / f"{number}.png"
            )
    (tmp_path / "source" / "cat" / "text.jpg").write_text("no image")
    return tmp_path / "source"


@pytest.fixture
def make(slurm, source, tmp_path):
    """`make("out", "--slurm", "2")` starts the command, with its output in the same process's pipes."""
    started = []

    def start(out, *flags, **environment):
        words = [sys.executable, "-m", "shards", "make", "folder", source, tmp_path / out, "--shard-size", "2"]
        process = subprocess.Popen(
            [*words, "--val-per-class", "4", "--max-size", "200", *flags],
            cwd=ROOT,
            env=slurm.environment | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait(done):
    deadline = time.monotonic() + LIMIT
    while not (result := done()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return result


def test_an_array_writes_the_same_bytes_although_all_of_it_is_interrupted(slurm, make, tmp_path):
    local = make("local", "--workers", "1")
    killed = make("out", "--slurm", "3", "--workers", "1", "--sbatch", "hold")
    line = killed.stderr.readline()
    array = re.match(r"job (\d+): 3 tasks write 21 shards, .*; cancel: scancel \1\n", line)[1]
    killed.kill()
    refused = make("out")
    assert f"job {array}_" in refused.communicate(timeout=LIMIT)[1]
    assert refused.returncode == 2

    again = make("out", "--slurm", "2", "--workers", "1")
    slurm("scancel", f"{array}_2")  # the shards of that task are left to the command
    slurm("scontrol", "release", array)
    wait(lambda: slurm.job(f"{array}_0").get("JobState") == "RUNNING")
    slurm("scontrol", "requeue", f"{array}_0")
    out, errors = again.communicate(timeout=LIMIT)
    assert again.returncode == 0, errors
    assert slurm.job(f"{array}_0")["Restarts"] == "1"
    assert re.search(r"^job \d+: 2 tasks write 7 shards", errors, re.MULTILINE)
    said = local.communicate(timeout=LIMIT)[0]
    assert out.splitlines()[:-1] == said.replace(str(tmp_path / "local"), str(tmp_path / "out")).splitlines()[:-1]
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


def test_what_tasks_failed_to_do_is_one_line_and_the_same_command_goes_on(slurm, make, source, tmp_path):
    first = make("out", "--slurm", "2", "--sbatch", "hold")
    array = re.match(r"job (\d+): 2 tasks", first.stderr.readline())[1]
    # As where the nodes do not have the folder.
    (drafts,) = (path.parent for path in (tmp_path / "out" / ".making").glob("*/slurm"))
    shutil.rmtree(drafts / "train")
    slurm("scontrol", "release", array)
    _, errors = first.communicate(timeout=LIMIT)
    assert first.returncode == 2
    assert re.fullmatch(
        rf"shards: 2 of 2 tasks did not finish, the first is job {array}_0 \(shards: .*No such file or directory.*\); "
        rf"see {drafts}/slurm/{array}_0_0_log.out, and run the same command again to resume\n",
        errors.splitlines(keepends=True)[-1],
    )
    # As where a node has not mounted the source, here for an array whose command was killed.
    killed = make("out", "--slurm", "2", "--sbatch", "hold")
    array, shards = re.match(r"job (\d+): 2 tasks write (\d+) shards", killed.stderr.readline()).groups()
    killed.kill()
    os.rename(source / "cat" / "1.png", tmp_path / "1.png")
    slurm("scontrol", "release", array)
    wait(lambda: f"{array}_" not in slurm("squeue", "--array", "-h", "-o", "%i"))
    os.rename(tmp_path / "1.png", source / "cat" / "1.png")
    # The task that did not see an image ends there; its shards before that one, and those of the other task, are finished.
    missing = int(shards) - len(list((tmp_path / "out" / ".making").glob("*/*/shard-*.json")))
    assert 1 <= missing < int(shards)
    last = make("out", "--slurm", "2")
    output, errors = last.communicate(timeout=LIMIT)
    assert last.returncode == 0, errors
    assert f" tasks write {missing} shards" in errors
    assert "1 skipped, see manifest.json (cat/text.jpg: not an image" in output
    assert sorted(os.listdir(tmp_path / "out")) == ["train", "val"]


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        (["--slurm", "2"], {"PATH": "/nowhere"}, "sbatch is not on this machine; leave out --slurm to make the shards"),
        (["--slurm", "2", "--sbatch", "partition=fast"], {}, "sbatch: .*Invalid partition name"),
        (["--slurm", "2"], {"SBATCH_PARTITION": "fast"}, "sbatch: .*Invalid partition name"),
        (["--slurm", "2", "--sbatch", "p=fast"], {}, "--sbatch p=fast: write a long flag of sbatch"),
        (["--slurm", "2", "--sbatch", "array=7"], {}, "--sbatch array=7: .* none of array"),
        (["--sbatch", "partition=keep"], {}, "give --slurm N as well"),
    ],
)
def test_what_cannot_be_submitted_is_one_line_and_leaves_nothing(make, tmp_path, flags, environment, said):
    refused = make("out", *flags, **environment)
    _, errors = refused.communicate(timeout=LIMIT)
    assert refused.returncode == 2
    assert errors.count("\n") == 1
    assert re.search(said, errors)
    assert not (tmp_path / "out").exists()
