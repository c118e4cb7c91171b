"""On a real SLURM a study is one array: nothing is submitted twice, what was lost is submitted again, and the end is compared."""

import contextlib
import re
import sqlite3
import subprocess
import sys
import time

import pytest

from tests.common import LIMIT, ROOT

STUDY = """\
name: tiny
config: {ROOT}/configs/quickstart.yaml
runs: {folder}
prepare: [{{makes: {folder}/data, run: cp -r {digits} {folder}/data}}]
set: {{data.shards: {folder}/data, model.exits: 2, train.epochs: 1, train.max_steps: 2, slurm.cpus_per_task: 1,
      slurm.array_parallelism: 1}}
axes:
  teacher: {{alone: {{loss.teachers: none}}, taught: {{loss.teachers: last}}}}
"""

PARENTS = """\
select runs.run_uuid, value from experiments join runs using (experiment_id)
left join tags on tags.run_uuid = runs.run_uuid and key = 'mlflow.parentRunId' where experiments.name = ?
"""


@pytest.fixture
def study(slurm, digits, tmp_path):
    """`study("--slurm")` runs dist-train study on a study of two cells, one of which waits for the other."""
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(ROOT=ROOT, folder=tmp_path, digits=digits))

    def run(*flags, **environment):
        words = [sys.executable, "-m", "dist_train", "study", path, *flags]
        environment = slurm.environment | {"PYTHONPATH": str(ROOT)} | environment
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)

    return run


def test_the_missing_cells_are_one_array_and_are_compared_when_all_have_ended(slurm, study, tmp_path):
    folder = tmp_path / "tiny"
    first = study("--slurm")
    assert first.returncode == 0, first.stderr
    array, *others = {job for job, _ in re.findall(r"submitted as job (\d+)_(\d)\n", first.stdout)}
    assert not others
    assert f"cancel      scancel {array}\n" in first.stdout

    # The second cell waits in the queue, where all that SLURM knows of it is its number in the array.
    slurm("scontrol", "hold", f"{array}_1")
    ours, held = (f"queued or running as job {array}_{element}" for element in (0, 1))
    shown = [line.rpartition("  ")[0].strip() for line in study("--show").stdout.splitlines()]
    assert shown in ([ours, held], ["finished", held])
    assert re.findall(r"seed 0: (.*)", study("--slurm").stdout) in ([ours, held], ["finished before", held])
    local = study()
    assert local.returncode == 2
    assert local.stderr.count("\n") == 1
    assert re.search(rf"cell \w+-seed0: job {array}_\d is training it; add --slurm", local.stderr)

    slurm("scancel", f"{array}_1")
    mended = study("--slurm")
    said = re.findall(r"seed 0: (.*)", mended.stdout)
    assert said[0] in (ours, "finished before")
    assert re.fullmatch(r"failed \(no output; see .*\); submitted as job \d+", said[1])
    deadline = time.monotonic() + LIMIT
    number = said[1].rpartition(" ")[2]
    while {f"{array}_0", number} & set(slurm("squeue", "-h", "-o", "%i").split()):
        assert time.monotonic() < deadline, [path.read_text() for path in (folder / "output").iterdir()]
        time.sleep(0.5)

    last = study("--slurm")
    assert last.returncode == 0, last.stderr
    assert re.findall(r"seed 0: (.*)", last.stdout) == ["finished before"] * 2
    assert len((folder / "comparison" / "accuracy.csv").read_text().splitlines()) == 1 + 2 * 2
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        parents = dict(store.execute(PARENTS, ("tiny",)))
    (comparison,) = [run for run, parent in parents.items() if parent is None]
    assert list(parents.values()).count(comparison) == 2 == len(parents) - 1


def test_without_slurm_nothing_is_begun(study, tmp_path):
    refused = study("--slurm", PATH="/nowhere")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "sbatch is not on this machine; leave out --slurm to train here" in refused.stderr
    assert not (tmp_path / "data").exists()
