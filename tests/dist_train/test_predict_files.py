"""The verb predict on files: prepared and classified as evaluation does it, budgets from the report, bad input in one line."""

import csv
import io
import json

import pytest
import torch
from PIL import Image

from dist_train import checkpoint, cli, load_model
from dist_train.checkpoint import Position, Snapshot, State
from dist_train.config_file import make_config
from dist_train.data.pipeline import Loader
from dist_train.models import build_model
from dist_train.predict_files import Predictor, policy_for_budget
from shards.index import Index

MODEL = {"exits": 3, "base": 1, "step": 1, "scales": 2, "growth": 2, "initial_channels": 4, "head_width": 8,
         "growth_factors": [1, 2], "bottleneck_factors": [1, 2]}  # fmt: skip


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """The folder of a run whose network is not trained, and its configuration."""
    folder = tmp_path_factory.mktemp("runs")
    config = make_config({"name": "run", "runs": str(folder), "data": {"shards": str(digits)}, "model": MODEL,
                          "train": {"precision": "fp32"}})  # fmt: skip
    torch.manual_seed(0)
    classes = list(Index.load(digits / "val").classes)
    model = build_model(config.model, len(classes), 32)
    model(torch.randn(64, 3, 32, 32))
    snapshot = Snapshot(State(Position(step=7), 1, classes, "", {}), config, model.state_dict(), {})
    checkpoint.point(folder / "run/checkpoints", "latest", checkpoint.write(folder / "run/checkpoints", snapshot))
    return folder / "run", config


@pytest.fixture(scope="module")
def photos(digits, tmp_path_factory):
    """The first 20 images of the split as files, by their number in it."""
    folder = tmp_path_factory.mktemp("photos")
    index = Index.load(digits / "val")
    tar = (digits / "val" / index.shards[0].name).read_bytes()
    for number in range(20):
        start = int(index.offset[number])
        (folder / f"{number:02}.png").write_bytes(tar[start : start + int(index.size[number])])
    return folder


def said(capsys, *arguments):
    assert cli.run(["predict", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_files_get_the_logits_that_evaluation_gives(run, photos, digits):
    folder, config = run
    loader = Loader(Index.load(digits / "val"), digits / "val", config.data, train=False, seed=0, global_batch=20,
                    micro_batch=20, rank=0, world_size=1, device=torch.device("cpu"), threads=1)  # fmt: skip
    images = next(iter(loader.evaluation())).images.clone()
    loader.close()
    with torch.no_grad():
        logits = load_model(folder)(images)[-1]
    expected = logits.softmax(1).max(1)
    classes = list(Index.load(digits / "val").classes)
    for batch in (1, 7):
        done = list(Predictor(folder, batch=batch).run(sorted(photos.iterdir())))
        assert [p.image for p in done] == [str(file) for file in sorted(photos.iterdir())]
        assert [p.label for p in done] == [classes[i] for i in expected.indices]
        assert [p.confidence for p in done] == pytest.approx(expected.values.tolist(), abs=1e-5)
        assert {p.exit for p in done} == {3}


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
    loader = Loader(index, tmp_path / "shards" / "val", config.data, train=False, seed=0, global_batch=5, micro_batch=5,
                    rank=0, world_size=1, device=torch.device("cpu"), threads=1)  # fmt: skip
    stored = {
        index.key[int(i)].decode(): image.clone()
        for micro in loader.evaluation()
        for i, image in zip(micro.ids, micro.images)
    }
    loader.close()
    files = sorted(photos.iterdir())
    assert len(stored) == len(files) == 5
    read = [
        (name, image.clone()) for names, images in Predictor(folder)._read(files) for name, image in zip(names, images)
    ]
    pixels = sorted(image.sum().item() for image in stored.values())
    assert sorted(image.sum().item() for _, image in read) == pixels


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
    group = {"method": "optimal", "measure": "margin", "temperatures": None, "cost": "multiply_adds", "calibration": "val",
             "points": [{"budget": b, "cost": c, "calibration_top1": t, "thresholds": [h, None, 0.0]}
                        for b, c, t, h in ((1e5, 0.9e5, 0.5, 0.0), (2e5, 1.9e5, 0.8, 0.2), (3e5, 2.8e5, 0.7, 0.4))]}  # fmt: skip
    content = {"format": 2, "step": step, "exits": [], "budgeted": [group | changes]}
    (folder / "report.json").write_text(json.dumps(content))


def test_a_budget_takes_the_best_point_within_it(run, photos, capsys):
    folder, _ = run
    (folder / "report.json").unlink(missing_ok=True)
    assert "dist-train eval" in said(capsys, folder, photos, "--budget", "1M")
    report(folder)
    chosen = policy_for_budget(folder, "0.3M")
    assert (list(chosen.values), chosen.measure) == ([0.2, float("inf"), 0.0], "margin")
    assert next(iter(policy_for_budget(folder, "1e5").values)) == 0.0
    assert cli.run(["predict", str(folder), str(photos), "--budget", "200k"]) == 0
    assert "% saved" in capsys.readouterr().out
    assert "cheapest point" in said(capsys, folder, photos, "--budget", "10k")
    assert "budget in milliseconds" in said(capsys, folder, photos, "--budget", "3ms")
    assert "--budget is many" in said(capsys, folder, photos, "--budget", "many")
    report(folder, cost="milliseconds")
    assert policy_for_budget(folder, "3e5ms").values[0] == 0.2
    report(folder, step=8)
    assert "is of step 8, the checkpoint of step 7" in said(capsys, folder, photos, "--budget", "1M")


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
    assert "--batch is 0" in said(capsys, folder, photos, "--batch", 0)
    for output in (tmp_path / "no" / "out.csv", tmp_path):  # before the images are read: the only one is none
        assert "cannot be written" in said(capsys, folder, folder / "report.json", "--output", output)
