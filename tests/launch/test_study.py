"""A study that is killed goes on where it was, and gives what an undisturbed one gives."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_train import cli
from dist_train.compare.grouping import compare
from dist_train.compare.runs import read_store
from dist_train.config_file import dump_config, load_config
from dist_train.errors import STOPPED, DataError
from dist_train.training import checkpoint
from dist_train.training.checkpoint import Checkpoint, CheckpointMeta, Progress
from launch.grid import config_of
from launch.study import cells, complete, load_study
from tests.common import LIMIT, ROOT

STUDY = """\
name: tiny
config: {config}
runs: {runs}
set: {{data.shards: {shards}, model.exits: 2, train.global_batch: 32, train.micro_batch: 32, train.epochs: 1,
      train.max_steps: 30, checkpoint.every_steps: 4, checkpoint.every_epochs: null, tracking.log_every: 2}}
axes:
  teacher: {{alone: {{loss.teachers: none}}, taught: {{loss.teachers: last}}}}
seeds: [3]
"""


@pytest.fixture
def study_file(digits, tmp_path, request):
    """`study_file(runs, old="", new="")` writes the tiny study with one text replaced; gives its path."""
    config = request.config.rootpath / "configs" / "quickstart.yaml"

    def write(runs, old="", new=""):
        path = tmp_path / f"{runs}.yaml"
        path.write_text(STUDY.format(config=config, runs=tmp_path / runs, shards=digits).replace(old, new))
        return path

    return write


def start(path, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "dist_train", "study", path],
        **options,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output = process.communicate(timeout=LIMIT)[0]
    return process.returncode, output


def test_a_killed_study_goes_on_and_trains_no_finished_cell_again(study_file, tmp_path):
    path = study_file("killed")
    folder = tmp_path / "killed" / "tiny"
    process = start(path)
    while not list((folder / "taught-seed3" / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    # As when the machine goes down: the study, its launcher and the training processes, at once.
    for pid in descendants(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    # A report that somebody has asked for in the middle does not make the run finished.
    (folder / "taught-seed3" / "report.json").write_text((folder / "alone-seed3" / "report.json").read_text())
    first = {file: file.stat().st_mtime_ns for file in (folder / "alone-seed3").rglob("*") if file.is_file()}

    status, output = finish(start(path))
    assert status == 0, output
    assert "[1/2] alone, seed 3: finished before" in output
    assert "resumed from" in (folder / "output" / "taught-seed3.txt").read_text()
    # Its place in MLflow is not part of the run folder's files, so none of them has been touched.
    assert first == {file: file.stat().st_mtime_ns for file in first}

    undisturbed = study_file("whole")
    shutil.copytree(folder / "alone-seed3", tmp_path / "whole" / "tiny" / "alone-seed3")
    status, output = finish(start(undisturbed))
    assert status == 0, output
    left, right = (tmp_path / runs / "tiny" / "comparison" / "accuracy.csv" for runs in ("killed", "whole"))
    assert left.read_text() == right.read_text()
    assert len(left.read_text().splitlines()) == 1 + 2 * 2
    # In the store of all runs, where `compare --experiment` looks, with the variants' names.
    assert not (folder / "mlflow.db").exists()
    tracked = compare(read_store(f"sqlite:///{tmp_path / 'killed' / 'mlflow.db'}", "tiny", ""))
    assert sorted(group.label for group in tracked.groups) == ["alone", "taught"]


def descendants(pid):
    import psutil

    root = psutil.Process(pid)
    return [root.pid, *(child.pid for child in root.children(recursive=True))]


def test_a_failed_cell_is_said_and_the_others_are_compared(study_file, tmp_path):
    bad = "{loss.teachers: last, data.train: nowhere}"
    path = study_file("failed", "{loss.teachers: last}", bad)
    finished_cell(path)
    status, output = finish(start(path))
    assert status == 1, output
    assert "alone, seed 3: finished before" in output
    assert "taught, seed 3: failed (launch.local: " in output
    assert "note: taught, seed 3: missing" in output
    assert (tmp_path / "failed" / "tiny" / "comparison" / "comparison.html").exists()


def finished_cell(path, *overrides):
    """Leave the first cell of a study as its training would have, with other settings where some are given."""
    study = load_study(path)
    config = load_config(study.config, *cells(study)[0].overrides, *overrides)
    config.folder.mkdir(parents=True)
    (config.folder / "config.yaml").write_text(dump_config(config))
    row = {"exit": 1, "multiply_adds": 10**6, "parameters": 1000, "top1": 0.5, "top5": 1.0, "loss": 0.5}
    report = {"format": 1, "step": 30, "images": 360, "unreadable": 0, "exits": [row]}
    (config.folder / "report.json").write_text(json.dumps(report))
    meta = CheckpointMeta(Progress(step=30, batch=30), 2, ["0", "1"], "", {}, finished=True)
    checkpoint.write(config.folder / "checkpoints", Checkpoint(meta, config, {}, {}))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seeds:", "seedz:", "unknown key 'seedz'; did you mean seeds?"),
        ("teachers: none", "teachers: lats", "cell alone-seed3: loss.teachers is"),
        (
            "loss.teachers: none",
            "loss.teacher: none",
            "cell alone-seed3: unknown key 'loss.teacher'; did you mean loss.teachers?",
        ),
        ("alone:", "'taught!':", "2 cells would be called taught-seed3"),
        ("[3]", "[]", "seeds is"),
        ("[3]", "[3, 5, 3]", "seeds: 3 is given twice; give each seed once"),
        ("seeds:", "baseline: labels\nseeds:", "baseline is 'labels'; it is one of the axes: teacher"),
        (
            "seeds: [3]",
            "  seed: [0, 1]",
            "seed is given in axes or set, but the study sets it itself: list the seeds under",
        ),
        ("{data.shards", "{tracking: {group: g}, data.shards", "tracking.group is given in axes or set"),
        ("seeds:", "prepare: [{makes: x, run: ''}]\nseeds:", "prepare: run is empty; give a command line"),
        ("seeds:", "prepare: [{makes: x, run: 'a \"b'}]\nseeds:", "is no command line (No closing quotation)"),
    ],
)
def test_a_wrong_study_is_one_line_before_anything_starts(study_file, tmp_path, capsys, old, new, expected):
    assert cli.run(["study", str(study_file("wrong", old, new))]) == 2
    errors = capsys.readouterr().err
    assert expected in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "wrong").exists()


def test_a_command_that_cannot_be_started_is_one_line(study_file, capsys):
    path = study_file("prepared", "seeds:", "prepare: [{makes: nowhere, run: pyhton -m shards}]\nseeds:")
    assert cli.run(["study", str(path)]) == 2
    errors = capsys.readouterr().err
    assert "nowhere: `pyhton -m shards` cannot be started (No such file or directory)" in errors
    assert errors.count("\n") == 1


def test_names_of_variants_are_taken_as_they_are_written(study_file):
    variants = "{'run #1': {}, 'try: 1': {}, '12': {}, 'naïve 🙂': {}}"
    study = load_study(study_file("words", "{alone: {loss.teachers: none}, taught: {loss.teachers: last}}", variants))
    groups = [config_of(study, cell).tracking.group for cell in cells(study)]
    assert groups == ["run #1", "try: 1", "teacher 12", "naïve 🙂"]


def test_variants_in_other_letters_are_called_by_their_numbers(study_file):
    variants = "{'ένα': {loss.teachers: none}, two: {}, 'три': {loss.teachers: last}}"
    path = study_file("letters", "{alone: {loss.teachers: none}, taught: {loss.teachers: last}}", variants)
    assert [cell.name for cell in cells(load_study(path))] == ["1-seed3", "two-seed3", "3-seed3"]


def test_an_empty_variable_of_mlflow_is_as_none(study_file, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    study = load_study(study_file("stored"))
    assert config_of(study, cells(study)[0]).tracking.uri == f"sqlite:///{tmp_path / 'stored' / 'mlflow.db'}"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EWOULDBLOCK])
def test_only_a_lock_that_another_holds_means_that_the_study_is_running(study_file, monkeypatch, caplog, code):
    def flock(*_):
        raise OSError(code, "no")

    monkeypatch.setattr("fcntl.flock", flock)
    study = load_study(study_file("locked"))
    monkeypatch.setattr("launch.study.Trainings.all", lambda *_: STOPPED)
    if code == errno.ENOSYS:
        assert complete(study, cells(study), on_slurm=False, command="") == STOPPED
        assert "this file system has no locks (no)" in caplog.text
    else:
        with pytest.raises(DataError, match="running already"):
            complete(study, cells(study), on_slurm=False, command="")


def test_a_study_folder_that_cannot_be_written_is_one_line(study_file, tmp_path, capsys):
    path = study_file("file")
    (tmp_path / "file").write_text("")
    assert cli.run(["study", str(path)]) == 2
    errors = capsys.readouterr().err
    assert "tiny: cannot be written (Not a directory); free space, or set another runs" in errors
    assert errors.count("\n") == 1


def test_a_section_as_a_whole_leaves_its_other_fields_as_they_are(study_file):
    path = study_file("whole", "train.max_steps: 30,", "train: {max_steps: 30, global_batch: 96},")
    path.write_text(path.read_text().replace("{loss.teachers: last}", "{train: {epochs: 3}, loss.teachers: last}"))
    study = load_study(path)
    before, alone, taught = (load_config(study.config), *(config_of(study, cell) for cell in cells(study)))
    for config, epochs in ((alone, 1), (taught, 3)):
        given = {"max_steps": 30, "global_batch": 96, "epochs": epochs}
        assert config.train == before.train.model_copy(update=given)
    assert load_config(study.config, "--train", "{epochs: 3}").train.micro_batch == before.train.micro_batch


def test_a_study_asked_to_stop_lets_its_run_save(study_file, tmp_path):
    # Its step takes longer than the study takes between two looks at it, in which the request must not be repeated.
    path = study_file("slow", "model.exits: 2", 'model: {name: "slow:network", exits: [body]}')
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "SLOW": "7"}
    process = start(path, env=environment)
    output = tmp_path / "slow" / "tiny" / "output" / "alone-seed3.txt"
    # The line before the first step.
    while not (output.exists() and "global batch" in output.read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    status, said = finish(process)
    assert status == 75, said
    assert re.search(r"stopped by SIGTERM at step \d, saved", output.read_text()), output.read_text()
    assert "exits with return code" not in output.read_text()


def test_a_cell_trained_with_other_settings_is_refused(study_file, capsys):
    path = study_file("other")
    finished_cell(path, "--optim.lr", "0.3")
    assert cli.run(["study", str(path)]) == 2
    assert (
        "cell alone-seed3 was trained with optim.lr 0.3, not 0.1; give the study another name"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "number"),
    [("digits", 18), ("cifar10_laptop", 10), ("cifar10_small", 60), ("cifar10", 60), ("imagenet", 7)],
)
def test_shipped_studies_have_valid_cells(request, name, number):
    study = load_study(request.config.rootpath / "configs" / f"study_{name}.yaml")
    assert len({cell.name for cell in cells(study)}) == number


def test_axes_multiply_and_values_are_named_after_their_field(study_file):
    path = study_file("grid", "seeds: [3]", "  optim.lr: [0.1, 0.02]\nseeds: [0, 1]")
    grid = cells(load_study(path))
    assert len({cell.name for cell in grid}) == 8
    assert [(cell.label, cell.base, cell.seed) for cell in grid[2:4]] == [
        ("alone, lr 0.02", "alone, lr 0.1", 0),
        ("alone, lr 0.02", "alone, lr 0.1", 1),
    ]
