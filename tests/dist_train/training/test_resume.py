"""Training as a whole, in real processes: resumed is uninterrupted, bit for bit, however it ended."""

import contextlib
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
import torch
from safetensors.torch import load_file

from dist_train import plan
from dist_train.config_file import make_config
from dist_train.data.passes import epoch_order
from dist_train.distributed.group import Ranks
from dist_train.errors import UserError
from dist_train.tracking.metrics import read_metrics
from dist_train.training.preflight import check_processes
from dist_train.training.resume import has_ended
from shards import quarantine
from shards.index import Index
from tests.common import LIMIT, ROOT, SMALL_MODEL, train_all


def settings(digits, runs, name, zero=1, precision="fp32", **train):
    return make_config(
        {
            "name": name,
            "runs": str(runs),
            "data": {"shards": str(digits), "flip": False},
            "model": SMALL_MODEL,
            "optim": {"lr": 0.05, "ema_decay": 0.9, "warmup_epochs": 0.02},
            "train": {
                "global_batch": 16,
                "micro_batch": 8,
                "zero_stage": zero,
                "precision": precision,
                "epochs": 1,
                **train,
            },
            "checkpoint": {"every_steps": 4, "keep": 10},
            "tracking": {"log_every": 3, "uri": "off"},
        }
    )


