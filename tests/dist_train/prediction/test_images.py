"""The verb predict on files: prepared and classified as evaluation does it, budgets from the report, bad input in one line."""

import csv
import io
import json
import os
import shutil

import pytest
import torch
from PIL import Image

from dist_train import Predictor, cli, load_model
from dist_train.config_file import make_config
from dist_train.errors import ConfigError, DataError
from dist_train.evaluation.thresholds import point_for_budget, point_for_risk
from dist_train.models import build_model
from dist_train.models.stages import StagedNetwork
from dist_train.prediction import at_exit
from dist_train.prediction.images import find_images
from dist_train.training import checkpoint
from dist_train.training.checkpoint import Checkpoint, CheckpointMeta, Progress
from shards.index import Index
from tests.common import SMALL_MODEL, cpu_loader, write_digits

MODEL = SMALL_MODEL | {"exits": 3}


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """The folder of a run whose network is not trained, and its configuration."""
    folder = tmp_path_factory.mktemp("runs")
    config = make_config(
        {
            "name": "run",
            "runs": str(folder),
            "data": {"shards": str(digits)},
            "model": MODEL,
            "train": {"precision": "fp32"},
        }
    )
    torch.manual_seed(0)
    classes = list(Index.load(digits / "val").classes)
    model = build_model(config.model, len(classes), 32)
    model(torch.randn(64, 3, 32, 32))
    snapshot = Checkpoint(CheckpointMeta(Progress(step=7), 1, classes, "", {}), config, model.state_dict(), {})
    checkpoint.set_link(folder / "run/checkpoints", "latest", checkpoint.write(folder / "run/checkpoints", snapshot))
    return folder / "run", config


@pytest.fixture(scope="module")
def photos(digits, tmp_path_factory):
    """The first 20 images of the split as files, by their number in it."""
    folder = tmp_path_factory.mktemp("photos")
    write_digits(digits / "val", 20, folder)
    return folder


