"""The command line: bad input is one line and exit code 2, before any process group is made."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dist_train import cli
from dist_train.config_file import dump_config, load_config, make_config
from launch import local
from shards.index import Index
from tests.common import ROOT, SMALL_MODEL


@pytest.fixture
def config(digits, tmp_path):
    path = tmp_path / "config.yaml"
    fields = {
        "name": "try",
        "runs": str(tmp_path / "runs"),
        "data": {"shards": str(digits)},
        "model": SMALL_MODEL,
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
    (tmp_path / "empty" / "val").mkdir(parents=True)
    assert "index" in said("--data.shards", tmp_path / "empty")
    assert "33" in said("--data.image_size", 33)
    assert "sync_bn is true, which needs a GPU" in said("--train.sync_bn", "true")
    assert "only 1437 images" in said("--train.global_batch", 2048)
    single = said("--train.micro_batch", 1, "--data.image_size", 8)
    assert "train.micro_batch is 1, but a norm of this network gets a single value on images of 8 x 8 pixels" in single
    assert "set train.micro_batch to 2 or more" in single
    assert "loss.distill_weights" in said("--loss.distill_weights", "[1, 1, 1, 1, 1]")
    (tmp_path / "file").touch()
    assert "is a file" in said("--runs", tmp_path / "file")


NORMS = """
from torch import nn
def network(classes, tracks):
    norm = nn.InstanceNorm2d(4, track_running_stats=True) if tracks else nn.GroupNorm(4, 4)
    return nn.Sequential(nn.Conv2d(3, 4, 16, 16), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
"""


@pytest.mark.parametrize("tracks", [False, True], ids=["group", "instance"])
def test_a_norm_that_gets_a_single_value_is_refused(config, refused, tmp_path, monkeypatch, tracks):
    (tmp_path / "norms.py").write_text(NORMS)
    monkeypatch.syspath_prepend(tmp_path)
    fields = f"{{name: norms:network, exits: ['2'], options: {{tracks: {tracks}}}}}"
    said = refused("plan", config, "--model", fields, "--data.image_size", 16)
    assert "data.image_size is 16, but a norm of this network gets a single value" in said
    assert cli.run(["plan", str(config), "--model", fields, "--data.image_size", "32"]) == 0


def test_shards_that_do_not_match_their_index_are_refused(config, own_shards, refused):
    shard = own_shards / "train" / "shard-000000.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    assert "shard-000000.tar" in refused("train", config, "--data.shards", own_shards)
    shard.write_bytes(content[:5000] + b"X" + content[5001:])
    assert "SHA-256" in refused("train", config, "--data.shards", own_shards)
    shard.unlink()
    assert "shard-000000.tar" in refused("train", config, "--data.shards", own_shards)


def test_shards_that_were_there_are_waited_for_and_a_wrong_path_is_a_mistake(config, own_shards, capsys):
    words = ["train", str(config), "--data.shards", str(own_shards)]
    run = config.parent / "runs" / "try"
    (run / "slurm").mkdir(parents=True)
    (run / "slurm" / "submitted.yaml").write_text(config.read_text())
    own_shards.rename(own_shards.with_name("away"))
    # Submitted, or started, with other shards: a path that was never right is no file system that is down.
    assert cli.run(words) == 2
    assert "no such folder of shards" in capsys.readouterr().err
    (run / "config.yaml").write_text(dump_config(load_config(config, "--data.shards", str(own_shards))))
    assert cli.run(words) == 1
    said = capsys.readouterr().err
    assert f"{own_shards / 'val' / 'index.json'}: is not there, but it was" in said
    assert said.count("\n") == 1
    assert local.main(["-n", "1", *words[1:]]) == 1
    # A mount point without what is mounted there.
    own_shards.mkdir()
    assert cli.run(words) == 1


@pytest.mark.parametrize("field", ["model.pretrained", "loss.outside_teachers"])
def test_weights_that_were_there_are_waited_for(config, tmp_path, capsys, field):
    gone = tmp_path / "mounted" / "weights"
    words = [f"--{field}", f"[{gone}]" if field == "loss.outside_teachers" else str(gone)]
    for _ in range(2):  # what was never there is a mistake, however often it is started
        assert cli.run(["train", str(config), *words]) == 2
    assert str(gone) in capsys.readouterr().err
    (tmp_path / "runs" / "try").mkdir(parents=True, exist_ok=True)
    (tmp_path / "runs" / "try" / "config.yaml").write_text(dump_config(load_config(config, *words)))
    assert cli.run(["train", str(config), *words]) == 1
    assert f"{gone}: is not there, but it was" in capsys.readouterr().err


def test_a_label_outside_of_the_classes_is_refused(config, own_shards, refused):
    path = own_shards / "train" / "index.json"
    index = json.loads(path.read_text())
    index["classes"].pop()
    path.write_text(json.dumps(index))
    said = refused("train", config, "--data.shards", own_shards)
    assert "label 9, allowed are 0 to 8" in said


def trained(config, *overrides):
    return cli.run(["train", str(config), *overrides])


@pytest.mark.parametrize("links", ["as they are", "gone", "folders"])
def test_a_checkpoint_of_another_network_or_other_data_is_refused(
    config, own_shards, digits, ranks, refused, command, tmp_path, links
):
    """However the run folder was copied: links are not what decides."""
    assert ranks(trained, 1, config) == [0]
    for link in (tmp_path / "runs" / "try" / "checkpoints" / name for name in ("latest", "best")):
        target = link.resolve()
        if links != "as they are":
            link.unlink()
        if links == "folders":
            shutil.copytree(target, link)

    def said(module, *overrides):
        result = command(module, *(["train"] if module == "dist_train" else []), config, *overrides)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result
        return result.stderr

    for module in ("dist_train", "launch.local"):
        assert "model.growth 2 -> 3" in said(module, "--model.growth", 3)
        assert "seed 0 -> 1" in said(module, "--seed", 1)
    shutil.rmtree(own_shards / "train")
    shutil.copytree(own_shards / "val", own_shards / "train")
    assert "other data" in said("dist_train", "--data.shards", own_shards)
    assert "no checkpoint here" in refused("eval", tmp_path)
    # The same command resumes, and people find the links again.
    assert command("dist_train", "train", config).returncode == 0
    assert (tmp_path / "runs" / "try" / "checkpoints" / "latest").is_symlink()


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


def test_a_disk_without_room_for_checkpoints_ends_in_another_code_and_says_what_is_lost(config, command, tmp_path):
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = command("dist_train", "train", config, "--checkpoint.every_steps", 1, preexec_fn=limit)
    assert result.returncode == 74, result.stdout + result.stderr
    assert result.stdout.count("a checkpoint could not be written") == 1
    assert (
        "the last checkpoint, of step 2, could not be written (File too large); what remains is no checkpoint"
        in result.stderr
    )
    assert json.loads((tmp_path / "runs" / "try" / "report.json").read_text())["step"] == 2
    assert not list((tmp_path / "runs" / "try" / "checkpoints").iterdir())


def test_the_plan_says_what_a_run_would_do_and_makes_nothing(config, capsys, tmp_path):
    assert cli.run(["plan", str(config), "--processes", "2"]) == 0
    plan = capsys.readouterr().out
    assert "64 = 2 processes x 1 accumulation step x 32" in plan
    assert "22 steps = 1 epoch x 22" in plan
    assert "images    32 x 32 pixels; shifted by up to 4, flipped; mean [0.485, 0.456, 0.406], std " in plan
    assert not (tmp_path / "runs").exists()
    assert cli.run(["plan", str(config), "--train.max_steps", "5", "--data.augment", "none"]) == 0
    plan = capsys.readouterr().out
    assert "length    5 steps (train.max_steps) of 22 steps = 1 epoch x 22" in plan
    assert "not varied; mean" in plan


NETWORK = """
from torch import nn

def small(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 15 * 15, classes))
"""


def test_the_plan_of_a_network_that_looks_at_its_values_says_what_it_does_not_count(
    config, capsys, tmp_path, monkeypatch
):
    looks = NETWORK.replace("nn.Flatten()", "Looks(), nn.Flatten()")
    looks += "\nclass Looks(nn.Module):\n    def forward(self, x):\n        return x if float(x.sum()) < 1e9 else -x\n"
    (tmp_path / "looking.py").write_text(looks)
    monkeypatch.syspath_prepend(tmp_path)
    model = '{name: "looking:small", exits: ["1"]}'
    assert cli.run(["plan", str(config), "--model", model]) == 0
    assert (
        "memory is without activations, because the network looks at values of its tensors" in capsys.readouterr().out
    )


def test_a_network_in_the_current_folder_is_found_by_every_verb(config, tmp_path):
    """By the program dist-train itself, which unlike `python -m` has not the current folder among the modules' places."""
    (tmp_path / "mine.py").write_text(NETWORK)
    program = tmp_path / "bin" / "dist-train"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom dist_train.cli import main\nmain()\n")
    program.chmod(0o755)
    own = ["--model.name", "mine:small", "--model.exits", '["1"]', "--train.max_steps", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(ROOT)

    def run(*words):
        result = subprocess.run(
            [program, *map(str, words)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    tree = yaml.safe_load(config.read_text())
    del tree["model"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree))
    assert "mine:small" in run("plan", "own.yaml", *own)
    first = run("train", "own.yaml", *own)
    assert "360 images, each once" in run("eval", tmp_path / "runs" / "try")
    # The same command once more says the result again, and plan says that there is nothing left to do.
    again = run("train", "own.yaml", *own)
    table = first[first.index("exit  multiply-adds") :]
    assert "was already complete at step 2" in again
    assert again.endswith(table)
    assert "finished (" in run("plan", "own.yaml", *own)
    # A network that wants another size says so in one line.
    result = subprocess.run(
        [program, "plan", "own.yaml", *own, "--data.image_size", "64"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout.count("\n")) == (2, 1), result
    assert "mine:small fails on images of 64 x 64 pixels: " in result.stdout
    assert "Traceback" not in result.stderr


def test_a_reader_that_leaves_is_no_traceback():
    words = f"{sys.executable} -m dist_train train --help | head -n 1"
    result = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout.count("\n"), result.stderr) == (1, "")


def test_version(command):
    import dist_train

    assert command("dist_train", "--version").stdout == f"dist-train {dist_train.__version__}\n"
    assert set(dist_train.__all__) <= set(dir(dist_train))


def test_help_lists_every_field(command):
    from dist_train.config_file import describe_fields

    shown = command("dist_train", "train", "--help")
    assert shown.returncode == 0
    assert all(f"--{key} " in shown.stdout for key, _, _ in describe_fields())


def test_stage_3_needs_no_launcher(config, command):
    result = command("dist_train", "train", config, "--train.zero_stage", 3, "--train.max_steps", 1)
    assert result.returncode == 0, result.stdout + result.stderr


def test_verbs(command, refused):
    assert f"use one of {', '.join(cli.VERBS)}" in refused("trian", "x.yaml")
    assert "the following arguments are required: RUN; see dist-train eval --help" in refused("eval")
    assert "unrecognized arguments: --sure; see dist-train predict --help" in refused("predict", "r", "i", "--sure")
    assert "unrecognized arguments: --best; see dist-train compare --help" in refused("compare", "--best")
    assert "invalid choice: 'luck' (choose from" in refused("bench", "luck")
    assert "WHAT" in command("dist_train", "bench", "--help").stdout
    shown = command("dist_train", "doctor")
    assert shown.returncode == 0, shown.stdout
    assert "A run can start here." in shown.stdout
    if "GPU                  none" in shown.stdout:
        assert "driver, compiler, loss kernel, GPU decoder, NCCL: they need a GPU" in shown.stdout


def tried():
    from dist_train.commands import doctor

    def broken(device):
        raise RuntimeError("CUDA driver version\nis insufficient")

    trials = {name: trial for name, trial in doctor.TRIALS.items() if name != "compiler"}
    doctor.TRIALS = trials | {"broken": broken}
    return doctor.try_all(torch.device("cpu"))


def test_doctor_tries_what_a_run_needs_and_says_what_does_not_work_in_one_line(ranks):
    # On a CPU that plays the GPU.
    [(worked, failed)] = ranks(tried, 1)
    assert [line.split("  ")[0] for line in worked] == ["driver", "loss kernel", "GPU decoder", "NCCL"]
    assert all("works" in line for line in worked)
    assert failed == ["broken does not work: RuntimeError: CUDA driver version is insufficient"]


def test_more_processes_than_the_machine_has_are_refused(config, command):
    result = command("launch.local", "-n", 999, config)
    assert result.returncode == 2
    assert "-n is 999" in result.stderr


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (["--help"], ["torch", "pydantic", "numpy"]),
        (["plan", "CONFIG"], ["deepspeed", "nvidia.dali", "mlflow", "matplotlib", "sklearn", "rich", "submitit"]),
        (["train", "CONFIG"], ["mlflow", "submitit", "torch._dynamo", "sympy"]),
        (
            ["train", "CONFIG", "--train.zero_stage", "2", "--optim.name", "adamw"],
            ["mlflow", "submitit", "torch._dynamo"],
        ),
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


@pytest.mark.parametrize("what", ["compare", "data", "eval", "loss", "model", "order", "shards", "start", "step"])
def test_a_benchmark_says_before_it_measures_that_its_file_cannot_be_written(what, refused, tmp_path):
    assert "cannot be written, it is a folder or in none" in refused("bench", what, "--json", tmp_path / "no/x.json")
    assert "--json is empty; give a value, or leave it out" in refused("bench", what, "--json", "")
