"""Networks shared on the Hugging Face Hub: what is pushed, and what is loaded of a repository that anybody may have written."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import constants

from dist_train import cli, load_model
from dist_train.config_file import load_config
from dist_train.errors import CheckpointError, UserError
from dist_train.evaluation.thresholds import point_for_budget, point_for_risk
from dist_train.export import card
from dist_train.files import sha256
from dist_train.training import checkpoint
from tests.common import ROOT
from tests.dist_train.export import fake_hub

WEIGHTS = {"model.safetensors", "config.yaml", "state.json", "manifest.json"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub without repositories, a cache of its own, and a token in the environment."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
    with fake_hub.running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture(scope="module")
def published(runs, exported, tmp_path_factory):
    """The folder that is published of a run with a report and an export; the run folder."""
    run = tmp_path_factory.mktemp("published") / "msdnet"
    shutil.copytree(runs["msdnet"], run, symlinks=True)
    shutil.copytree(exported["msdnet"], run / "export")
    folder = run.with_name("folder")
    assert cli.run(["push", str(run), "--folder", str(folder)]) == 0
    return folder, run


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_pushed_is_the_folder_and_gives_the_same_logits(hub, published, capsys):
    folder, run = published
    assert cli.run(["push", str(run), "team/digits"]) == 0
    assert f"pushed to {hub.url}/team/digits" in capsys.readouterr().out
    pushed, expected = hub.repositories["team/digits"], files_of(folder)
    assert {name: data for name, data in pushed.items() if name != "README.md"} == {
        name: data for name, data in expected.items() if name != "README.md"
    }
    images = torch.randn(4, 3, 32, 32)
    logits = load_model(run)(images)
    for address in ("hf://team/digits", f"hf://team/digits@{hub.commit('team/digits')}", folder):
        assert all(map(torch.equal, load_model(address)(images), logits))
    # Nothing is fetched that loading does not need.
    fetched = {request.split("/", 6)[-1] for request in hub.requests if "/resolve/" in request}
    assert fetched == WEIGHTS | {"report.json"}


def test_thresholds_come_with_the_network(hub, published):
    cli.run(["push", str(published[1]), "team/digits"])
    assert point_for_budget("hf://team/digits", "0.45M") == point_for_budget(published[1], "0.45M")
    assert point_for_risk("hf://team/digits", "gap") == point_for_risk(published[1], "gap")


def test_a_later_push_leaves_nothing_of_an_earlier_network(hub, published, runs, capsys):
    cli.run(["push", str(published[1]), "team/digits"])
    assert cli.run(["push", str(runs["resnet"]), "team/digits"]) == 0
    assert "it lacks no report of step 132" in capsys.readouterr().out
    assert hub.repositories["team/digits"].keys() == WEIGHTS | {"README.md"}
    assert b"It has not been evaluated." in hub.repositories["team/digits"]["README.md"]
    assert type(load_model("hf://team/digits")) is type(load_model(runs["resnet"]))


def test_a_private_push_never_makes_a_network_public(hub, published, refused, capsys):
    run = published[1]
    assert cli.run(["push", str(run), "team/secret", "--private"]) == 0
    assert hub.private == {"team/secret"}
    assert cli.run(["push", str(run), "team/secret", "--private"]) == 0
    hub.repositories["team/public"] = {"README.md": b"before"}
    capsys.readouterr()
    assert "team/public: exists and is public" in refused("push", run, "team/public", "--private")
    assert hub.repositories["team/public"] == {"README.md": b"before"}
    assert not [one for one in hub.requests if one.startswith("POST") and "team/public" in one]


def test_raw_weights_that_were_not_published_are_not_replaced_by_averages(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(checkpoint.find(runs["resnet"]), run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["optim"]["ema_decay"] = 0.9
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copyfile(run / "model.safetensors", run / "averaged.safetensors")
    (run / "manifest.json").unlink()
    load_model(run, weights="raw")
    assert cli.run(["push", str(run), "--folder", str(tmp_path / "out")]) == 0
    load_model(tmp_path / "out")
    with pytest.raises(CheckpointError, match="has the moving average of the weights alone"):
        load_model(tmp_path / "out", weights="raw")


def test_the_averaged_weights_are_what_is_published(runs, tmp_path):
    shutil.copytree(checkpoint.find(runs["resnet"]), tmp_path / "run/checkpoints/step-00000132")
    path = tmp_path / "run/checkpoints/step-00000132"
    weights = checkpoint.load_file(path / "model.safetensors")
    weights = {name: value + 1 if value.is_floating_point() else value for name, value in weights.items()}
    checkpoint.save_file(weights, path / "averaged.safetensors")
    assert cli.run(["push", str(path), "--folder", str(tmp_path / "out")]) == 0
    assert sha256(tmp_path / "out/model.safetensors") == sha256(path / "averaged.safetensors")


def test_the_card_says_what_the_report_says(published):
    folder, run = published
    text, report = (folder / "README.md").read_text(), json.loads((run / "report.json").read_text())
    _, matter, body = text.split("---\n", 2)
    assert yaml.safe_load(matter)["pipeline_tag"] == "image-classification"
    for one in report["exits"]:
        low, high = one["top1_interval"]
        assert f"| {100 * one['top1']:.2f} ({100 * low:.2f} to {100 * high:.2f}) |" in body
    assert "gap at most 0.1, with probability 0.95" in body
    assert "Trained on `digits/train`, 10 classes: 0, 1" in body
    assert "10.1109/ICCV.2019.00144" in body
    assert "in fp32 in onnxruntime by `export/predict.py`" in body
    assert card.OF_ANOTHER.format("fp32") not in body
    assert card.OF_ANOTHER.format("bf16") in card._export("hf://team/digits", "onnxruntime", "fp32", "bf16")
    assert point_for_budget(folder, body.partition("--budget ")[2].split()[0])  # the command of the card works


def test_nothing_of_this_machine_is_published(runs, published, tmp_path):
    path = tmp_path / "checkpoint"
    shutil.copytree(checkpoint.find(runs["resnet"]), path)
    (path / "manifest.json").unlink()
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["tracking"]["uri"] = "https://user:password@mlflow.example"
    config["data"]["shards"] = "s3://bucket/photos?key=password"
    config["slurm"]["account"] = "grant-password"
    config["model"]["pretrained"] = str(tmp_path / "weights.pt")
    config["loss"]["outside_teachers"] = [
        str(tmp_path / "a/big"),
        str(tmp_path / "b/big"),
        "hf://team/digits",
        "timm/resnet18",
    ]
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.run(["push", str(path), "--folder", str(tmp_path / "out")]) == 0
    for folder in (tmp_path / "out", published[0]):
        for name, data in files_of(folder).items():
            assert b"password" not in data, name
            assert str(tmp_path.parent).encode() not in data, name
    written = load_config(tmp_path / "out/config.yaml")
    assert (written.data.shards.name, written.loss.outside_teachers) == (
        "photos",
        ("big", "hf://team/digits", "timm/resnet18"),
    )


def test_the_token_is_nowhere(hub, published, tmp_path, capsys, caplog):
    cli.run(["push", str(published[1]), "team/digits"])
    load_model("hf://team/digits")
    cli.run(["push", str(published[1]), "team/--"])
    said = capsys.readouterr()
    assert fake_hub.TOKEN not in said.out + said.err + caplog.text
    for root in (tmp_path, published[1]):
        assert not [path for path in root.rglob("*") if path.is_file() and fake_hub.TOKEN.encode() in path.read_bytes()]


def loading_fails(address):
    with pytest.raises(UserError) as caught:
        load_model(address)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_input_is_one_line(hub, runs, published, refused, tmp_path, monkeypatch):
    run = published[1]
    assert "give ORG/NAME to push to, or --folder" in refused("push", run)
    assert "give ORG/NAME to push to, or --folder" in refused("push", run, "a/b", "--folder", tmp_path / "new")
    for name in ("digits", "a/b/c", "../up", "a b/c", "a/..", "-a/b", "a--b/c"):
        assert "is no name of a repository" in refused("push", "--", run, name)
    assert "no checkpoint here" in refused("push", tmp_path, "team/digits")
    assert "--private is of a repository" in refused("push", run, "--private", "--folder", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert "exists and is not empty" in refused("push", run, "--folder", run)
    shutil.copytree(run, tmp_path / "torn", symlinks=True)
    (tmp_path / "torn/export/stage2.onnx").unlink()
    for where in (["team/digits"], ["--folder", tmp_path / "new"]):
        assert "stage2.onnx: is missing; export again" in refused("push", tmp_path / "torn", *where)
    assert not (tmp_path / "new").exists()
    assert "a report cannot be written there" in refused("eval", "hf://team/digits")
    assert "an export cannot be written there" in refused("export", "hf://team/digits", "--thresholds", "1,1")
    assert "there is no such repository" in refused(
        "export", "hf://team/none", "--budget", "1M", "--out", tmp_path / "e"
    )
    assert "there is no such repository" in loading_fails("hf://team/none")
    hub.repositories["team/other"] = {"README.md": b"something else"}
    assert "holds no network that `dist-train push` wrote" in loading_fails("hf://team/other")
    assert "has no such revision" in loading_fails("hf://team/other@v1")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "the account here may not do that (HTTP 401)" in refused("push", run, "team/digits")
    monkeypatch.delenv("HF_TOKEN")
    assert "nobody is logged in to the Hugging Face Hub" in refused("push", run, "team/digits")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "the Hub cannot be reached" in loading_fails("hf://team/absent")
    assert "team/digits" not in hub.repositories


def test_what_a_repository_holds_is_not_trusted(hub, published, tmp_path):
    files = files_of(published[0])

    def fails_with(**changed):
        content = {**files, **changed}
        content.pop("manifest.json")
        hub.repositories["evil/net"] = {name: data for name, data in content.items() if data is not None}
        return loading_fails("hf://evil/net")

    def config_with(model):
        return {"config.yaml": yaml.safe_dump({"data": {"shards": "x"}, "model": model}).encode()}

    # What its data are decides what is fetched, and what the cache removes.
    for data, reason in (
        ({"shards": "s3://bucket/photos"}, "its data lie at s3://bucket/photos, which is more than a name"),
        ({"shards": "../photos"}, "its data lie at ../photos"),
        ({"shards": "x", "cache": str(tmp_path)}, f"its data.cache is {tmp_path}"),
        ({"shards": "x", "train": [{"shards": "https://evil.example/x"}]}, "its data lie at https://evil.example/x"),
        ({"shards": "x", "val": "../val"}, "its data lie at ../val"),
        ({"shards": "x", "val": ".."}, "its data lie at .."),
    ):
        assert reason in fails_with(**{"config.yaml": yaml.safe_dump({"data": data}).encode()})
    # Names that point outside are not asked for.
    hub.repositories["evil/net"] = {**files, "../../outside.txt": b"outside", "export/../../up.py": b"outside"}
    load_model("hf://evil/net")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"outside"]
    marker = tmp_path / "ran"
    function = {"name": "os:system", "exits": ["0"], "options": {"command": f"touch {marker}"}}
    assert "a function that the repository chooses" in fails_with(**config_with(function))
    for name, options, reason in (
        ("transformers/evil/code", {"trust_remote_code": True}, "which is looked up elsewhere"),
        ("timm/hf-hub:evil/code", {}, "which is looked up elsewhere"),
        ("timm/resnet18", {"checkpoint_path": "/etc/passwd"}, "has the option checkpoint_path, which is no number"),
        ("transformers/ViTConfig", {"auto_map": {"AutoConfig": "evil--code"}}, "has the option auto_map"),
    ):
        assert reason in fails_with(**config_with({"name": name, "exits": ["0"], "options": options}))
    assert not marker.exists()
    weights = files["model.safetensors"]
    assert "its weights are damaged" in fails_with(**{"model.safetensors": b"\xff" * 100})
    assert "its weights are damaged" in fails_with(**{"model.safetensors": weights[:-10]})
    assert "state.json is damaged" in fails_with(**{"state.json": b"{}"})
    assert "state.json is damaged" in fails_with(**{"state.json": b"\x80\x04pickle"})
    assert "it has no model.safetensors" in fails_with(**{"model.safetensors": None})
    hub.repositories["evil/net"] = {**files, "model.safetensors": weights[:-1] + b"x"}
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        load_model("hf://evil/net")


def test_a_library_that_is_not_installed_is_named(published):
    without = (
        "import sys; sys.modules['huggingface_hub'] = None; from dist_train import cli; sys.exit(cli.run(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", without, "push", published[1], "team/digits"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "pip install 'dist-train[hub]'" in done.stderr