def said(capsys, *arguments):
    assert cli.run(["predict", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_what_python_gives_a_predictor_is_checked(run, tmp_path):
    folder, _ = run
    for options, words in (
        ({"policy": [0.9, 0.8]}, "policy is \\[0.9, 0.8\\]; give Thresholds"),
        ({"batch": "8"}, "batch is '8'; give an integer"),
        ({"expected": -1}, "expected is -1"),
        ({"deadline_ms": "5"}, "deadline_ms is '5', of type str; give milliseconds"),
        ({"reference": [1]}, "reference is \\[1\\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            Predictor(folder, **options)
    predictor = Predictor(folder, expected=1)
    for files, words in ((str(tmp_path), "give a list of paths"), (None, "files is None"), ([1], "a file is 1")):
        with pytest.raises(ConfigError, match=words):
            predictor.images(files)
    assert list(predictor.run([tmp_path / "missing.png"])) == []
    with pytest.raises(DataError, match="no image has been predicted yet"):
        predictor.saving()


def test_files_get_the_logits_that_evaluation_gives(run, photos, digits):
    folder, config = run
    loader = cpu_loader(Index.load(digits / "val"), digits / "val", config.data, train=False, seed=0, global_batch=20)
    images = next(iter(loader.evaluation())).images.clone()
    loader.close()
    with torch.no_grad():
        logits = load_model(folder)(images)[-1]
    expected = logits.softmax(1).max(1)
    classes = list(Index.load(digits / "val").classes)
    for batch in (1, 7):
        predictor = Predictor(folder, batch=batch)
        assert predictor.classes == classes
        assert isinstance(predictor.network, StagedNetwork)
        done = list(predictor.run(sorted(photos.iterdir())))
        assert [p.image for p in done] == [str(file) for file in sorted(photos.iterdir())]
        assert [p.label for p in done] == [classes[i] for i in expected.indices]
        assert [p.confidence for p in done] == pytest.approx(expected.values.tolist(), abs=1e-5)
        assert {p.exit for p in done} == {3}


def test_for_few_images_the_network_is_not_cut(run, photos):
    folder, _ = run
    few, many = (Predictor(folder, at_exit(2, 3), expected=expected) for expected in (499, 500))
    assert [isinstance(one.network, StagedNetwork) for one in (few, many)] == [False, True]
    files = sorted(photos.iterdir())
    expected = [(p.label, pytest.approx(p.confidence, abs=1e-5), p.exit) for p in many.run(files)]
    assert [(p.label, p.confidence, p.exit) for p in few.run(files)] == expected


def test_large_and_odd_images_are_prepared_as_from_shards(run, tmp_path, command):
    """Sizes, grey, palette, transparency, a format that shards store in another one: shards and files agree on the pixels."""
    folder, config = run
    photos = tmp_path / "photos" / "val" / "only"
    photos.mkdir(parents=True)
    noise = torch.randint(0, 255, (50, 70, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    for number, (mode, ending) in enumerate(
        (("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("P", "gif"), ("RGB", "bmp"))
    ):
        image = Image.fromarray(noise[: 50 - 5 * number, : 70 - 9 * number]).convert(mode)
        image.save(photos / f"{number}.{ending}")
    (tmp_path / "photos" / "train").mkdir()
    (tmp_path / "photos" / "train" / "only").symlink_to(photos)
    result = command("shards", "make", "folder", tmp_path / "photos", tmp_path / "shards")
    assert result.returncode == 0, result.stdout + result.stderr
    index = Index.load(tmp_path / "shards" / "val")
    loader = cpu_loader(index, tmp_path / "shards" / "val", config.data, train=False, seed=0, global_batch=5)
    stored = {
        index.key[int(i)].decode(): image.clone()
        for micro in loader.evaluation()
        for i, image in zip(micro.ids, micro.images)
    }
    loader.close()
    files = sorted(photos.iterdir())
    assert len(stored) == len(files) == 5
    predictor = Predictor(folder, batch=2)
    read = predictor.images([*files, tmp_path / "missing.png"])
    assert [str(file) for file, _ in predictor.unreadable] == [str(tmp_path / "missing.png")]
    # Shards have an order of their own.
    ours, theirs = (sorted(images, key=lambda image: image.sum().item()) for images in (read, stored.values()))
    assert torch.equal(torch.stack(ours), torch.stack(theirs))


def test_unreadable_images_are_named_and_the_rest_go_on(run, photos, tmp_path, capsys):
    folder, _ = run
    whole = (photos / "00.png").read_bytes()
    buffer = io.BytesIO()
    Image.fromarray(torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8).numpy()).save(buffer, "PNG")
    damaged = bytearray(buffer.getvalue())
    damaged[2000:4000] = bytes(2000)
    for name, content in {
        "a.png": whole,
        "b.png": b"",
        "c.jpg": b"text",
        "d.png": bytes(damaged),
        "e.png": whole,
    }.items():
        (tmp_path / name).write_bytes(content)
    output = tmp_path / "out.csv"
    assert cli.run(["predict", str(folder), str(tmp_path), "--batch", "4", "--output", str(output)]) == 0
    captured = capsys.readouterr()
    assert [f"{name}:" in captured.err for name in ("a.png", "b.png", "c.jpg", "d.png", "e.png")] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert "2 images, 3 unreadable" in captured.out
    rows = list(csv.DictReader(output.open()))
    assert [row["image"][-5:] for row in rows] == ["a.png", "e.png"]
    assert rows[0]["class"] == rows[1]["class"]
    assert list(rows[0]) == ["image", "class", "confidence", "exit", "milliseconds"]
    assert not list(tmp_path.glob(".*"))


def report(folder, step=7, **changes):
    group = {
        "method": "optimal",
        "measure": "margin",
        "temperatures": None,
        "cost": "multiply_adds",
        "calibration": "val",
        "points": [
            {"budget": b, "cost": c, "calibration_top1": t, "thresholds": [h, None, 0.0]}
            for b, c, t, h in ((1e5, 0.9e5, 0.5, 0.0), (2e5, 1.9e5, 0.8, 0.2), (3e5, 2.8e5, 0.7, 0.4))
        ],
    }
    content = {"format": 2, "step": step, "exits": [], "budgeted": [group | changes]}
    (folder / "report.json").write_text(json.dumps(content))


def test_pipes_do_not_hang_and_names_of_any_bytes_are_shown(run, photos, tmp_path, capsys):
    folder, _ = run
    os.mkfifo(tmp_path / "pipe.png")
    strange = os.fsencode(tmp_path) + b"/\xff\n.png"
    with open(strange, "wb") as file:
        file.write((photos / "00.png").read_bytes())
    assert cli.run(["predict", str(folder), str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert f"unreadable: {tmp_path}/pipe.png: " in captured.err
    assert captured.err.count("\n") == 1
    assert f"{tmp_path}/\\xff\\n.png" in captured.out
    output = tmp_path / "out.csv"
    assert cli.run(["predict", str(folder), str(tmp_path), "--output", str(output)]) == 0
    assert len(list(csv.DictReader(output.open()))) == 1


def test_a_budget_takes_the_best_point_within_it(run, photos, capsys):
    folder, _ = run
    (folder / "report.json").unlink(missing_ok=True)
    assert "dist-train eval" in said(capsys, folder, photos, "--budget", "1M")
    report(folder)
    chosen = point_for_budget(folder, "0.3M").policy
    assert (list(chosen.values), chosen.measure) == ([0.2, float("inf"), 0.0], "margin")
    assert next(iter(point_for_budget(folder, "1e5").policy.values)) == 0.0
    assert cli.run(["predict", str(folder), str(photos), "--budget", "200k"]) == 0
    assert "% saved" in capsys.readouterr().out
    assert "cheapest point" in said(capsys, folder, photos, "--budget", "10k")
    assert "budget in milliseconds" in said(capsys, folder, photos, "--budget", "3ms")
    assert "--budget is 'many'" in said(capsys, folder, photos, "--budget", "many")
    report(folder, cost="milliseconds")
    assert point_for_budget(folder, "3e5ms").policy.values[0] == 0.2
    report(folder, step=8)
    assert "is of step 8, the checkpoint of step 7" in said(capsys, folder, photos, "--budget", "1M")


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"step": 7, "budgeted": 5, "guarantee": 5}',
        '{"step": 7, "budgeted": [{"cost": "multiply_adds_lazy"}], "guarantee": {"risks": 1}}',
        '{"step": 7, "budgeted": [{"cost": "multiply_adds_lazy", "measure": "margin", "points": [{"cost": 1, '
        '"calibration_top1": 1, "thresholds": ["a"], "shares": []}]}], "guarantee": {"risks": [{"risk": "gap"}], "thresholds": ["a"]}}',
    ],
)
def test_a_report_of_another_form_is_one_line(content, run, photos, capsys):
    folder, _ = run
    (folder / "report.json").write_text(content)
    for option in (("--budget", "1M"), ("--risk", "gap")):
        assert "report.json: is no report " in said(capsys, folder, photos, *option)


def test_certified_thresholds_are_taken_and_a_shift_is_said(run, photos, capsys):
    folder, _ = run
    found = {
        "risks": [{"risk": "gap"}],
        "measure": "patience",
        "temperatures": None,
        "weights": None,
        "reason": "too few",
        "thresholds": [None, 0.9, 0.0],
        "shares": [0.0, 0.999, 0.001],
        "tested_images": 4000,
    }
    (folder / "report.json").write_text(json.dumps({"format": 2, "step": 7, "guarantee": found}))
    policy, reference, _ = point_for_risk(folder, "gap")
    assert (list(policy.values), policy.measure) == ([float("inf"), 0.9, 0.0], "patience")
    assert (reference.shares, reference.images) == ([0.0, 0.999, 0.001], 4000)
    # Nearly all images of the report took the second exit: were they all to go on, few would be enough to say so.
    found["thresholds"] = [None, 2.0, 0.0]
    (folder / "report.json").write_text(json.dumps({"format": 2, "step": 7, "guarantee": found}))
    assert cli.run(["predict", str(folder), str(photos), "--risk", "gap"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("warning: after ") == 1
    assert "0.0 % exit at exit 2, outside of 99.6 to 100.0 %" in captured.err
    assert "% saved" in captured.out
    # Where the shares are those of the report, nothing is said.
    found["shares"] = [0.0, 0.0, 1.0]
    (folder / "report.json").write_text(json.dumps({"format": 2, "step": 7, "guarantee": found}))
    assert cli.run(["predict", str(folder), str(photos), "--risk", "gap"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert "has no guarantee of error" in said(capsys, folder, photos, "--risk", "error")
    (folder / "report.json").write_text(json.dumps({"step": 7, "guarantee": found | {"thresholds": None}}))
    assert "report.json: too few" in said(capsys, folder, photos, "--risk", "gap")


def test_a_folders_images_are_those_that_shards_would_be_made_of(photos, tmp_path):
    (tmp_path / "in/.hidden").mkdir(parents=True)
    shutil.copytree(photos, tmp_path / "elsewhere")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    for name in ("a.jfif", "b.HEIC", ".hidden/c.jpg", "notes.txt"):
        (tmp_path / "in" / name).write_bytes(b"")
    linked = [tmp_path / "in/linked" / file.name for file in sorted(photos.iterdir()) if file.suffix != ".txt"]
    assert find_images([tmp_path / "in"]) == [tmp_path / "in/a.jfif", tmp_path / "in/b.HEIC", *linked]
    (tmp_path / "in/circle").symlink_to(tmp_path / "in")
    with pytest.raises(DataError, match="is a link to a folder that it lies in"):
        find_images([tmp_path / "in"])


def test_a_batch_is_no_larger_than_the_number_of_files(run, photos, capsys):
    folder, _ = run
    assert cli.run(["predict", str(folder), str(photos), "--batch", str(10**8)]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 20


def test_bad_input_is_one_line(run, photos, tmp_path, capsys):
    folder, _ = run
    assert "no checkpoint here" in said(capsys, tmp_path, photos)
    assert "there is no such file" in said(capsys, folder, tmp_path / "no.png")
    assert "holds no image" in said(capsys, folder, tmp_path)
    assert "1 thresholds are given for 3 exits" in said(capsys, folder, photos, "--thresholds", "0.5")
    assert "give one number per exit" in said(capsys, folder, photos, "--thresholds", "high")
    assert "give one number per exit" in said(capsys, folder, photos, "--thresholds", "nan,0.5")
    assert "give them as well" in said(capsys, folder, photos, "--exit", 1, "--measure", "margin")
    assert "patience is 3" in said(capsys, folder, photos, "--patience", 3)
    assert "exits 1 to 3" in said(capsys, folder, photos, "--exit", 4)
    assert "batch is 0" in said(capsys, folder, photos, "--batch", 0)
    for output in (tmp_path / "no" / "out.csv", tmp_path):  # before the images are read: the only one is none
        assert "cannot be written" in said(capsys, folder, __file__, "--output", output)


def test_a_deadline_is_the_policy(run, photos, capsys):
    folder, _ = run
    assert {p.exit for p in Predictor(folder, deadline_ms=60000).run([photos / "00.png"])} == {3}
    assert "exit 1 takes" in said(capsys, folder, photos, "--deadline", "1e-9")
    assert "not allowed with argument" in said(capsys, folder, photos, "--deadline", "5", "--exit", "1")
    with pytest.raises(ConfigError, match="give one of them"):
        Predictor(folder, at_exit(1, 3), deadline_ms=5)
