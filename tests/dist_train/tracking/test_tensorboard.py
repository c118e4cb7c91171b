"""`dist-train tensorboard`: what metrics.jsonl has, TensorBoard has; without tensorboard the line says what to install."""

import sys

import pytest

from dist_train.tracking.metrics import MetricsFile, read_metrics


def write(folder, *steps):
    folder.mkdir(parents=True, exist_ok=True)
    file = MetricsFile(folder / "metrics.jsonl")
    for step in steps:
        file.add(step, step, {"train/loss": 2.0 - step / 8, "val/exit1/top1": step / 16, "train/x": float("nan")})
    file.flush()


def test_event_files_have_every_point_once_also_when_written_again(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from dist_train import cli

    folder = tmp_path / "runs" / "a"
    write(folder, 1, 2)
    assert cli.run(["tensorboard", str(folder)]) == 0
    write(folder, 3)
    assert cli.run(["tensorboard", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{folder}/tensorboard: 6 points of 2 metrics",
        f"tensorboard --logdir {folder.parent}",
    ]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    lines = read_metrics(folder / "metrics.jsonl")
    for name in ("train/loss", "val/exit1/top1"):
        found = [(point.step, point.value, point.wall_time) for point in events.Scalars(name)]
        assert found == [(one["step"], one["metrics"][name], pytest.approx(one["t"] / 1000)) for one in lines]


def test_what_cannot_be_written_is_one_line(tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert "pip install dist-train[tensorboard]" in refused("tensorboard", tmp_path)
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    assert "metrics.jsonl: cannot be read" in refused("tensorboard", tmp_path / "nothing")