def state_at(folder, step):
    """Every tensor of a checkpoint, and its position."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    tensors = {
        f"{file.stem}:{name}": tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    state = json.loads((path / "state.json").read_text())
    return tensors, (state["progress"]["batch"], state["loss"], state["averages_updates"], state["loss_scale"])


def training_lines(folder):
    """What was logged of training, without what depends on the clock."""
    entries = [entry for entry in read_metrics(folder / "metrics.jsonl") if "train/loss" in entry["metrics"]]
    return [
        (e["step"], e["batch"], {k: v for k, v in e["metrics"].items() if not k.startswith(("speed/", "memory/"))})
        for e in entries
    ]


def assert_same_state(left, right):
    assert left[1] == right[1]
    assert left[0].keys() == right[0].keys()
    different = [name for name in left[0] if not torch.equal(left[0][name], right[0][name])]
    assert not different


CASES = [(zero, precision) for zero in range(4) for precision in ("fp32", "bf16")] + [(1, "fp16"), (3, "fp16")]


def test_resumed_is_uninterrupted_bit_for_bit_at_every_stage_and_precision(ranks, digits, tmp_path):
    def configs(prefix, steps):
        return [settings(digits, tmp_path, f"{prefix}-{z}-{p}", z, p, max_steps=steps) for z, p in CASES]

    ranks(train_all, 2, configs("whole", 10))
    ranks(train_all, 2, configs("cut", 6))
    for config in configs("cut", 6):  # as if it had been killed after step 6, two steps after its last checkpoint
        shutil.rmtree(config.folder / "checkpoints" / "step-00000006")
    ranks(train_all, 2, configs("cut", 10))
    for zero, precision in CASES:
        whole, cut = tmp_path / f"whole-{zero}-{precision}", tmp_path / f"cut-{zero}-{precision}"
        assert_same_state(state_at(whole, 10), state_at(cut, 10))
        assert training_lines(whole) == training_lines(cut)
        # Of every third step, and of the last one.
        assert [line[0] for line in training_lines(whole)] == [3, 6, 9, 10]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resumed_with_another_number_of_ranks_goes_on_the_same_way(ranks, digits, tmp_path, before, after):
    ranks(train_all, before, [settings(digits, tmp_path, "whole", max_steps=9)])
    ranks(train_all, before, [settings(digits, tmp_path, "moved", max_steps=3)])
    ranks(train_all, after, [settings(digits, tmp_path, "moved", max_steps=9)])
    whole, moved = training_lines(tmp_path / "whole"), training_lines(tmp_path / "moved")
    # The same images in the same micro batches: only the order in which gradients are added differs.
    assert [line[:2] for line in whole] == [line[:2] for line in moved] == [(3, 3), (6, 6), (9, 9)]
    for expected, got in zip(whole, moved):
        assert got[2] == pytest.approx(expected[2], rel=1e-3)


def launch(config, tmp_path, *overrides):
    from dist_train.config_file import dump_config

    path = tmp_path / f"{config.name}.yaml"
    path.write_text(dump_config(config))
    words = [sys.executable, "-m", "launch.local", "-n", "2", str(path), *overrides]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(folder, step, process):
    while process.poll() is None:
        if (folder / "metrics.jsonl").exists() and (lines := training_lines(folder)) and lines[-1][0] >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"the run ended before step {step}: {process.stdout.read()}")


def processes_of(config):
    import psutil

    return [p for p in psutil.process_iter(["cmdline"]) if f"{config.name}.yaml" in " ".join(p.info["cmdline"] or [])]


def test_killed_and_stopped_runs_end_as_the_uninterrupted_one(digits, tmp_path):
    length = {"epochs": 2, "global_batch": 32, "micro_batch": 16}
    whole, killed, stopped = (
        settings(digits, tmp_path, name, precision="bf16", **length) for name in ("whole", "killed", "stopped")
    )
    process = launch(whole, tmp_path)
    output = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 0, output
    assert "multiply-adds" in output

    process = launch(killed, tmp_path)
    wait_for_step(killed.folder, 18, process)
    for rank in processes_of(killed):
        rank.send_signal(signal.SIGKILL)
    process.communicate(timeout=LIMIT)
    assert not (killed.folder / "report.json").exists()
    process = launch(killed, tmp_path)
    assert "resumed from" in process.communicate(timeout=LIMIT)[0]

    process = launch(stopped, tmp_path)
    wait_for_step(stopped.folder, 12, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 75, output
    assert "run the same command again to resume" in output
    assert not processes_of(stopped), "processes were left behind"
    process = launch(stopped, tmp_path)
    process.communicate(timeout=LIMIT)

    steps = 2 * (1437 // 32)
    for other in (killed, stopped):
        assert_same_state(state_at(whole.folder, steps), state_at(other.folder, steps))
        assert training_lines(whole.folder) == training_lines(other.folder)
        report, expected = (json.loads((run.folder / "report.json").read_text()) for run in (other, whole))
        assert report == expected
        assert report["images"] == 360


def trained_on(*folders):
    """What each rank says of a training on shards of its own."""
    from dist_train import train
    from dist_train.errors import UserError

    rank = int(os.environ.get("RANK", 0))
    try:
        return train(settings(folders[rank], folders[-1], "apart", max_steps=2)).progress.step
    except UserError as error:
        return str(error)


def test_ranks_whose_shards_are_not_the_same_are_refused(ranks, digits, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(digits, copy)
    assert ranks(trained_on, 2, digits, copy, tmp_path / "runs") == [2, 2]
    index = Index.load(copy / "train")
    quarantine.write(copy / "train", index.fingerprint, [quarantine.Bad(5, index.key[5].decode(), "damaged")])
    for said in ranks(trained_on, 2, digits, copy, tmp_path / "other"):
        assert "train has 1437 images for rank 0 on " in said
        assert ", and 1436 or others for rank 1 on " in said


def test_a_run_that_ends_elsewhere_than_before_gets_the_report_of_its_end(ranks, digits, tmp_path):
    def epochs(number, **fields):
        config = settings(digits, tmp_path, "ends", global_batch=360, micro_batch=360, epochs=number)  # 3 steps each
        saved = config.checkpoint.model_copy(update={"every_steps": None, "every_epochs": 1})
        return config.model_copy(update={"checkpoint": saved, **fields})

    ranks(train_all, 1, [epochs(3)])
    folder = epochs(3).folder
    shutil.rmtree(folder / "checkpoints" / "step-00000009")  # as a start left it that was killed before the end
    assert ranks(train_all, 1, [epochs(2)]) == [[6]]
    report = json.loads((folder / "report.json").read_text())
    (line,) = [
        one for one in read_metrics(folder / "metrics.jsonl") if "val/mean_top1" in one["metrics"] and one["step"] == 6
    ]
    assert report["step"] == 6
    assert [one["top1"] for one in report["exits"]] == [line["metrics"][f"val/exit{m}/top1"] for m in (1, 2)]
    # One that cannot be read is made anew.
    (folder / "report.json").write_text("{")
    assert ranks(train_all, 1, [epochs(2)]) == [[6]]
    assert json.loads((folder / "report.json").read_text())["exits"] == report["exits"]
    # A run that would train on has not ended, and its teachers are checked.
    assert [has_ended(epochs(number), 3) for number in (1, 2, 5)] == [True, True, False]
    taught = epochs(5).loss.model_copy(update={"outside_teachers": (str(tmp_path / "absent"),)})
    with pytest.raises(UserError, match="absent"):
        check_processes(epochs(5, loss=taught), Ranks(0, 1, 0, 1))


@pytest.mark.parametrize("steps", [4, 5])  # with the last checkpoint written before the evaluation, and after it
def test_the_same_command_after_the_end_changes_nothing(ranks, digits, tmp_path, steps):
    config = settings(digits, tmp_path, "twice", max_steps=steps)
    ranks(train_all, 1, [config])
    before = {path: path.read_bytes() for path in (config.folder / "checkpoints").rglob("*") if path.is_file()}
    assert ranks(train_all, 1, [config]) == [[steps]]
    assert {path: path.read_bytes() for path in before} == before
    report = (config.folder / "report.json").read_bytes()
    (config.folder / "report.json").unlink()  # as when it was killed just before it wrote it
    assert ranks(train_all, 1, [config]) == [[steps]]
    assert (config.folder / "report.json").read_bytes() == report
    lines = read_metrics(config.folder / "metrics.jsonl")
    assert [line["batch"] for line in lines if "val/mean_top1" in line["metrics"]] == [steps]
    assert ", finished (" in str(plan(config))
    longer = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": steps + 1})})
    assert ", resumes from " in str(plan(longer))


def test_updates_that_are_not_finite_are_refused_and_end_the_run_with_its_checkpoint_whole(digits, tmp_path, command):
    from dist_train.config_file import dump_config
    from dist_train.training import checkpoint

    config = settings(digits, tmp_path, "diverged", max_steps=40)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert command("dist_train", "train", path, "--train.max_steps", 4).returncode == 0
    result = command("dist_train", "train", path, "--optim.lr", "1e30", "--faults.max_nonfinite", 3)
    assert result.returncode == 2
    assert result.stdout.count("the loss of rank 0 is not finite") == 3
    assert "3 steps in a row had a gradient that is not finite" in result.stderr
    weights = load_file(checkpoint.newest(config.folder / "checkpoints") / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_mlflow_has_what_the_metrics_file_has_in_one_run_across_a_resume(ranks, digits, tmp_path):
    from mlflow.tracking import MlflowClient

    def tracked(steps):
        config = settings(digits, tmp_path, "tracked", max_steps=steps)
        return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": None})})

    ranks(train_all, 1, [tracked(4)])
    ranks(train_all, 1, [tracked(8)])
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("dist_train").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert runs[0].data.params["loss.teachers"] == "last"
    expected = {}
    for entry in read_metrics(tmp_path / "tracked" / "metrics.jsonl"):
        for name, value in entry["metrics"].items():
            expected.setdefault(name, set()).add((entry["step"], entry["t"], value))
    assert len(expected) > 15
    for name, points in expected.items():
        history = {(m.step, m.timestamp, m.value) for m in client.get_metric_history(runs[0].info.run_id, name)}
        assert history == points, name
    artifacts = {artifact.path for artifact in client.list_artifacts(runs[0].info.run_id)}
    assert {"config.yaml", "report.json"} <= artifacts


def damage(shards, samples):
    """Overwrite the middle of these training images."""
    index = Index.load(shards / "train")
    for sample in samples:
        with (shards / "train" / index.shards[index.shard[sample]].name).open("r+b") as tar:
            tar.seek(int(index.offset[sample]) + int(index.size[sample]) // 2)
            tar.write(bytes(40))


def test_unreadable_images_count_once_for_all_ranks_and_starts(ranks, digits, tmp_path):
    shards = Path(shutil.copytree(digits, tmp_path / "shards"))

    def config(name, steps):
        settled = settings(shards, tmp_path, name, max_steps=steps)
        return settled.model_copy(update={"data": settled.data.model_copy(update={"verify": "size"})})

    whole = config("whole", 9)
    order = epoch_order(Index.load(shards / "train").shard_sizes, whole.seed, 0, whole.data.shuffle_shards)
    # The last image of rank 0 in the first global batch, and what replaces it, the first of rank 1; one of the second batch.
    damage(shards, order[[7, 8, 20]])
    ranks(train_all, 2, [whole])
    ranks(train_all, 2, [config("cut", 3)])
    ranks(train_all, 2, [config("cut", 9)])
    lines = training_lines(tmp_path / "whole")
    assert [metrics["train/unreadable_images"] for _, _, metrics in lines] == [3, 3, 3]
    assert training_lines(tmp_path / "cut") == lines


def test_an_unreadable_image_is_named_and_replaced_or_ends_the_run_as_configured(digits, tmp_path, command):
    from dist_train.config_file import dump_config

    shards = Path(shutil.copytree(digits, tmp_path / "shards"))
    damage(shards, [7])
    config = settings(shards, tmp_path, "unreadable", epochs=2, global_batch=32, micro_batch=16)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    key = Index.load(shards / "train").key[7].decode()
    words = ["launch.local", "-n", 2, path, "--data.verify", "size"]
    result = command(*words)
    assert result.returncode == 0, result.stdout + result.stderr
    logs = "".join(file.read_text() for file in (config.folder / "log").iterdir())
    assert key in logs
    assert "shard-000000.tar" in logs
    assert read_metrics(config.folder / "metrics.jsonl")[-2]["metrics"]["train/unreadable_images"] == 1
    refused = command(*words, "--data.max_unreadable", 0, "--name", "strict")
    assert refused.returncode == 2
    assert key in refused.stderr + refused.stdout


def test_a_terminal_gets_a_live_line_with_the_time_left_and_the_table_at_the_end(digits, tmp_path):
    import pty

    from dist_train.config_file import dump_config

    config = settings(digits, tmp_path, "terminal", max_steps=6)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    terminal, end = pty.openpty()
    words = [sys.executable, "-m", "dist_train", "train", str(path)]
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=end, stderr=end, env=os.environ | {"COLUMNS": "200", "TERM": "xterm"}
    )
    os.close(end)
    output = b""
    with contextlib.suppress(OSError):  # the end of a terminal's output
        while block := os.read(terminal, 1 << 16):
            output += block
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    assert process.wait() == 0, text
    assert re.search(r"6/6 .*\d:\d\d:\d\d", text), text
    assert "360 images, each once" in text


def test_an_unreachable_tracking_server_is_said_once_and_costs_nothing_else(digits, tmp_path, command):
    from dist_train.config_file import dump_config

    config = settings(digits, tmp_path, "alone", max_steps=4)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    result = command("dist_train", "train", path, "--tracking.uri", "http://127.0.0.1:9")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("MLflow at http://127.0.0.1:9 cannot be used") == 1
    assert (config.folder / "report.json").exists()
