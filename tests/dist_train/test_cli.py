"""The command line: bad input is one line and exit code 2, before any process group is made."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train import cli
from dist_train.config_file import dump_config, make_config
from shards.index import Index

ROOT = Path(__file__).parents[2]
MODEL = {"exits": 2, "base": 1, "step": 1, "scales": 2, "growth": 2, "initial_channels": 4, "head_width": 8,
         "growth_factors": [1, 2], "bottleneck_factors": [1, 2]}  # fmt: skip


@pytest.fixture
def config(digits, tmp_path):
    path = tmp_path / "config.yaml"
    fields = {
        "name": "try",
        "runs": str(tmp_path / "runs"),
        "data": {"shards": str(digits)},
        "model": MODEL,
        "train": {"global_batch": 64, "micro_batch": 32, "max_steps": 2, "epochs": 1},
        "tracking": {"uri": "off"},
    }
    path.write_text(dump_config(make_config(fields)))
    return path


@pytest.fixture
def own_shards(digits, tmp_path):
    return Path(shutil.copytree(digits, tmp_path / "shards"))


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_configurations_that_cannot_run_are_refused(config, tmp_path, refused, verb):
    def said(*overrides):
        return refused(verb, config, *overrides)

    assert "train.global_batch is 48" in said("--train.global_batch", 48)
    assert "use 32 or 64" in said("--train.global_batch", 48)
    assert "did you mean train.epochs?" in said("--train.epoch", 3)
    assert "nowhere" in said("--data.shards", tmp_path / "nowhere")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "index" in said("--data.shards", tmp_path / "empty")
    assert "33" in said("--data.image_size", 33)
    assert "fp16, which needs a GPU" in said("--train.precision", "fp16")
    assert "only 1437 images" in said("--train.global_batch", 2048)
    (tmp_path / "file").touch()
    assert "is a file" in said("--runs", tmp_path / "file")


def test_shards_that_do_not_match_their_index_are_refused(config, own_shards, refused):
    shard = own_shards / "train" / "shard-000000.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    assert "shard-000000.tar" in refused("train", config, "--data.shards", own_shards)
    shard.write_bytes(content[:5000] + b"X" + content[5001:])
    assert "SHA-256" in refused("train", config, "--data.shards", own_shards)
    shard.unlink()
    assert "shard-000000.tar" in refused("train", config, "--data.shards", own_shards)


def test_a_label_outside_of_the_classes_is_refused(config, own_shards, refused):
    path = own_shards / "train" / "index.json"
    index = json.loads(path.read_text())
    index["classes"].pop()
    path.write_text(json.dumps(index))
    said = refused("train", config, "--data.shards", own_shards)
    assert "label 9, allowed are 0 to 8" in said


def trained(config, *overrides):
    return cli.run(["train", str(config), *overrides])


def test_a_checkpoint_of_another_network_or_other_data_is_refused(config, own_shards, digits, ranks, refused, tmp_path):
    assert ranks(trained, 1, config) == [0]
    assert "model.growth 2 -> 3" in refused("train", config, "--model.growth", 3)
    assert "seed 0 -> 1" in refused("train", config, "--seed", 1)
    shutil.rmtree(own_shards / "train")
    shutil.copytree(own_shards / "val", own_shards / "train")
    assert "other data" in refused("train", config, "--data.shards", own_shards)
    assert "no checkpoint here" in refused("eval", tmp_path)


def test_what_is_evaluated_later_is_what_training_said(config, ranks, command, tmp_path):
    assert ranks(trained, 1, config) == [0]
    report = json.loads((tmp_path / "runs" / "try" / "report.json").read_text())
    for processes in (1, 3):
        results = ranks(evaluated, processes, tmp_path / "runs" / "try")
        for result in results:
            assert result.images == report["images"] == 360
            for given, wanted in zip(result.exits, report["exits"], strict=True):
                assert (given.top1, given.top5) == (wanted["top1"], wanted["top5"])
                assert given.loss == pytest.approx(wanted["loss"], rel=1e-5)
    shown = command("dist_train", "eval", tmp_path / "runs" / "try")
    assert shown.returncode == 0, shown.stderr
    assert "360 images, each once" in shown.stdout


def evaluated(folder):
    from dist_train import evaluate

    return evaluate(folder)


def test_a_disk_without_room_for_checkpoints_costs_the_checkpoints_only(config, command, tmp_path):
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = command("dist_train", "train", config, "--checkpoint.every_steps", 1, preexec_fn=limit)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("a checkpoint could not be written") == 1
    assert json.loads((tmp_path / "runs" / "try" / "report.json").read_text())["step"] == 2
    assert not list((tmp_path / "runs" / "try" / "checkpoints").iterdir())


def test_the_plan_says_what_a_run_would_do_and_makes_nothing(config, capsys, tmp_path):
    assert cli.run(["plan", str(config), "--processes", "2"]) == 0
    plan = capsys.readouterr().out
    assert "64 = 2 processes x 1 passes x 32" in plan
    assert "22 steps = 1 epochs x 22" in plan
    assert not (tmp_path / "runs").exists()


def test_help_lists_every_field(command):
    from dist_train.config_file import describe_fields

    shown = command("dist_train", "train", "--help")
    assert shown.returncode == 0
    assert all(f"--{key} " in shown.stdout for key, _, _ in describe_fields())


def test_verbs(command, refused):
    assert "use one of plan, train, eval, predict, convert, compare, study, sync, bench, doctor" in refused(
        "trian", "x.yaml"
    )
    assert "the following arguments are required: RUN; see dist-train eval --help" in refused("eval")
    assert "unrecognized arguments: --sure; see dist-train predict --help" in refused("predict", "r", "i", "--sure")
    assert "unrecognized arguments: --best; see dist-train compare --help" in refused("compare", "--best")
    assert "invalid choice: 'luck' (choose from" in refused("bench", "luck")
    assert "WHAT" in command("dist_train", "bench", "--help").stdout
    shown = command("dist_train", "doctor")
    assert shown.returncode == 0, shown.stdout
    assert "A run can start here." in shown.stdout


def test_more_processes_than_the_machine_has_are_refused(config, command):
    result = command("launch.local", "-n", 999, config)
    assert result.returncode == 2
    assert "-n is 999" in result.stderr


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (["--help"], ["torch", "pydantic", "numpy"]),
        (["plan", "CONFIG"], ["deepspeed", "nvidia.dali", "mlflow", "matplotlib", "sklearn", "rich", "submitit"]),
        (["sync", "FOLDER"], ["torch.distributed.fsdp", "deepspeed", "nvidia.dali", "mlflow", "matplotlib"]),
    ],
)
def test_a_verb_imports_no_more_than_it_needs(config, tmp_path, words, unwanted):
    words = [{"CONFIG": str(config), "FOLDER": str(tmp_path)}.get(word, word) for word in words]
    code = f"import sys; from dist_train import cli; cli.run({words}); print(*sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    modules = result.stderr.split()
    assert "dist_train.cli" in modules
    assert not set(unwanted) & set(modules)


def test_training_leaves_out_what_check_has_found_and_reads_a_list_over_other_shards(digits, config, command, tmp_path):
    part, damaged = tmp_path / "part", tmp_path / "damaged"
    shutil.copytree(digits, damaged)
    for words in (["subset", damaged, part, "--per-class", "30"], ["check", damaged]):
        assert command("shards", *words).returncode == 0
    index = Index.load(part / "train")
    shard = damaged / "train" / index.shards[0].name
    content = bytearray(shard.read_bytes())
    content[int(index.offset[7]) : int(index.offset[7]) + 4] = b"none"
    shard.write_bytes(content)
    assert command("shards", "check", damaged).returncode == 2
    overrides = ("--data.shards", part, "--data.verify", "size", "--train.max_steps", 2)
    note = f"{part / 'train'}: 1 images are left out, by quarantine.json"
    shown = command("dist_train", "plan", config, *overrides)
    assert shown.returncode == 0
    assert "299 images, 10 classes" in shown.stdout
    assert note in shown.stdout
    ended = command("dist_train", "train", config, *overrides)
    assert ended.returncode == 0, ended.stderr
    assert note in ended.stdout
    assert "cannot be read" not in ended.stdout
